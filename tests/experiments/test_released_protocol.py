"""Which images are trained on, queried and ranked: draws by --split-seed alone, and the released code's own draws."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import train
from tests.helpers import flags, tiny_state_dict, touch_images
from ucdr_ref.clip.model import CLIP
from ucdr_ref.clip.weights import load_clip
from ucdr_ref.clip.zero_shot import ZeroShot, preprocess
from ucdr_ref.config import PRESETS, resolve
from ucdr_ref.demo.drawing import SPLIT
from ucdr_ref.experiments import ranking
from ucdr_ref.experiments import retrieval as experiments
from ucdr_ref.experiments.datasets import DATASETS, class_list
from ucdr_ref.experiments.protocols import Protocol, build
from ucdr_ref.images.batches import STATISTICS, Files, open_image
from ucdr_ref.machine.files import load_state
from ucdr_ref.metrics import retrieval

N = 30


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trees")
    names = {dataset: sum((row.splits()[part] for part in ("train", "val", "test")), [])
             for dataset, row in (("domainnet", DATASETS["domainnet"]), ("sketchy", DATASETS["sketchy/eccv"]),
                                  ("tuberlin", DATASETS["tuberlin"]))}
    names |= {"toy": sum(map(list, SPLIT.values()), []), "folder": [f"class {i}" for i in range(60)]}
    domains = {"domainnet": DATASETS["domainnet"].domains, "sketchy": ("sketch", "extended_photo"),
               "tuberlin": ("sketches", "images"), "toy": ("real", "sketch", "clipart"), "folder": ("photo", "sketch", "icon")}
    return {dataset: touch_images(root / dataset, domains[dataset], names[dataset], N if dataset == "domainnet" else 13)
            for dataset in names}


DATA = [("domainnet", {}), ("sketchy", {}), ("sketchy", {"sketchy_split": "random"}), ("tuberlin", {}), ("toy", {}),
        ("folder", {}), ("folder", {"held_out": "none"})]


@pytest.mark.parametrize("dataset,more", DATA, ids=lambda value: value if isinstance(value, str) else "-".join(value.values()))
def test_the_seed_changes_no_file_list_and_the_split_seed_every_draw(dataset, more, trees):
    for extra in ({}, {"per_class": 7}, {"variant": "released"}):
        given = {"dataset": dataset, "data_root": str(trees[dataset]), **more, **extra}
        before = build(resolve(given))
        assert build(resolve({**given, "seed": 7})) == before
        drawn = "per_class" in extra or dataset == "folder" or not extra and before.tests[0].protocol == "UCDR"
        assert (build(resolve({**given, "split_seed": 1})) != before) == drawn


def test_the_first_45_training_classes_are_those_of_the_list_as_listed(trees):
    protocol = build(resolve({"data_root": str(trees["domainnet"])}, "domainnet/sketch"))
    listed = class_list("domainnet-train")
    assert protocol.class_names == listed and list(dict.fromkeys(protocol.tests[1].query.classes)) == listed[:45]
    assert listed != sorted(listed) and "cell_phone" in listed[:44]


@pytest.mark.parametrize("n", [1, 2, 6, 12, 13, 20, 25, 100])
def test_the_holdback_keeps_what_92_per_cent_leave(n, tmp_path):
    root = touch_images(tmp_path, ("photo", "sketch", "icon"), "abcdefgh", n)
    protocol = build(resolve({"dataset": "folder", "data_root": str(root)}))
    ucdr = protocol.tests[0]
    kept = len(ucdr.galleries["mixed"]) - len(ucdr.galleries["unseen"])
    assert kept == (n - int(0.92 * n)) * 6 and n - int(0.92 * n) >= 1  # D10
    assert protocol.train.domains.count("photo") == int(0.92 * n) * 6


@pytest.mark.parametrize("held_out,share", [("sketch", 0.25), ("quickdraw", 0.10)])
def test_released_draws_are_numpys_by_the_place_of_the_class(held_out, share, trees):
    protocol = build(resolve({"data_root": str(trees["domainnet"]), "variant": "released"}, f"domainnet/{held_out}"))
    ucdr, ud = protocol.tests
    trained = {path for path, domain in zip(protocol.train.paths, protocol.train.domains) if domain == "real"}
    expected = {"trained": set(), "kept": set(), "query": set(), "gallery": set()}
    for i, name in enumerate(class_list("domainnet-train")):
        files, queries = (sorted(map(str, (trees["domainnet"] / domain / name).iterdir())) for domain in ("real", held_out))
        np.random.seed(i)
        of_training = np.random.choice(files, int(0.92 * N), replace=False)
        expected["trained"] |= set(of_training)
        expected["kept"] |= set(files) - set(of_training)
        if i < 45:
            for part, paths in (("query", queries), ("gallery", files)):
                np.random.seed(i)
                expected[part] |= set(np.random.choice(paths, int(share * N), replace=False))
    unseen = set(ucdr.galleries["unseen"].paths)
    assert expected == {"trained": trained, "kept": set(ucdr.galleries["mixed"].paths) - unseen, "query": set(ud.query.paths),
                        "gallery": set(ud.galleries["seen"].paths)}
    assert set(ud.galleries["seen"].paths) <= trained and len(ud.query) == len(ud.galleries["seen"]) == 45 * int(share * N)


def test_a_released_draw_of_nothing_is_said(tmp_path):
    root = touch_images(tmp_path, ("photo", "sketch", "icon"), "abcdefgh", 3)
    protocol = build(resolve({"dataset": "folder", "data_root": str(root), "variant": "released"}))
    assert [test.protocol for test in protocol.tests] == ["UCDR"] and any("UdCDR is left out" in line for line in protocol.notes)


def test_what_chooses_the_epoch_is_named(trees):
    def chosen(dataset: str, **more: str) -> tuple[str, tuple[str, str] | None]:
        protocol = build(resolve({"dataset": dataset, "data_root": str(trees[dataset]), **more}))
        if protocol.selected:
            assert list(protocol.validation.galleries) == [protocol.selected[0]]
        return protocol.validation.protocol, protocol.selected

    assert chosen("domainnet") == ("validation", ("unseen", "mAP@200"))
    assert chosen("domainnet", variant="released") == ("UCDR", ("mixed", "mAP@200"))
    assert chosen("sketchy", variant="released") == ("UcCDR", ("unseen", "mAP@200"))
    assert chosen("sketchy", variant="released", sketchy_split="random") == ("UcCDR", ("unseen", "mAP@all"))
    assert chosen("tuberlin", variant="released") == ("UcCDR", ("unseen", "mAP@all"))


def test_the_validation_score_is_the_named_gallerys_and_metrics(world, tmp_path, monkeypatch):
    found = {"unseen": {"metrics": {"mAP@200": 0.1, "mAP@all": 0.2}}, "mixed": {"metrics": {"mAP@200": 0.3, "mAP@all": 0.4}}}
    monkeypatch.setattr(ranking, "score", lambda *_: found)
    for gallery in found:
        for metric, value in found[gallery]["metrics"].items():
            assert ranking.validation_score(None, None, (gallery, metric)) == value


def test_one_validation_class_chooses_nothing_and_the_last_epoch_is_kept(world, tmp_path, capsys):
    names = [f"shape_{k}" for k in range(3, 11)]
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": names[:5], "val": names[5:6], "test": names[6:]}))
    run = tmp_path / "run"
    assert train.main(flags(world, run, "--class-split", str(split), "--target-epochs", "3")) == 0
    assert "1 class cannot choose an epoch" in capsys.readouterr().out
    best, last = (load_state(run / name)["method"] for name in ("best.pt", "last.pt"))
    assert all(torch.equal(best[name], last[name]) for name in last)
    assert b"validation_mAP" not in (run / "log.jsonl").read_bytes()


def test_a_class_listed_twice_among_very_many_is_found(folder_tree, tmp_path):
    names = [f"class {i}" for i in range(80_000)]
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": names, "val": names, "test": names}))  # a quadratic search would take minutes
    with pytest.raises(ValueError, match="class_0, class_1, .* and 79995 more stand in more than one part"):
        build(resolve({"dataset": "folder", "data_root": str(folder_tree), "class_split": str(split)}))


@pytest.fixture
def folder_tree(trees: dict[str, Path]) -> Path:
    return trees["folder"]


SEEN = {"sketch": "quickdraw", "quickdraw": "sketch", "painting": "infograph", "infograph": "painting", "clipart": "painting"}


@pytest.mark.parametrize("held_out", SEEN)
def test_every_domainnet_preset_validates_on_its_seen_domain(held_out, trees):
    protocol = build(resolve({"data_root": str(trees["domainnet"])}, f"domainnet/{held_out}"))
    assert PRESETS[f"domainnet/{held_out}"]["seen"] == protocol.validation.query_domain == SEEN[held_out]
    assert protocol.tests[0].query_domain == held_out and held_out not in protocol.domain_names


def test_validation_queries_of_the_other_presets():
    assert {name: DATASETS[name].seen for name in ("sketchy/eccv", "sketchy/random", "tuberlin")} == {
        "sketchy/eccv": ("sketch",), "sketchy/random": ("sketch",), "tuberlin": ("sketches",)}


def test_p_above_1_has_no_released_value(trees):
    for preset, expected in (("sketchy/eccv", True), ("domainnet/sketch", False)):
        root = str(trees[preset.split("/")[0]])
        released, paper = (build(resolve({"data_root": root, "variant": variant}, preset)) for variant in ("released", "paper"))
        assert any("(D16)" in line for line in released.notes) == expected and not any("(D16)" in line for line in paper.notes)


# what the released options change in training and evaluation

@pytest.mark.parametrize("normalization,mean,std", [(name, *values) for name, values in STATISTICS.items()])
def test_training_images_are_normalised_as_asked(normalization, mean, std, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")  # which no jitter changes
    files = Files([str(tmp_path / "black.png")] * 2, ["a"] * 2, ["x", "y"])
    protocol = Protocol("", ["a"], ["x", "y"], files, None, [], "x")
    config = resolve({"train_normalization": normalization, "workers": 0, "dataset": "folder"})
    for phase in ("source", "target"):
        ((batch, _),) = experiments.feed(phase, protocol, config, 32, torch.device("cpu")).load(0, [[0, 1]])
        assert_close(batch.images, (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).expand(2, 3, 32, 32))  # D4


def test_each_phase_has_its_own_rate_and_adams_published_betas(world, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def recording(self, *more):
        group, = self.param_groups
        seen.append((group["lr"], group["betas"], group["weight_decay"]))
        return step(self, *more)

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    assert train.main(flags(world, tmp_path / "run", "--source-lr", "0.004", "--target-lr", "0.0005")) == 0
    assert list(dict.fromkeys(seen)) == [(0.004, (0.9, 0.999), 0), (0.0005, (0.9, 0.999), 0)]


def test_zero_shot_is_ranked_on_the_features_asked_for(world, tmp_path):
    clip = CLIP.from_state_dict(tiny_state_dict())
    images = torch.randn(3, 3, 32, 32)
    assert_close(ZeroShot(clip, False).encode(images), clip.encode_image(images).float())  # D18
    assert_close(ZeroShot(clip).encode(images), F.normalize(clip.encode_image(images), dim=1))

    clip = load_clip(world / "clip.pt")
    names = json.loads((world / "split.json").read_text())["test"]

    def encode(domain: str) -> tuple[torch.Tensor, torch.Tensor]:
        paths = [path for name in names for path in sorted((world / "data" / domain / name).iterdir())]
        read = [open_image(str(path)) for path in paths]
        if domain == "sketch":
            read = [Image.eval(image, lambda value: 255 - value) for image in read]
        labels = torch.tensor([names.index(path.parent.name) for path in paths])
        return clip.encode_image(torch.stack([preprocess(32)(image) for image in read])), labels

    expected = retrieval(*encode("sketch"), *encode("photo"))["mAP@200"]
    for run, more in (("zs", ["--method", "zero-shot"]), ("adapter", [])):
        assert train.main(flags(world, tmp_path / run, "--evaluation-features", "raw", *more)) == 0
        row = json.loads((tmp_path / run / "results.json").read_text())["rows"][0]
        assert (row["method"], row["gallery_name"]) == ("zero-shot", "unseen")
        assert row["mAP@200"] == pytest.approx(expected, abs=1e-6)


def test_published_numbers_stand_beside_what_they_describe_alone(tmp_path, monkeypatch):
    weights = tmp_path / "any.pt"
    weights.write_bytes(b"other weights")
    plain = {"weights": str(weights), "dataset": "domainnet"}
    assert ranking.published(resolve(plain), "UCDR", "unseen") == ""
    monkeypatch.setattr(ranking, "file_digest", lambda _: ranking.OPENAI_SHA256["ViT-B-32.pt"])
    assert "UCDR-Adapter" in ranking.published(resolve(plain), "UCDR", "unseen")
    assert ranking.published(resolve({**plain, "per_class": 5}), "UCDR", "unseen") == ""
    assert ranking.published(resolve(plain), "UdCDR", "seen") == ""  # the published gallery is the released one (D7)
    assert ranking.published(resolve({**plain, "ud_gallery": "trained"}), "UdCDR", "seen")
    assert ranking.published(resolve({**plain, "dataset": "folder"}), "UCDR", "unseen") == ""
    for gallery, shown in (("real", True), ("painting", False)):
        assert bool(ranking.published(resolve({**plain, "gallery": gallery}), "UCDR", "unseen")) == shown
    for split, shown in (("eccv", True), ("random", False)):
        config = resolve({"weights": str(weights), "dataset": "sketchy", "sketchy_split": split})
        assert bool(ranking.published(config, "UcCDR", "unseen")) == shown
