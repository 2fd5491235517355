"""The three entry points as a user meets them: from folders to tables and pictures, and one sentence for every mistake."""
from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import retrieve
import train
from tests.helpers import LONGER, flags, refused, same_runs, tiny_state_dict, touch_images
from ucdr_ref.config import FIELDS, PRESETS, from_dict, resolve
from ucdr_ref.experiments.class_folders import graph_and_unseen
from ucdr_ref.experiments.datasets import DATASETS, class_list
from ucdr_ref.metrics import retrieval
from ucdr_ref.ucdr.adapter import UCDRAdapter


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(flags(world, folder)) == 0
    return folder


def test_evaluate_repeats_the_table_of_training(run, tmp_path, capsys):
    assert evaluate.main(["--run", str(run), "--out", str(tmp_path), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    for word in ("UCDR", "UdCDR", "unseen", "mixed", "zero-shot", "ucdr-adapter", "mAP@200", "k cut to"):
        assert word in printed
    ours, theirs = (json.loads((folder / "results.json").read_text())["rows"] for folder in (tmp_path, run))
    assert ours == theirs and len(ours) == 12
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.width > 300
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    means = {row["method"]: [] for row in rows}
    for row in rows:
        if row["gallery"] == "unseen":
            means[row["method"]] += [float(row["mAP@200"])] * int(row["queries"])
    for row in ours[:4]:
        assert np.mean(means[row["method"]]) == pytest.approx(row["mAP@200"], abs=1e-6)


def test_zero_shot_rows_equal_a_separate_computation(run, world):
    from ucdr_ref.clip.weights import load_clip
    from ucdr_ref.clip.zero_shot import preprocess
    from ucdr_ref.images.batches import open_image
    clip = load_clip(world / "clip.pt")
    names = json.loads((world / "split.json").read_text())["test"]

    def encode(domain):
        paths = [path for name in names for path in sorted((world / "data" / domain / name).iterdir())]
        images = [open_image(str(path)) for path in paths]
        if domain == "sketch":
            images = [Image.eval(image, lambda value: 255 - value) for image in images]
        x = torch.stack([preprocess(32)(image) for image in images])
        labels = torch.tensor([names.index(path.parent.name) for path in paths])
        return torch.nn.functional.normalize(clip.encode_image(x), dim=1), labels

    expected = retrieval(*encode("sketch"), *encode("photo"))["mAP@200"]
    row = json.loads((run / "results.json").read_text())["rows"][0]
    assert (row["method"], row["gallery_name"]) == ("zero-shot", "unseen") and row["mAP@200"] == pytest.approx(expected, abs=1e-6)


def test_zero_shot_run(world, tmp_path, capsys):
    assert train.main(flags(world, tmp_path / "zs", "--method", "zero-shot")) == 0
    assert "ucdr-adapter" not in capsys.readouterr().out.split("protocol")[-1]
    gallery = str(world / "data" / "photo")
    assert retrieve.main(["--run", str(tmp_path / "zs"), "--gallery", gallery, "--query", f"{gallery}/shape_3/0.png", "--k", "2",
                          "--workers", "0"]) == 0


def test_retrieve_from_index_to_sheet(run, world, tmp_path, capsys):
    gallery = tmp_path / "gallery"
    shutil.copytree(world / "data" / "photo", gallery)
    query = str(gallery / "shape_5" / "1.png")
    call = ["--run", str(run), "--gallery", str(gallery), "--query", query, str(world / "data/sketch/shape_4/0.png"), "--k", "3",
            "--workers", "0", "--cache", str(tmp_path / "cache")]
    assert retrieve.main([*call, "--out", str(tmp_path / "sheet.png")]) == 0
    text = capsys.readouterr().out
    assert "48 images" in text and "48 encoded now" in text and str(Path("shape_5") / "1.png") in text
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 300 and picture.height > 200
    assert retrieve.main([*call, "--json", "--export", str(tmp_path / "vectors.npy")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["cached"], answer["encoded"]) == (48, 0) and len(answer["queries"]) == 2
    first = answer["queries"][0]["results"]
    assert first[0]["path"] == query and first[0]["distance"] == pytest.approx(0, abs=1e-3) and len(first) == 3
    assert [hit["distance"] for hit in first] == sorted(hit["distance"] for hit in first)
    assert np.load(tmp_path / "vectors.npy").shape == (48, 32)
    (gallery / "shape_5" / "2.png").unlink()
    assert retrieve.main([*call, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["images"], answer["cached"], answer["encoded"]) == (47, 47, 0)


def test_class_features_take_the_place_of_text(world, tmp_path, capsys):
    tower = {key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    image_only = ["--weights", str(tmp_path / "tower.pt")]
    refused(capsys, train.main(flags(world, tmp_path / "text", *image_only)), "image tower alone", "--class-features prototypes")
    assert train.main(flags(world, tmp_path / "prototypes", *image_only, "--class-features", "prototypes")) == 0
    assert "phase source: 384 trainable parameters" in capsys.readouterr().out  # U and V, no context (D13)
    assert evaluate.main(["--run", str(tmp_path / "prototypes"), "--workers", "0"]) == 0
    np.save(tmp_path / "anchors.npy", np.random.default_rng(0).normal(size=(4, 32)))
    given = [*image_only, "--class-features", str(tmp_path / "anchors.npy")]
    assert train.main(flags(world, tmp_path / "given", *given)) == 0
    np.save(tmp_path / "anchors.npy", np.zeros((4, 31)))
    refused(capsys, train.main(flags(world, tmp_path / "wrong", *given)), "[4, 31], expected [4, 32]")
    refused(capsys, train.main(flags(world, tmp_path / "wrong", "--class-features", "text")), "--class-features text")


def printed_config(text: str) -> dict:
    """The fields that are not at their defaults, as training prints them."""
    line = next(line for line in text.splitlines() if line.startswith("config   "))
    return json.loads(line.removeprefix("config   ").split(" (all else")[0])


def test_dry_run_writes_nothing(world, tmp_path, capsys):
    assert train.main(flags(world, tmp_path / "dry", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "phase source: 640 trainable parameters" in text and "phase target: 14,720" in text and not (tmp_path / "dry").exists()
    assert "train    " in text and printed_config(text)["context_vectors"] == 4


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Empty files in the folder layout of every dataset that is not drawn."""
    root = tmp_path_factory.mktemp("trees")
    domainnet = [name for part in ("train", "val", "test") for name in class_list(f"domainnet-{part}")]
    graph, unseen_ids = graph_and_unseen(resolve({"graph": "awa2"}, "i2awa"))
    awa2, unseen = set(graph.names[:graph.classes]), {graph.names[i] for i in unseen_ids}
    tuberlin = [name for part in ("train", "val", "test") for name in class_list(f"tuberlin-{part}")]
    return {"domainnet": touch_images(root / "domainnet", DATASETS["domainnet"].domains, domainnet, 2),
            "sketchy": touch_images(root / "sketchy", ("sketch", "extended_photo"), class_list("sketchy-all"), 4),
            "tuberlin": touch_images(root / "tuberlin", ("sketches", "images"), tuberlin, 2),
            "folder": touch_images(root / "folder", ("photo", "sketch", "icon"), [f"class {i}" for i in range(60)], 4),
            "web": touch_images(root, ("web",), awa2 - unseen, 1) / "web", "AwA2": touch_images(root, ("AwA2",), awa2, 1) / "AwA2"}


@pytest.mark.parametrize("preset, domains, classes", [
    *((f"domainnet/{held_out}", 5, 245) for held_out in ("sketch", "quickdraw", "painting", "infograph", "clipart")),
    ("sketchy/eccv", 2, 93), ("sketchy/random", 2, 90), ("tuberlin", 2, 200), ("folder", 2, 42),
    ("toy", 5, 40), ("toy/fast", 5, 40)])
def test_dry_run_of_every_retrieval_preset(preset, domains, classes, trees, world, tmp_path, capsys):
    dataset = PRESETS[preset]["dataset"]
    root = trees.get(dataset, tmp_path)
    more = {"folder": ["--gallery", "photo"], "toy": ["--toy-images", "2", "--source-batch", "10", "--target-batch", "10"]}
    assert train.main(["--preset", preset, "--data-root", str(root), "--weights", str(world / "clip.pt"), "--run",
                       str(tmp_path / "dry"), "--dry-run", *more.get(dataset, [])]) == 0
    text = capsys.readouterr().out
    m, p = (getattr(from_dict(printed_config(text)), name) for name in ("context_vectors", "prompt_length"))
    assert f"{classes} classes" in text and f"phase source: {(m + (domains + classes) * p) * 64:,} trainable" in text
    assert "phase target: 14,720 trainable" in text and not (tmp_path / "dry").exists()


@pytest.mark.parametrize("preset", ["i2awa", "i2webv", "sre", "sre/toy", "sre/toy-fast"])
def test_dry_run_of_every_classification_preset(preset, trees, world, tmp_path, capsys):
    folders = ["--data-root", str(tmp_path), "--toy-images", "2"] if "toy" in preset else \
        ["--graph", "awa2", "--source", str(trees["web"]), "--target", str(trees["AwA2"])]
    assert train.main(["--preset", preset, "--weights", str(world / "clip.pt"), "--run", str(tmp_path / "dry"), "--dry-run",
                       *folders]) == 0
    text = capsys.readouterr().out
    assert "classes (" in text and "phase sre: " in text and printed_config(text)["method"] == "sre-clip" and not (tmp_path / "dry").exists()


def test_every_field_is_a_flag_and_every_preset_resolves(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in FIELDS)
    (tmp_path / "file").touch()
    absent = str(tmp_path / "file" / "root")  # nor can the drawn data be made there
    for preset in PRESETS:
        code = train.main(["--preset", preset, "--data-root", absent, "--source", absent, "--dry-run"])
        refused(capsys, code)
        resolve({"data_root": absent}, preset)


def test_mistakes_in_flags(world, tmp_path, capsys):
    def run_with(*more: str) -> int:
        return train.main(flags(world, tmp_path / "none", *more))

    refused(capsys, run_with("--data-root", str(tmp_path / "absent")), "absent", "no such folder")
    refused(capsys, run_with("--held-out", "paintings"), "--held-out paintings", "icon, photo, sketch")
    refused(capsys, run_with("--source-batch", "1"), "batch of 1 cannot hold the 2 source domains")
    refused(capsys, run_with("--context-vectors", "90"), "'shape_3'", "--context-vectors")
    refused(capsys, run_with("--weights", str(tmp_path / "absent.pt")), "absent.pt")
    refused(capsys, run_with("--preset", "domainnet/cat"), "no such preset", "domainnet/sketch")
    refused(capsys, run_with("--preset", "tuberlin"), "give one of the two")
    refused(capsys, run_with("--device", "tpu9"), "--device tpu9")
    refused(capsys, run_with("--fast"), "--fast is short for the demonstration alone, and this is folder")
    for method in ("ucdr-adapter", "zero-shot"):  # nor is another method trained under this one's name
        refused(capsys, run_with("--method", method, "--graph", "awa2", "--target", "x"),
                f"--graph, --target: only for --method sre-clip or closed-form, and this is {method}")
    refused(capsys, run_with("--source-lr", "-1"), "source_lr is -1.0")
    refused(capsys, run_with("--class-split", str(tmp_path / "x.json")), "x.json does not exist")
    assert not (tmp_path / "none").exists()
    for main, flag, value, sentence in ((train.main, "--mask", "theirs", "invalid choice"), (train.main, "--run", "", "it is empty"),
                                        (evaluate.main, "--out", "", "it is empty"), (retrieve.main, "--gallery", "", "it is empty")):
        with pytest.raises(SystemExit) as stop:
            main([flag, value])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_run_folder_of_another_config_is_kept(run, world, capsys):
    before = (run / "best.pt").read_bytes()
    refused(capsys, train.main(flags(world, run, "--mask", "none", "--target-lr", "0.1")), "mask: 'own' -> 'none'", "target_lr: 0.0001 -> 0.1")
    assert (run / "best.pt").read_bytes() == before
    elsewhere = world / "data"
    refused(capsys, train.main(flags(world, elsewhere)), "is no run folder")


def test_changed_images_or_weights_are_noticed(world, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    call = flags(world, tmp_path / "run", "--data-root", str(data), "--method", "zero-shot")
    assert train.main(call) == 0
    (data / "photo" / "shape_4" / "9.png").write_bytes((data / "photo" / "shape_4" / "0.png").read_bytes())
    refused(capsys, train.main(call), "other image files")
    torch.save(tiny_state_dict(1), tmp_path / "other.pt")
    refused(capsys, retrieve.main(["--run", str(tmp_path / "run"), "--gallery", str(data), "--query", "x.png", "--workers", "0",
                                 "--weights", str(tmp_path / "absent.pt")]), "absent.pt")


def test_a_run_is_resumed_and_evaluated_after_its_data_moved(world, tmp_path, monkeypatch, capsys):
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(world, before)
    assert train.main(flags(before, tmp_path / "whole", *LONGER)) == 0
    step, count = UCDRAdapter.step, 0

    def stopping(self, *arguments):
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(UCDRAdapter, "step", stopping)
    assert train.main(flags(before, tmp_path / "run", *LONGER)) == 130
    monkeypatch.undo()
    before.rename(after)
    assert train.main(flags(after, tmp_path / "run", *LONGER)) == 0
    same_runs(tmp_path / "whole", tmp_path / "run", ignored=("data_root", "class_split", "weights"))
    capsys.readouterr()
    moved = ["--run", str(tmp_path / "whole"), "--workers", "0", "--out", str(tmp_path / "out")]
    refused(capsys, evaluate.main(moved), "clip.pt", "--weights")
    moved += ["--weights", str(after / "clip.pt")]
    refused(capsys, evaluate.main(moved), "before", "no such folder")
    moved += ["--data-root", str(after / "data")]
    refused(capsys, evaluate.main(moved), "--class-split", "split.json")
    assert train.main(flags(after, tmp_path / "whole", *LONGER)) == 0  # its best.pt names the old places
    assert evaluate.main([*moved, "--class-split", str(after / "split.json")]) == 0
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (tmp_path / "whole", tmp_path / "out")]
    assert rows[0] == rows[1]


def test_evaluate_and_retrieve_explain_mistakes(run, world, tmp_path, capsys):
    refused(capsys, evaluate.main(["--run", str(tmp_path / "nothing")]), "best.pt", "train first")
    wide = tiny_state_dict(embed_dim=48)
    torch.save(wide, tmp_path / "wide.pt")
    other = ["--run", str(run), "--weights", str(tmp_path / "wide.pt")]
    refused(capsys, evaluate.main(other), "not the file that", "--other-weights")
    refused(capsys, evaluate.main([*other, "--other-weights"]), "was trained with other weights", "32", "48")
    fewer = tmp_path / "fewer"
    shutil.copytree(world / "data", fewer)
    for domain in ("photo", "sketch", "icon"):
        shutil.rmtree(fewer / domain / "shape_3")
    refused(capsys, evaluate.main(["--run", str(run), "--data-root", str(fewer)]), "no folder", "shape_3")
    gallery = ["--gallery", str(world / "data" / "photo")]
    refused(capsys, retrieve.main(["--run", str(run), *gallery]), "nothing to do")
    refused(capsys, retrieve.main(["--run", str(run), *gallery, "--query", str(tmp_path / "no.png")]), "no.png")
    refused(capsys, retrieve.main(["--run", str(run), "--gallery", str(tmp_path / "no"), "--export",
                                   str(tmp_path / "x.npy")]), "no such folder")
    (run.parent / "broken").mkdir()
    (run.parent / "broken" / "best.pt").write_bytes(b"PK\x03\x04 half a file")
    refused(capsys, evaluate.main(["--run", str(run.parent / "broken")]), "best.pt")
    refused(capsys, evaluate.main(["--run", str(run), "--target", str(tmp_path)]), "error: --target: only for")
    refused(capsys, evaluate.main(["--run", str(run), "--eval-batch", "0"]), "error: config field eval_batch is 0")


def test_unreadable_images_stop_or_are_counted(world, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    (data / "photo" / "shape_3" / "0.png").write_bytes(b"broken")
    (data / "sketch" / "shape_6" / "0.png").write_bytes(b"")
    refused(capsys, train.main(flags(world, tmp_path / "a", "--data-root", str(data))), "not a readable image", "--bad-images skip")
    assert train.main(flags(world, tmp_path / "b", "--data-root", str(data), "--bad-images", "skip")) == 0
    captured = capsys.readouterr()
    assert "skipped" in captured.err and "11 x 12" in captured.out
    for file in (data / "photo" / "shape_3").iterdir():
        file.write_bytes(b"broken")
    refused(capsys, train.main(flags(world, tmp_path / "d", "--data-root", str(data), "--bad-images", "skip", "--class-features",
                                     "prototypes")), "no readable training image in photo for shape_3")
    (data / "photo" / "empty").mkdir()
    refused(capsys, train.main(flags(world, tmp_path / "c", "--data-root", str(data))), "a class folder without images")
