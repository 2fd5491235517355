"""The commands that measure on images: what they would run, what they read back, and their rows without training."""
from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.helpers import tiny_state_dict
from ucdr_ref.bench import animals, drawn, frozen, real
from ucdr_ref.bench.record import spread
from ucdr_ref.cli import interrupt
from ucdr_ref.clip.weights import load_clip
from ucdr_ref.config import add_arguments, resolve
from ucdr_ref.metrics import average_precision
from ucdr_ref.sre.graph import load_graph, read_vectors

CLASSES = {"seen": ["cat", "dog", "cow"], "val_unseen": ["pig", "hen"], "unseen": ["bat", "bee", "fox", "owl", "elk"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for domain in ("photo", *real.DOMAINS, "render3d"):
        for name in sum(CLASSES.values(), []):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(3):
                coarse = rng.integers(0, 255, (4, 4, 4 if domain == "icon" else 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (root / "splits.json").write_text(json.dumps(CLASSES))
    return root


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tower.pt"
    torch.save({key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}, path)
    return path


def test_the_plan_is_ordered_and_a_variant_changes_what_its_name_says():
    jobs = real.plan()
    assert [(job.held_out, job.variant, job.seed) for job in jobs[:7]] == [
        *(("sketch", "paper", seed) for seed in (0, 1, 2)), *((name, "paper", 0) for name in real.DOMAINS[1:]),
        ("sketch", "no inversion", 0)]
    assert {job.variant for job in jobs} == set(real.VARIANTS) and len({job.name for job in jobs}) == len(jobs)

    def config(variant):
        return real.config_of([*real.shared_flags("sketch", Path("data"), Path("w.pt")), *real.SETTINGS,
                               *real.VARIANTS[variant]])

    paper = config("paper")
    assert (paper.held_out, paper.seen, paper.gallery, paper.selection) == ("sketch", "quickdraw", "photo", "last")
    assert paper.domains == ("photo", *real.DOMAINS) and (paper.target_batch, paper.target_epochs) == (16, 1)
    for variant, expected in {"no mask": {"mask": "none"}, "feature token 1": {"feature_token": 1},
                              "phase 1 only": {"target_epochs": 0}, "no inversion": {"stroke_domains": ("none",)}}.items():
        found = config(variant)
        changed = {name for name in vars(paper) if getattr(found, name) != getattr(paper, name)}
        assert {name: getattr(found, name) for name in changed} == expected


@pytest.mark.parametrize("part", drawn.PARTS)
def test_every_row_of_the_drawn_tables_is_a_training_that_train_py_takes(part):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    first, *others = (resolve(vars(parser.parse_args(flags))) for flags in drawn.PARTS[part].values())
    assert all(other != first for other in others) and set(drawn.COLUMNS) == set(drawn.PARTS)


def test_rows_without_training_encode_once_and_equal_open_clip(images, tower, tmp_path, monkeypatch):
    flags = ["--data", str(images), "--weights", str(tower), "--out", str(tmp_path), "--variants", "--workers", "0",
             "--machine", "My CPU", "--precision", "fp32"]
    assert real.main(flags) == 0
    path = tmp_path / "real-my-cpu.json"
    found = json.loads(path.read_text())
    assert len(found["frozen"]) == 4 * 2 * (3 * 2 + 1) and found["trained"] == []
    assert str(images) not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    forms = [row["lambda"] for row in found["frozen"] if row["method"].endswith("closed form")]
    assert len(forms) == 16 and None not in forms
    assert sum(row["method"] == frozen.BY_TRAINING_MEANS and not row["transductive"] for row in found["frozen"]) == 8
    monkeypatch.setattr("ucdr_ref.data.features.Extractor.stream", lambda *_: pytest.fail("encoded a second time"))
    assert real.main(flags) == 0
    assert [row["unseen"] for row in json.loads(path.read_text())["frozen"]] == [row["unseen"] for row in found["frozen"]]
    for row in found["frozen"]:
        if row["method"] == "zero-shot" and not row["transductive"]:
            dark = row["inversion"] == "strokes" and row["held_out"] in real.STROKES
            assert row["unseen"]["mAP@all"] == pytest.approx(open_clip_score(images, tower, row["held_out"], dark), abs=1e-3)


def open_clip_score(data: Path, weights: Path, domain: str, dark: bool) -> float:
    """mAP@all in per cent of open_clip_torch's tower, queries of `domain`, gallery photo, unseen classes."""
    transforms = pytest.importorskip("open_clip.transform")
    from open_clip.transformer import QuickGELU, VisionTransformer

    ours = load_clip(weights)
    width, layers = ours.vision_width, len(ours.visual.transformer.resblocks)
    peer = VisionTransformer(ours.image_size, ours.patch, width, layers, width // 64, 4.0, output_dim=ours.embed_dim,
                             act_layer=QuickGELU).eval()
    peer.load_state_dict(ours.visual.state_dict())
    transform, rows = transforms.image_transform(ours.image_size, is_train=False), {}
    for folder in (domain, "photo"):
        for path in sorted(path for name in CLASSES["unseen"] for path in (data / folder / name).iterdir()):
            image = Image.open(path).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            image = ImageOps.invert(image) if dark and folder == domain else image
            with torch.inference_mode():
                rows[path] = torch.nn.functional.normalize(peer(transform(image)[None])[0], dim=0)
    gallery = [path for path in rows if path.parts[-3] == "photo"]
    scores = []
    for query in (path for path in rows if path.parts[-3] == domain):
        order = sorted(gallery, key=lambda path: float((rows[path] - rows[query]).norm()))
        scores.append(average_precision(torch.tensor([path.parent.name == query.parent.name for path in order])))
    return 100 * float(torch.stack(scores).mean())


def test_centring_by_other_classes_takes_nothing_from_the_test(images, tower, monkeypatch):
    """Its row is of training images of photo and of the seen source domain, whatever the query's neighbours."""
    asked = []
    mean = frozen.training_mean
    monkeypatch.setattr(frozen, "training_mean", lambda table, protocol, domain: (
        asked.append((domain, set(protocol.train.classes))), mean(table, protocol, domain))[1])
    config = real.config_of([*real.shared_flags("sketch", images, tower), *real.SETTINGS, "--workers", "0"])
    frozen.frozen_rows(config, images.parent / "out", torch.device("cpu"))
    assert [domain for domain, _ in asked] == ["quickdraw", "photo"]
    assert not any(classes & set(CLASSES["unseen"]) for _, classes in asked)


def test_tables_hold_sample_deviations_over_seeds_and_means_over_domains():
    def row(domain, method, value, seed=0, transductive=False):
        return {"held_out": domain, "method": method, "transductive": transductive, "seed": seed,
                "unseen": {"mAP@all": value}}

    rows = [row(domain, "zero-shot", 10.0 * k) for k, domain in enumerate(real.DOMAINS, 1)]
    rows += [row("sketch", "ucdr-adapter", value, seed) for seed, value in enumerate((35.0, 41.0))]
    rows += [row("icon", "zero-shot", 5.0, transductive=True)]
    lines = real.table(rows, "unseen").splitlines()[2:]
    assert lines == ["| zero-shot | 10.0 | 20.0 | 30.0 | 40.0 | 25.0 |",
                     f"| UCDR-Adapter | 38.0 ± {statistics.stdev([35, 41]):.1f} (n = 2) | - | - | - | - |",
                     "| zero-shot, centred (transductive) | - | - | - | 5.0 | - |"]
    assert spread([1.0, 2.0, 4.0]) == "2.3 ± 1.5" and spread([-0.04]) == "0.0" and spread([]) == "-"
    runs = [{"variant": "SRE-CLIP", "seed": seed, "numbers": {"prototypes": dict.fromkeys(animals.KEYS, 10.0),
                                                              "sre-clip": dict.fromkeys(animals.KEYS, value)}}
            for seed, value in enumerate((40.0, 44.0))]
    assert "| SRE-CLIP: sre-clip | 2 | 42.0 ± 2.8 |" in animals.table(runs)
    assert animals.table(runs).count("nearest prototype") == 1


def test_attribute_vectors_are_of_the_graph_s_classes(tmp_path):
    graph = load_graph(animals.SHIPPED / "awa2.json")
    names = list(reversed(graph.names[:graph.classes]))
    matrix = np.random.default_rng(0).uniform(-1, 100, (len(names), 7)).round(2)  # below 0: not known
    (tmp_path / "classes.txt").write_text("".join(
        f"{i:6}\t{name.replace(' ', '+')}\n" for i, name in enumerate(names, 1)))
    np.savetxt(tmp_path / "predicate-matrix-continuous.txt", matrix)
    vectors = read_vectors(animals.write_attributes(tmp_path, tmp_path / "vectors.txt"), graph).numpy()
    own = matrix[::-1].clip(0)
    np.testing.assert_allclose(vectors[:graph.classes], own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-4)


CHILD = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2])
folder.mkdir()

def save(*_):
    time.sleep(0.5)
    (folder / "last.pt").write_text("saved")
    sys.exit(130)

signal.signal(signal.SIGTERM, save)
(folder / "config.json").write_text('{"precision": "bf16"}')
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_stopped_training_may_save_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(CHILD)
    folder = tmp_path / "run"

    def stop():
        while not (folder / "config.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            real.train(["--run", str(folder)], 0, "My CPU")
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert (folder / "last.pt").read_text() == "saved"
    found = real.spent(folder)
    assert found["seconds"][0] > 0.5 > found["seconds"][1] > 0
    assert (found["machine"], found["precision"]) == ("My CPU", "bf16") and found["date"] == time.strftime("%Y-%m-%d")


def test_drawn_records_command_machine_and_spread(tmp_path, monkeypatch, capsys):
    rows = [{"method": name, "instance": {"zsl": None, "unseen": 0.5, "seen": 0.5, "h": h}}
            for name, h in (("zero-shot", 0.25), ("sre-clip", None))]
    numbers = drawn.read(rows)
    monkeypatch.setattr(drawn, "train", lambda name, seed, flags, runs: {
        "name": name, "seed": seed, "flags": flags, "seconds": 1.0, "numbers": numbers})
    file = tmp_path / "drawn.json"
    file.write_text('{"main": 1}')
    assert drawn.main(["--part", "sre", "--seeds", "0", "1", "--json", str(file), "--machine", "Xeon"]) == 0
    out = capsys.readouterr().out
    assert "| full | - | 50.0 ± 0.0 | 50.0 ± 0.0 | - | 25.0 ± 0.0 | - |" in out and "sample standard deviation" in out
    assert "n = 2" in out
    found = json.loads(file.read_text())
    assert found["main"] == 1 and found["sre"]["machine"] == "Xeon" and "n - 1" in found["sre"]["spread"]
    assert found["sre"]["command"] == "python -m ucdr_ref.bench.drawn --part sre --seeds 0 1 --json FILE"
    file.write_text("{")
    assert drawn.main(["--part", "sre", "--json", str(file)]) == 2 and file.read_text() == "{"
