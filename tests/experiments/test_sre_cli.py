"""SRE-CLIP through the entry points: from folders to tables, and one sentence for every mistake."""
from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import evaluate
import retrieve
import train
from tests.helpers import equal, logged, refused, tiny_state_dict
from ucdr_ref.clip.weights import load_clip
from ucdr_ref.clip.zero_shot import preprocess
from ucdr_ref.experiments import class_folders as sre_data
from ucdr_ref.experiments import classification as sre_evaluation
from ucdr_ref.experiments.class_folders import Features
from ucdr_ref.images.batches import open_image
from ucdr_ref.machine.files import load_state
from ucdr_ref.sre.adapter import SRECLIP
from ucdr_ref.sre.graph import Graph, save_graph

NAMES = [f"shape {k}" for k in range(3, 11)]
UNSEEN = [1, 6]
SMALL = ["--sre-hidden", "16", "--sre-warmup", "20", "--workers", "0", "--device", "cpu",
         "--stroke-domains", "sketch"]


@pytest.fixture(scope="module")
def scene(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `photo` (seen classes) and `sketch` (all), a class graph and the unseen names."""
    root = tmp_path_factory.mktemp("scene")
    shutil.copytree(world / "data" / "sketch", root / "sketch")
    shutil.copytree(world / "data" / "photo", root / "photo", ignore=shutil.ignore_patterns("shape_4", "shape_9"))
    ids = [f"n{k:08d}" for k in range(10)]
    edges = [(k, 8 + k % 2) for k in range(8)] + [(8, 9)]
    nodes = [*NAMES, "even", "odd"]
    save_graph(Graph(ids, nodes, [[name] for name in nodes], edges, 8, "notice"), root / "graph.json")
    (root / "unseen.txt").write_text("Shape_4\nshape 9\n")
    shutil.copy(world / "clip.pt", root / "clip.pt")
    return root


def flags(scene: Path, run: Path, *more: str) -> list[str]:
    paths = dict(source="photo", target="sketch", graph="graph.json", unseen="unseen.txt", weights="clip.pt")
    given = [part for flag, name in paths.items() for part in (f"--{flag}", str(scene / name))]
    return ["--method", "sre-clip", *given, "--run", str(run), "--sre-iterations", "130", *SMALL, *more]


@pytest.fixture(scope="module")
def run(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(flags(scene, folder)) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / "best.pt")["method"]


def test_a_run_trains_and_leaves_a_small_complete_checkpoint(run):
    steps = logged(run)
    assert len(steps) == 130 and steps[-1]["ce"] < steps[0]["ce"]
    for i in (0, 19, 20, 129):
        source = steps[i]["ce"] + 100 * steps[i]["structure"] + 0.01 * steps[i]["retention"]
        target = 3 * steps[i]["entropy"] + 5 * steps[i]["diversity"] + 5 * steps[i]["bias"]
        assert steps[i]["loss"] == pytest.approx(source if i < 20 else target + 1.5 * source, rel=1e-4)
    state = load_state(run / "best.pt")
    assert state["unseen_ids"] == UNSEEN and state["class_names"] == NAMES and state["graph"]["notice"] == "notice"
    assert not any(name.startswith("clip.") or "adjacency" in name for name in state["method"])


def test_evaluate_needs_neither_graph_nor_source(run, scene, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copytree(scene / "sketch", moved / "sketch")
    shutil.copytree(run, moved / "run")
    state = load_state(moved / "run" / "best.pt")
    state["config"] = {**state["config"], "graph": "gone.json", "unseen": "gone.txt", "source": ["gone"], "target": "gone"}
    torch.save(state, moved / "run" / "best.pt")
    assert evaluate.main(["--run", str(moved / "run"), "--target", str(moved / "sketch"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for word in ("ZSL", "unseen", "seen", "H", "instance", "class", "zero-shot", "sre-clip", "48, 8"):
        assert word in printed
    ours, theirs = (json.loads((folder / "results.json").read_text())["rows"] for folder in (tmp_path / "out", run))
    assert ours == theirs and [row["method"] for row in ours] == ["zero-shot", "sre-clip"]
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert picture.width > picture.height
    rows = [row for row in csv.DictReader((tmp_path / "out" / "per_class.csv").open()) if row["method"] == "sre-clip"]
    assert [row["class"] for row in rows] == NAMES and sum(int(row["images"]) for row in rows) == 48
    for split in ("seen", "unseen"):
        values = [float(row["accuracy"]) for row in rows if row["split"] == split]
        assert sum(values) / len(values) == pytest.approx(ours[1]["class"][split], abs=1e-6)
    zsl = [float(row["accuracy_among_unseen"]) for row in rows if row["split"] == "unseen"]
    assert sum(zsl) / 2 == pytest.approx(ours[1]["class"]["zsl"], abs=1e-6)


def test_zero_shot_row_equals_a_separate_computation(run, scene):
    from ucdr_ref.clip.zero_shot import class_text_features
    clip = load_clip(scene / "clip.pt")
    text = class_text_features(clip, NAMES)
    hits = {True: [], False: []}
    for k, name in enumerate(NAMES):
        for path in sorted((scene / "sketch" / name.replace(" ", "_")).iterdir()):
            image = Image.eval(open_image(str(path)), lambda value: 255 - value)
            f = F.normalize(clip.encode_image(preprocess(32)(image)[None]), dim=1)
            hits[k in UNSEEN].append(int((f @ text.T).argmax()) == k)
    row = json.loads((run / "results.json").read_text())["rows"][0]
    for key, unseen in (("unseen", True), ("seen", False)):
        assert row["instance"][key] == pytest.approx(sum(hits[unseen]) / len(hits[unseen]))


def test_retrieve_works_on_a_run(run, scene, capsys):
    query = str(scene / "photo" / "shape_5" / "1.png")
    call = ["--run", str(run), "--gallery", str(scene / "photo"), "--query", query, "--k", "2", "--workers", "0", "--json"]
    assert retrieve.main(call) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["queries"][0]["results"][0]["path"] == query and answer["images"] == 36


@pytest.mark.parametrize("report", ["last", "best-test"])
def test_an_interrupted_run_ends_in_the_same_weights(scene, tmp_path, monkeypatch, report):
    more = ["--sre-report", report, "--sre-iterations", "250" if report == "best-test" else "130"]
    call = flags(scene, tmp_path / "cut", "--save-every", "30", *more)
    step = SRECLIP.step
    for stop in (47, 118):
        def failing(self, batch, phase, stop=stop):
            if batch.iteration == stop:
                raise ValueError("power cut")
            return step(self, batch, phase)

        monkeypatch.setattr(SRECLIP, "step", failing)
        assert train.main(call) == 2
    monkeypatch.setattr(SRECLIP, "step", step)
    assert train.main(call) == 0
    whole = flags(scene, tmp_path / "whole", *more)
    assert train.main(whole) == 0
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("cut", "whole")]
    assert rows[0] == rows[1]
    if report == "best-test":
        lines = [json.loads(line) for line in (tmp_path / "whole" / sre_evaluation.SCORES).read_text().splitlines()]
        best = rows[1][2]
        assert best["method"] == "best-test" and best["evaluations"] == len(lines) == 2
        assert best["class"]["seen"] == max(line["class"]["seen"] for line in lines)


def test_target_labels_do_not_reach_the_weights(run, scene, tmp_path, monkeypatch):
    features = sre_data.features

    def shuffled(folders: list, *args: Any) -> Features:
        found = features(folders, *args)
        return replace(found, labels=found.labels.flip(0)) if folders[0].root.endswith("sketch") else found

    monkeypatch.setattr(sre_data, "features", shuffled)
    monkeypatch.setattr(sre_evaluation, "features", shuffled)
    assert train.main(flags(scene, tmp_path / "run")) == 0
    assert equal(weights(tmp_path / "run"), weights(run))
    ours, theirs = (json.loads((folder / "results.json").read_text())["rows"][1] for folder in (tmp_path / "run", run))
    assert ours != theirs


def test_ablations_are_one_flag_each(scene, tmp_path):
    for flag in ("--sre-structure", "--sre-retention", "--sre-entropy"):
        folder = tmp_path / flag
        assert train.main(flags(scene, folder, "--sre-iterations", "30", flag, "0")) == 0
        step, on = logged(folder)[25], {name: float(flag != name) for name in ("--sre-structure", "--sre-retention", "--sre-entropy")}
        source = (step["ce"] + 100 * on["--sre-structure"] * step["structure"]
                  + 0.01 * on["--sre-retention"] * step["retention"])
        assert step["source"] == pytest.approx(source, rel=1e-5)
        target = 3 * on["--sre-entropy"] * step["entropy"] + 5 * step["diversity"] + 5 * step["bias"]
        assert step["loss"] == pytest.approx(target + 1.5 * source, rel=1e-5)


def test_image_tower_alone_with_a_file_of_class_vectors(scene, tmp_path, capsys):
    tower = {key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    call = flags(scene, tmp_path / "run", "--weights", str(tmp_path / "tower.pt"), "--sre-iterations", "5")
    refused(capsys, train.main(call), "image tower alone")
    torch.manual_seed(0)
    rows = torch.randn(10, 6).tolist()
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("".join(f"n{k:08d} {' '.join(map(str, row))}\n" for k, row in enumerate(rows)))
    call += ["--class-vectors", str(vectors)]
    assert train.main(call) == 0
    assert "prototypes" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert rows[0]["method"] == "prototypes" and rows[0]["instance"]["zsl"] is None and rows[0]["instance"]["unseen"] == 0
    assert_close(weights(tmp_path / "run")["class_vectors"].norm(dim=1), torch.ones(10))


def test_dry_run_counts_and_writes_nothing(scene, tmp_path, capsys):
    assert train.main(flags(scene, tmp_path / "dry", "--dry-run")) == 0
    text = capsys.readouterr().out
    for part in ('"method": "sre-clip"', "8 classes (2 unseen), 10 nodes, 9 edges", "36 images, 6 classes", "48 images, 8 classes",
                 "phase sre: 2,384 trainable parameters"):  # 3 (32 16 + 16) + 32 16 + 16 + 16 16 + 16
        assert part in text, part
    assert not (tmp_path / "dry").exists()


def test_mistakes_are_one_sentence(scene, tmp_path, capsys):
    def run_with(*more: str) -> int:
        return train.main(flags(scene, tmp_path / "none", *more))

    def written(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    graph = json.loads((scene / "graph.json").read_text())
    equal = written("equal.txt", "".join(f"n{k:08d} {k % 2 + 1} 1\n" for k in range(10)))
    short = written("short.txt", "".join(f"n{k:08d} {k + 1} 1\n" for k in range(8)))
    refused(capsys, run_with("--unseen", written("a.txt", "lion\n")), "lion")
    refused(capsys, run_with("--unseen", written("b.txt", "# none\n")), "lists no class")
    refused(capsys, run_with("--unseen", str(tmp_path / "absent")), "absent")
    refused(capsys, run_with("--graph", str(tmp_path / "absent.json")), "absent.json", "ucdr_ref.sre.wordnet")
    refused(capsys, run_with("--graph", written("g.json", json.dumps({**graph, "classes": 4}))), "shape 9")
    refused(capsys, run_with("--graph", "awa2", "--unseen", ""), "no folder bears the name of a seen class; there are shape_10,")
    refused(capsys, run_with("--target", str(tmp_path / "absent")), "--target", "no such folder")
    refused(capsys, run_with("--target", ""), "give --source DIR")
    refused(capsys, run_with("--dataset", "toy", "--preset", "sre/toy"), "--dataset toy draws its own images; leave --source")
    refused(capsys, run_with("--class-vectors", equal), "'shape 3' and 'shape 5' have identical vectors")
    refused(capsys, run_with("--class-vectors", short), "without a class vector: even, odd")
    refused(capsys, run_with("--weights", str(tmp_path / "absent.pt")), "absent.pt")
    assert not (tmp_path / "none").exists()


def test_another_config_or_graph_does_not_resume_a_run(run, scene, tmp_path, capsys):
    refused(capsys, train.main(flags(scene, run, "--sre-kappa", "0.5")), "sre_kappa: 0.3 -> 0.5")
    moved = tmp_path / "scene"
    shutil.copytree(scene, moved)
    call = flags(moved, tmp_path / "run", "--sre-iterations", "3")
    assert train.main(call) == 0
    graph = json.loads((moved / "graph.json").read_text())
    (moved / "graph.json").write_text(json.dumps({**graph, "edges": graph["edges"][:-1]}))
    refused(capsys, train.main(call), "class graph")
