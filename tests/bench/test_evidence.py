"""The evidence command: what it would run, what it reads back, and zero-shot retrieval against open_clip's tower."""
from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tests.helpers import tiny_state_dict
from ucdr_ref.bench import real as evidence
from ucdr_ref.config import Config, resolve
from ucdr_ref.sre.class_vectors import read_vectors
from ucdr_ref.sre.graph import load_graph

CLASSES = {"seen": ["cat", "dog", "cow"], "val_unseen": ["pig"], "unseen": ["bat", "bee", "fox", "owl"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for domain in ("photo", *evidence.DOMAINS):
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


def config(job: evidence.Job, subset: str) -> Config:
    return resolve(vars(train.parse(evidence.command(job, subset, Path("data"), Path("w.pt"), Path("out")))))


def test_plan_covers_every_row_once():
    everything, cpu = evidence.plan("all"), evidence.plan("cpu")
    assert len(everything) == 3 * (4 * len(evidence.VARIANTS) - 2) and set(cpu) < set(everything)
    assert len({job.name for job in everything}) == len(everything)
    assert {job.held_out for job in cpu if job.variant == "zero-shot"} == set(evidence.DOMAINS)
    assert {job.held_out for job in cpu if job.variant == "paper"} == set(evidence.STROKES)


@pytest.mark.parametrize("subset", evidence.SETTINGS)
def test_a_variant_changes_what_its_name_says(subset):
    paper = config(evidence.Job("sketch", "paper", 2), subset)
    assert (paper.held_out, paper.seen, paper.gallery, paper.seed) == ("sketch", "quickdraw", "photo", 2)
    assert (paper.mask, paper.feature_token, paper.class_features, paper.train_normalization) == ("own", 0, "prototypes", "clip")
    for variant, expected in {"released": {"mask": "none", "feature_token": 1, "selection": "test", "evaluation_features": "raw",
                                           "class_features": "prototypes", "target_epochs": paper.target_epochs},
                              "no mask": {"mask": "none"}, "feature token 1": {"feature_token": 1},
                              "phase 1 only": {"target_epochs": 0}, "zero-shot": {"method": "zero-shot"},
                              "zero-shot, no inversion": {"method": "zero-shot", "stroke_domains": ("none",)}}.items():
        found = config(evidence.Job("sketch", variant, 2), subset)
        assert {name: getattr(found, name) for name in expected} == expected, variant
        if variant != "released":
            assert {name for name in vars(paper) if getattr(found, name) != getattr(paper, name)} == set(expected), variant


def test_zero_shot_equals_open_clip_and_is_not_run_twice(images, tower, tmp_path, capsys, monkeypatch):
    pytest.importorskip("open_clip")
    flags = ["--data", str(images), "--weights", str(tower), "--out", str(tmp_path), "--subset", "all", "--variants", "zero-shot",
             "--held-out", "icon", "--seeds", "0", "--workers", "0", "--machine", "My CPU"]
    evidence.main([*flags, "--check-open-clip", "icon"])
    found = json.loads((tmp_path / "evidence-my-cpu.json").read_text())
    [run] = found["runs"]
    assert (run["held_out"], run["variant"], run["unseen"]["queries"], run["unseen"]["gallery"]) == ("icon", "zero-shot", 12, 12)
    assert run["unseen"]["mAP@all"] == pytest.approx(found["open_clip"]["icon"]["open_clip"], abs=1e-3)
    assert 0 < run["mixed"]["mAP@all"] <= run["unseen"]["mAP@all"] < 100
    assert str(images) not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    capsys.readouterr()

    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started again"))
    evidence.main(flags)
    assert f"| icon | zero-shot | 1 | {run['unseen']['mAP@200']:.1f} |" in capsys.readouterr().out
    assert json.loads((tmp_path / "evidence-my-cpu.json").read_text()) == found


def test_table_holds_means_spreads_and_gains():
    def run(variant, seed, value):
        numbers = dict.fromkeys(evidence.METRICS, value)
        return {"held_out": "clipart", "variant": variant, "seed": seed, "unseen": numbers, "mixed": numbers}

    lines = evidence.table([run("zero-shot", 0, 30.0), run("zero-shot", 1, 30.0), run("paper", 0, 35.0), run("paper", 1, 41.0),
                            run("no mask", 1, 29.0)]).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["zero-shot", "paper", "no mask"]
    assert f"| 2 | 38.0 ± {statistics.pstdev([35, 41]):.1f} |" in lines[1] and lines[1].endswith("| +8.0 ± 3.0 |")
    assert "| 1 | 29.0 |" in lines[2] and lines[2].endswith("| -1.0 |")


def test_sources_of_seen_classes_alone(images, tmp_path):
    folders = evidence.link_sources(images, tmp_path)
    assert [Path(folder).name for folder in folders] == ["sketch", "quickdraw", "clipart"]
    for folder in map(Path, evidence.link_sources(images, tmp_path)):  # a second time changes nothing
        assert sorted(path.name for path in folder.iterdir()) == ["cat", "cow", "dog", "pig"]
        assert all(path.read_bytes() == (images / path.relative_to(tmp_path)).read_bytes() for path in folder.glob("*/*"))


def test_attribute_vectors_of_classes_and_ancestors(tmp_path):
    graph = load_graph(evidence.SHIPPED / "awa2.json")
    names = list(reversed(graph.names[:graph.classes]))
    matrix = np.random.default_rng(0).uniform(0, 100, (len(names), 7)).round(2)
    matrix[3, 2] = -1  # not known
    (tmp_path / "classes.txt").write_text("".join(f"{i:6}\t{name.replace(' ', '+')}\n" for i, name in enumerate(names, 1)))
    np.savetxt(tmp_path / "predicate-matrix-continuous.txt", matrix)
    vectors = read_vectors(evidence.write_attributes(tmp_path, tmp_path / "out" / "vectors.txt"), graph).numpy()
    own = matrix[::-1].clip(0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[:graph.classes], own, atol=1e-4)
    children = {node: {child for child, parent in graph.edges if parent == node} for node in range(len(graph.ids))}

    def below(node: int) -> set[int]:
        return ({node} if node < graph.classes else set()).union(*map(below, children[node]))  # a class may have classes below

    for node in range(graph.classes, len(graph.ids)):
        mean = own[sorted(below(node))].mean(0)
        np.testing.assert_allclose(vectors[node], mean / np.linalg.norm(mean), atol=1e-4)
