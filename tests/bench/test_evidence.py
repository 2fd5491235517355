"""The commands that measure on real images: what they would run, what they read back, and zero-shot against open_clip's tower."""
from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_state_dict
from ucdr_ref.bench import animals, real
from ucdr_ref.config import Config, add_arguments, resolve
from ucdr_ref.sre.class_vectors import read_vectors
from ucdr_ref.sre.graph import load_graph

CLASSES = {"seen": ["cat", "dog", "cow"], "val_unseen": ["pig", "hen"], "unseen": ["bat", "bee", "fox", "owl"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for domain in ("photo", *real.DOMAINS):
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


def config(job: real.Job, subset: str) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = [*real.command(job.held_out, Path("data"), Path("w.pt")), "--seed", str(job.seed), *real.SETTINGS[subset],
             *real.VARIANTS[job.variant]]
    return resolve(vars(parser.parse_args(flags)))


def test_plan_covers_every_row_once():
    everything, cpu = real.plan("all"), real.plan("cpu")
    assert len(everything) == 3 * 4 * len(real.VARIANTS) and {job for job in cpu if job.seed < 3} < set(everything)
    assert all(len({job.name for job in jobs}) == len(jobs) for jobs in (everything, cpu))
    papers = {(job.held_out, job.seed) for job in cpu if job.variant == "paper"}
    assert papers == {*((domain, 0) for domain in real.DOMAINS), *(("sketch", seed) for seed in (1, 2, 3, 4))}
    assert {(job.held_out, job.seed) for job in cpu if job.variant != "paper"} == {("sketch", 0)}
    assert {job.variant for job in cpu} == set(real.VARIANTS)


@pytest.mark.parametrize("subset", real.SETTINGS)
def test_a_variant_changes_what_its_name_says(subset):
    paper = config(real.Job("sketch", "paper", 2), subset)
    assert (paper.held_out, paper.seen, paper.gallery, paper.seed) == ("sketch", "quickdraw", "photo", 2)
    assert (paper.mask, paper.feature_token, paper.class_features, paper.train_normalization) == ("own", 0, "prototypes", "clip")
    for variant, expected in {"released": {"mask": "none", "feature_token": 1, "selection": "test", "evaluation_features": "raw",
                                           "class_features": "prototypes", "target_epochs": paper.target_epochs},
                              "no mask": {"mask": "none"}, "feature token 1": {"feature_token": 1},
                              "phase 1 only": {"target_epochs": 0}}.items():
        found = config(real.Job("sketch", variant, 2), subset)
        assert {name: getattr(found, name) for name in expected} == expected, variant
        if variant != "released":
            assert {name for name in vars(paper) if getattr(found, name) != getattr(paper, name)} == set(expected), variant


def test_rows_without_training_equal_open_clip_and_encode_once(images, tower, tmp_path, capsys, monkeypatch):
    pytest.importorskip("open_clip")
    flags = ["--data", str(images), "--weights", str(tower), "--out", str(tmp_path), "--subset", "all", "--variants",
             "--held-out", "icon", "--workers", "0", "--machine", "My CPU"]
    real.main([*flags, "--check-open-clip", "icon"])
    found = json.loads((tmp_path / "real-my-cpu.json").read_text())
    assert len(found["frozen"]) == 2 * 3 * 2 and {row["inversion"] for row in found["frozen"]} == {"strokes", "none"}
    first = found["frozen"][0]
    assert (first["method"], first["transductive"], first["lambda"]) == ("zero-shot", False, None)
    assert first["unseen"]["mAP@all"] == pytest.approx(found["open_clip"]["icon"]["open_clip"], abs=1e-3)
    assert 0 < first["mixed"]["mAP@all"] <= first["unseen"]["mAP@all"] < 100
    assert all(row["lambda"] in (0.3, 1, 3, 10) for row in found["frozen"] if row["method"].endswith("closed form"))
    assert str(images) not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    capsys.readouterr()
    monkeypatch.setattr("ucdr_ref.images.features.Extractor.stream", lambda *_: pytest.fail("encoded a second time"))
    real.main([*flags, "--precision", "fp32"])  # which is this subset's own
    assert f"| zero-shot | - | - | - | {first['unseen']['mAP@all']:.1f} | - |" in capsys.readouterr().out
    again = json.loads((tmp_path / "real-my-cpu.json").read_text())
    assert again["settings"] == found["settings"] + " --precision fp32"
    assert [(row["method"], row["unseen"], row["mixed"]) for row in again["frozen"]] == [
        (row["method"], row["unseen"], row["mixed"]) for row in found["frozen"]]


def test_table_holds_means_over_seeds_and_domains():
    def row(domain, method, value, seed=0, transductive=False):
        numbers = {"mAP@all": value}
        return {"held_out": domain, "method": method, "transductive": transductive, "seed": seed, "unseen": numbers}

    rows = [row(domain, "zero-shot", 10.0 * k) for k, domain in enumerate(real.DOMAINS, 1)]
    rows += [row("sketch", "ucdr-adapter", value, seed) for seed, value in enumerate((35.0, 41.0))]
    rows += [row("icon", "zero-shot", 5.0, transductive=True)]
    lines = real.table(rows, "unseen").splitlines()[2:]
    assert lines[0] == "| zero-shot | 10.0 | 20.0 | 30.0 | 40.0 | 25.0 |"
    assert lines[1] == f"| UCDR-Adapter | 38.0 ± {statistics.pstdev([35, 41]):.1f} | - | - | - | - |"
    assert lines[2] == "| zero-shot, centred (transductive) | - | - | - | 5.0 | - |"


def test_attribute_vectors_of_classes_and_ancestors(tmp_path):
    graph = load_graph(animals.SHIPPED / "awa2.json")
    names = list(reversed(graph.names[:graph.classes]))
    matrix = np.random.default_rng(0).uniform(0, 100, (len(names), 7)).round(2)
    matrix[3, 2] = -1  # not known
    lines = (f"{i:6}\t{name.replace(' ', '+')}\n" for i, name in enumerate(names, 1))
    (tmp_path / "classes.txt").write_text("".join(lines))
    np.savetxt(tmp_path / "predicate-matrix-continuous.txt", matrix)
    vectors = read_vectors(animals.write_attributes(tmp_path, tmp_path / "out" / "vectors.txt"), graph).numpy()
    own = matrix[::-1].clip(0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[:graph.classes], own, atol=1e-4)
    children = {node: {child for child, parent in graph.edges if parent == node} for node in range(len(graph.ids))}

    def below(node: int) -> set[int]:
        return ({node} if node < graph.classes else set()).union(*map(below, children[node]))

    for node in range(graph.classes, len(graph.ids)):
        mean = own[sorted(below(node))].mean(0)
        np.testing.assert_allclose(vectors[node], mean / np.linalg.norm(mean), atol=1e-4)


def test_animals_table_names_each_method_once():
    def run(variant, seed, methods):
        numbers = {name: dict.fromkeys(animals.KEYS, value) for name, value in methods.items()}
        return {"variant": variant, "seed": seed, "numbers": numbers}

    lines = animals.table([run("SRE-CLIP", 0, {"prototypes": 10.0, "sre-clip": 40.0}),
                           run("SRE-CLIP", 1, {"prototypes": 10.0, "sre-clip": 44.0}),
                           run("ridge", 0, {"prototypes": 10.0, "closed-form": 60.0})]).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| nearest prototype", "| SRE-CLIP: sre-clip", "| ridge: closed-form"]
    assert "| 2 | 42.0 ± 2.0 |" in lines[1]
