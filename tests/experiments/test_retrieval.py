"""Retrieval from folders to tables: rows beside separate computations, the closed form, centring, class features."""
import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import train
from tests.helpers import flags, logged, refused, results, tiny_state_dict, touch_images
from ucdr_ref.cli import load_state
from ucdr_ref.clip.weights import load_clip
from ucdr_ref.clip.zero_shot import preprocess
from ucdr_ref.config import PRESETS, from_dict
from ucdr_ref.data import benchmarks
from ucdr_ref.data.benchmarks import DATASETS
from ucdr_ref.data.images import Files, open_image
from ucdr_ref.experiments import report
from ucdr_ref.experiments import retrieval as experiment
from ucdr_ref.metrics import retrieval
from ucdr_ref.ucdr import closed_form
from ucdr_ref.ucdr.adapter import UCDRAdapter

NAMES = [f"shape_{corners}" for corners in range(3, 11)]


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(flags(world, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def form_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the closed form, with a split of enough test classes for centred rows."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "five.json").write_text(json.dumps({"train": NAMES[:2], "val": NAMES[2:3], "test": NAMES[3:]}))
    assert train.main(flags(world, folder / "form", "--method", "closed-form", "--class-split", str(folder / "five.json"))) == 0
    return folder / "form"


def rows(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["method"], row["gallery_name"]): row for row in results(folder)["rows"]}


def encode(world: Path, domain: str, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-shot CLIP's features of a domain's classes, image by image, and their labels; sketches are inverted."""
    paths = [path for name in names for path in sorted((world / "data" / domain / name).iterdir())]
    images = [open_image(str(path)) for path in paths]
    if domain == "sketch":
        images = [Image.eval(image, lambda value: 255 - value) for image in images]
    x = torch.stack([preprocess(32)(image) for image in images])
    with torch.no_grad():
        z = F.normalize(load_clip(world / "clip.pt").encode_image(x), dim=1)
    return z, torch.tensor([names.index(path.parent.name) for path in paths])


def test_evaluate_repeats_the_rows_and_leaves_tables_and_a_picture(run):
    before = results(run)["rows"]
    assert evaluate.main(["--run", str(run), "--workers", "0"]) == 0
    assert results(run)["rows"] == before and {method for method, _ in rows(run)} == {"zero-shot", "ucdr-adapter"}
    with Image.open(run / "queries.png") as picture:
        assert picture.width > 300
    lines = list(csv.DictReader((run / "per_class.csv").open()))
    for method in ("zero-shot", "ucdr-adapter"):
        of_class = [[float(line["mAP@200"])] * int(line["queries"]) for line in lines
                    if (line["method"], line["gallery_name"]) == (method, "unseen")]
        assert np.mean(sum(of_class, [])) == pytest.approx(rows(run)[method, "unseen"]["mAP@200"], abs=1e-6)


def test_the_table_fits_80_columns_and_says_its_conditions(run, form_run):
    for folder, centred in ((run, False), (form_run, True)):
        text = results(folder)["table"]
        assert max(map(len, text.splitlines())) <= 80
        assert ("transductive;\nsupposes a query set that is balanced" in text) == centred
        assert "no centred row for queries of fewer than 5 classes" in text
        for row in results(folder)["rows"]:
            assert f"{100 * row['mAP@200']:.2f}" in text and f"{100 * row['Prec@100']:.2f}" in text


def test_centred_rows_need_queries_of_several_classes_that_differ():
    def centred(labels: str, encode) -> bool:
        files = Files([str(i) for i in range(len(labels))], list(labels), ["d"] * len(labels))
        found = experiment.rank({"m": encode}, [benchmarks.Test("UCDR", "d", files, {"unseen": files})])
        return any(row["transductive"] for row in found)

    def different(files: Files) -> torch.Tensor:
        return F.normalize(torch.randn(len(files), 8, generator=torch.Generator().manual_seed(0)), dim=1)

    assert centred("abcde", different) and not centred("abcdd", different) and not centred("a", different)
    assert not centred("abcde", lambda files: torch.ones(len(files), 8) / math.sqrt(8))


def test_rows_equal_a_separate_computation(form_run, world):
    """Zero-shot CLIP and the closed form of the training images, as they are and with their means removed."""
    state, found = load_state(form_run / "best.pt"), rows(form_run)
    assert found["zero-shot", "mixed"]["gallery"] - found["zero-shot", "unseen"]["gallery"] == 2  # held back, of each training class
    assert json.loads((form_run / "run.json").read_text())["files"]["train"][0] == 22  # of 24
    assert state["strength"] == results(form_run)["strength"] == 3.0  # one validation class chooses nothing
    form = closed_form.ClosedForm(*(state["method"][f"form.{name}"] for name in ("mean", "subspace", "whitening")))
    query, labels = encode(world, "sketch", NAMES[3:])
    gallery, gallery_labels = encode(world, "photo", NAMES[3:])
    for title, make in (("zero-shot", lambda x: x), ("closed-form", form)):
        moved = [make(query), make(gallery)]
        expected = retrieval(moved[0], labels, moved[1], gallery_labels)
        for name in report.METRICS:
            assert found[title, "unseen"][name] == pytest.approx(expected[name], abs=1e-6)
        moved = [F.normalize(part - part.mean(dim=0), dim=1) for part in moved]
        expected = retrieval(moved[0], labels, moved[1], gallery_labels)["mAP@all"]
        row = found[f"{title}, centred", "unseen"]
        assert row["mAP@all"] == pytest.approx(expected, abs=1e-6) and row["transductive"]


def test_lambda_is_chosen_on_validation_classes_and_recorded(world, tmp_path, monkeypatch):
    scored, score = [], experiment.score
    monkeypatch.setattr(experiment, "score", lambda *given: scored.append(given[2]) or score(*given))
    run = tmp_path / "chosen"
    assert train.main(flags(world, run, "--method", "closed-form")) == 0
    validated = set(json.loads((world / "split.json").read_text())["val"])
    choosing = scored[:len(closed_form.STRENGTHS)]
    for queries in choosing:
        assert set(queries.classes) == validated and "sketch" not in queries.domains
    assert set(scored[len(choosing)].domains) == {"sketch"}
    strength = load_state(run / "best.pt")["strength"]
    assert strength in closed_form.STRENGTHS and results(run)["strength"] == strength
    assert f"closed form: lambda = {strength:g}" in results(run)["table"]


def test_prototypes_take_the_place_of_text(world, tmp_path, capsys):
    tower = {key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    image_only = ["--weights", str(tmp_path / "tower.pt")]
    refused(capsys, train.main(flags(world, tmp_path / "text", *image_only)), "--class-features prototypes")
    assert train.main(flags(world, tmp_path / "prototypes", *image_only, "--class-features", "prototypes")) == 0
    assert "384 trainable parameters" in capsys.readouterr().out  # U and V, no context (D13)
    anchors = load_state(tmp_path / "prototypes" / "best.pt")["method"]["anchors"]
    z, labels = encode(world, "photo", json.loads((world / "split.json").read_text())["train"])
    trained = torch.tensor([i % 6 for i in range(24)])  # one of six images of each class is held back
    means = torch.stack([torch.stack([F.normalize(z[(labels == k) & (trained != left)].mean(0), dim=0) for left in range(6)])
                         for k in range(4)])
    assert ((means - anchors[:, None]).abs().amax(dim=2).amin(dim=1) < 1e-5).all()


def test_bf16_training_keeps_float32_weights(world, tmp_path, monkeypatch):
    kinds = []
    step, encode_images = UCDRAdapter.step, UCDRAdapter.encode
    monkeypatch.setattr(UCDRAdapter, "step", lambda *a: kinds.append(torch.is_autocast_enabled("cpu")) or step(*a))
    monkeypatch.setattr(UCDRAdapter, "encode", lambda *a: kinds.append(torch.is_autocast_enabled("cpu")) or encode_images(*a))
    run = tmp_path / "run"
    assert train.main(flags(world, run, "--precision", "bf16")) == 0 and set(kinds) == {True}
    assert all(math.isfinite(line["loss"]) for line in logged(run) if "loss" in line)
    weights = load_state(run / "best.pt")["method"].values()
    assert {value.dtype for value in weights if value.is_floating_point()} == {torch.float32}


def test_an_unreadable_image_stops_training_and_evaluation_with_its_name(world, run, tmp_path, capsys):
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    (data / "sketch" / "shape_6" / "0.png").write_bytes(b"")  # a query of the test
    refused(capsys, evaluate.main(["--run", str(run), "--data-root", str(data), "--workers", "0"]), "shape_6/0.png")
    (data / "photo" / "shape_3" / "0.png").write_bytes(b"broken")
    (data / "photo" / "shape_3" / "1.png").write_bytes(b"broken")
    refused(capsys, train.main(flags(world, tmp_path / "run", "--data-root", str(data))), "shape_3/", "not a readable image")


@pytest.mark.parametrize("preset, domains, classes", [("domainnet/sketch", 5, 245), ("tuberlin", 2, 200), ("folder", 2, 42)])
def test_dry_run_of_every_preset(preset, domains, classes, world, tmp_path, capsys):
    """On empty files in each dataset's layout; the drawn data's is among the documented commands."""
    data, dataset = tmp_path / "data", PRESETS[preset]["dataset"]
    if dataset == "folder":
        touch_images(data, ("photo", "sketch", "icon"), [f"class {i}" for i in range(60)], 4)
    else:
        touch_images(data, DATASETS[dataset].domains, sum(DATASETS[dataset].splits().values(), []), 2)
    assert train.main(["--preset", preset, "--data-root", str(data), "--weights", str(world / "clip.pt"),
                       "--run", str(tmp_path / "dry"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    config = from_dict(json.loads(text[text.index("{"):text.index(" (all else")]))
    count = (config.context_vectors + (domains + classes) * config.prompt_length) * 64
    assert f"{classes} classes" in text and f"{count:,} trainable parameters" in text
    assert "14,720 trainable parameters" in text and not (tmp_path / "dry").exists()
    assert preset != "domainnet/sketch" or "; original 48,837 (-48," in text


def test_mistakes_are_one_sentence(world, tmp_path, capsys):
    def run_with(*more: str) -> int:
        return train.main(flags(world, tmp_path / "none", *more))

    refused(capsys, run_with("--source-batch", "1"), "batch of 1 cannot hold the 2 source domains")
    refused(capsys, run_with("--context-vectors", "90"), "100 tokens, CLIP reads 77")
    refused(capsys, run_with("--weights", str(tmp_path / "absent.pt")), "absent.pt")
    for method in ("ucdr-adapter", "zero-shot", "closed-form"):  # nor is another method trained under this one's name
        refused(capsys, run_with("--method", method, "--graph", "awa2", "--target", "x"), "--target: only for")
    shutil.copy(world / "clip.pt", tmp_path / "ViT-B-32.pt")
    refused(capsys, run_with("--weights", str(tmp_path / "ViT-B-32.pt")), "ViT-B-32.pt", "rename")
    assert not (tmp_path / "none").exists()
