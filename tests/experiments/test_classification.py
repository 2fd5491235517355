"""SRE-CLIP from folders to a table: training, resuming, evaluation elsewhere, and clear refusals."""
import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import evaluate
import retrieve
import train
from tests.helpers import equal, logged, refused, results, tiny_state_dict
from ucdr_ref.cli import load_state
from ucdr_ref.clip.weights import load_clip
from ucdr_ref.clip.zero_shot import class_text_features, preprocess
from ucdr_ref.data.images import open_image
from ucdr_ref.experiments import classification
from ucdr_ref.sre import adapter as sre_adapter
from ucdr_ref.sre.adapter import SRECLIP
from ucdr_ref.sre.graph import Graph, save_graph

NAMES = [f"shape {k}" for k in range(3, 11)]
UNSEEN = [1, 6]


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
    """A short training; features are kept beside the run."""
    paths = dict(source="photo", target="sketch", graph="graph.json", unseen="unseen.txt", weights="clip.pt")
    given = [part for flag, name in paths.items() for part in (f"--{flag}", str(scene / name))]
    return ["--method", "sre-clip", *given, "--run", str(run), "--cache", str(run.parent / "cache"), "--sre-iterations", "50",
            "--sre-hidden", "16", "--sre-warmup", "20", "--workers", "0", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def run(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(flags(scene, folder)) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / "best.pt")["method"]


def losses(step: dict, off: tuple[str, ...] = ()) -> tuple[float, float]:
    """Of a logged step, from its terms: in the warm-up, and after it."""
    weights = {"structure": 100, "retention": 0.01, "entropy": 3, "diversity": 5, "bias": 5} | dict.fromkeys(off, 0)
    terms = {name: weight * step[name] for name, weight in weights.items()}
    source = step["ce"] + terms["structure"] + terms["retention"]
    return source, 1.5 * source + terms["entropy"] + terms["diversity"] + terms["bias"]


def test_a_run_trains_and_leaves_a_small_complete_checkpoint(run):
    steps = logged(run)
    assert len(steps) == 50 and steps[-1]["ce"] < steps[0]["ce"]
    for i in (0, 19, 20, 49):
        assert steps[i]["loss"] == pytest.approx(losses(steps[i])[i >= 20], rel=1e-4)
    state = load_state(run / "best.pt")
    assert state["unseen_ids"] == UNSEEN and state["graph"]["names"][:8] == NAMES and state["graph"]["notice"] == "notice"
    assert not any(name.startswith("clip.") or "adjacency" in name for name in state["method"])


def test_ablations_are_a_flag_each(scene, tmp_path):
    for off in (("structure", "entropy", "bias"), ("retention", "diversity")):
        given = [part for name in off for part in (f"--sre-{name}", "0")]
        assert train.main(flags(scene, tmp_path / off[0], "--sre-iterations", "22", *given)) == 0
        step = logged(tmp_path / off[0])[21]
        assert step["loss"] == pytest.approx(losses(step, off)[1], rel=1e-5, abs=1e-6) and all(step[name] for name in off)


def test_evaluate_needs_neither_graph_nor_source(run, scene, tmp_path):
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    shutil.copytree(scene / "sketch", moved / "sketch")
    state = load_state(run / "best.pt")
    state["config"] |= {"graph": "gone.json", "unseen": "gone.txt", "source": ["gone"], "target": "gone"}
    torch.save(state, tmp_path / "best.pt")
    shutil.copy(tmp_path / "best.pt", moved / "best.pt")
    assert evaluate.main(["--run", str(moved), "--target", str(moved / "sketch"), "--cache", str(tmp_path / "cache"), "--workers", "0"]) == 0
    found, lines = results(moved), list(csv.DictReader((moved / "per_class.csv").open()))
    assert "48 target images of 8 classes" in found["table"] and max(map(len, found["table"].splitlines())) <= 80
    ours = found["rows"]
    assert ours == results(run)["rows"] and [row["method"] for row in ours] == ["zero-shot", "sre-clip"]
    lines = [line for line in lines if line["method"] == "sre-clip"]
    assert [line["class"] for line in lines] == NAMES and sum(int(line["images"]) for line in lines) == 48
    for split in ("seen", "unseen"):
        values = [float(line["accuracy"]) for line in lines if line["split"] == split]
        assert sum(values) / len(values) == pytest.approx(ours[1]["class"][split], abs=1e-6)
        assert f"{100 * ours[1]['class'][split]:.2f}" in found["table"]


def test_zero_shot_row_equals_a_separate_computation(run, scene):
    clip = load_clip(scene / "clip.pt")
    text = class_text_features(clip, NAMES)
    hits = {True: [], False: []}
    for k, name in enumerate(NAMES):
        for path in sorted((scene / "sketch" / name.replace(" ", "_")).iterdir()):
            f = F.normalize(clip.encode_image(preprocess(32)(open_image(str(path)))[None]), dim=1)
            hits[k in UNSEEN].append(int((f @ text.T).argmax()) == k)
    for key, unseen in (("unseen", True), ("seen", False)):
        assert results(run)["rows"][0]["instance"][key] == pytest.approx(sum(hits[unseen]) / len(hits[unseen]))


def test_retrieve_works_on_a_run(run, scene, tmp_path, capsys):
    query = str(scene / "photo" / "shape_5" / "1.png")
    for k in range(3):  # dark strokes on white, which this run has not inverted either
        shutil.copy(scene / "sketch" / "shape_5" / f"{k}.png", tmp_path)
    for gallery, images in ((scene / "photo", 36), (tmp_path, 3)):
        assert retrieve.main(["--run", str(run), "--gallery", str(gallery), "--query", query, "--workers", "0", "--cache",
                              str(tmp_path / "cache"), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["images"] == images and answer["inverted"] == 0
        assert images == 3 or answer["queries"][0]["results"][0]["path"] == query


def test_another_method_s_checkpoint_is_refused(run, scene, tmp_path, capsys):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    state = load_state(copied / "last.pt")
    state["config"]["seed"], _ = 9, state.pop("evaluations")
    torch.save(state, copied / "last.pt")
    (copied / "results.json").unlink()
    refused(capsys, train.main(flags(scene, copied)), "last.pt is of a run with another config")


def test_an_interrupted_run_ends_in_the_same_weights(scene, tmp_path, monkeypatch):
    """S6: with evaluations after 10 and 20 iterations."""
    for module in (classification, sre_adapter):
        monkeypatch.setattr(module, "EPOCH", 10)
    more, step = ["--sre-report", "best-test", "--sre-iterations", "25", "--sre-warmup", "5"], SRECLIP.step
    for stop in (7, 18, None):
        def failing(self, batch, phase, stop=stop):
            if batch.iteration == stop:
                raise ValueError("power cut")
            return step(self, batch, phase)

        monkeypatch.setattr(SRECLIP, "step", failing)
        assert train.main(flags(scene, tmp_path / "cut", *more)) == (2 if stop else 0)
    assert train.main(flags(scene, tmp_path / "whole", *more)) == 0
    rows, evaluations = results(tmp_path / "whole")["rows"], load_state(tmp_path / "whole" / "last.pt")["evaluations"]
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole")) and results(tmp_path / "cut")["rows"] == rows
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert rows[2]["method"] == "best-test" and rows[2]["evaluations"] == len(evaluations) == 2
    assert rows[2]["class"]["seen"] == max(found["class"]["seen"] for found in evaluations)


def test_target_labels_do_not_reach_the_weights_and_features_are_shared(run, scene, tmp_path, monkeypatch):
    load = classification.features_of

    def shuffled(folders, *more):
        found = load(folders, *more)
        return found._replace(labels=found.labels.flip(0)) if folders[0].root.endswith("sketch") else found

    monkeypatch.setattr(classification, "features_of", shuffled)
    monkeypatch.setattr("ucdr_ref.data.images.open_image", lambda *_: pytest.fail("encoded a second time"))
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    assert train.main(flags(scene, tmp_path / "run")) == 0
    assert equal(weights(tmp_path / "run"), weights(run)) and results(tmp_path / "run")["rows"][1] != results(run)["rows"][1]


def test_image_tower_alone_with_a_file_of_class_vectors(scene, tmp_path, capsys):
    tower = {key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    call = flags(scene, tmp_path / "run", "--weights", str(tmp_path / "tower.pt"), "--sre-iterations", "5")
    refused(capsys, train.main(call), "image tower alone")
    torch.manual_seed(0)
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("".join(f"n{k:08d} {' '.join(map(str, row))}\n" for k, row in enumerate(torch.randn(10, 6).tolist())))
    assert train.main([*call, "--class-vectors", str(vectors)]) == 0
    assert [row["method"] for row in results(tmp_path / "run")["rows"]] == ["sre-clip"]
    assert_close(weights(tmp_path / "run")["class_vectors"].norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("released", [False, True])
def test_test_batches(released):
    """S2: every row once; released, images of unseen and of seen classes never pass together."""
    labels = torch.arange(2000) % 7
    parts = sre_adapter.test_batches(labels, [2, 5], released, 256)
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(2000))
    assert max(map(len, parts)) == (512 if released else 256)
    mixed = [len(torch.isin(labels[part], torch.tensor([2, 5])).unique()) for part in parts]
    assert set(mixed) == ({1} if released else {2})


def test_dry_run_counts_and_lists_what_is_left_out(scene, tmp_path, capsys):
    shutil.copytree(scene / "sketch", tmp_path / "all")
    assert train.main(flags(scene, tmp_path / "dry", "--source", str(tmp_path / "all"), "--dry-run")) == 0
    text = capsys.readouterr().out
    for part in ('"method": "sre-clip"', "8 classes (2 unseen), 10 nodes, 9 edges", "36 images, 6 classes", "48 images, 8 classes",
                 "not used, being of no seen class: shape_4, shape_9",
                 "phase sre: 50 steps", "2,384 trainable parameters"):  # 3 (32 16 + 16) + 32 16 + 16 + 16 16 + 16
        assert part in text, part
    assert not (tmp_path / "dry").exists()


def test_mistakes_are_one_sentence(scene, tmp_path, capsys):
    def run_with(*more: str) -> int:
        return train.main(flags(scene, tmp_path / "none", *more))

    def written(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    graph = json.loads((scene / "graph.json").read_text())
    equal_vectors = written("equal.txt", "".join(f"n{k:08d} {k % 2 + 1} 1\n" for k in range(10)))
    refused(capsys, run_with("--unseen", written("a.txt", "lion\n")), "lion")
    refused(capsys, run_with("--unseen", ""), "--unseen FILE", "--graph awa2")
    refused(capsys, run_with("--graph", str(tmp_path / "absent.json")), "absent.json", "ucdr_ref.sre.wordnet")
    twins = {**graph, "names": ["shape 4", *graph["names"][1:]]}
    refused(capsys, run_with("--graph", written("t.json", json.dumps(twins))), "shape 4 is none or several of the graph's classes")
    refused(capsys, run_with("--graph", "awa2", "--unseen", ""), "--source", "named after one of the 40 classes; there are shape_10")
    refused(capsys, run_with("--target", ""), "--source", "--target DIR")
    refused(capsys, run_with("--source", str(scene / "sketch")), f"--target {scene / 'sketch'} is a --source too")
    refused(capsys, run_with("--class-vectors", equal_vectors), "'shape 3' and 'shape 5' have identical vectors")
    assert not (tmp_path / "none").exists()


def test_another_config_or_graph_does_not_resume_a_run(run, scene, tmp_path, capsys):
    refused(capsys, train.main(flags(scene, run, "--sre-kappa", "0.5")), "sre_kappa: 0.3 -> 0.5")
    graph = json.loads((scene / "graph.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**graph, "edges": graph["edges"][:-1]}))
    refused(capsys, train.main(flags(scene, run, "--graph", str(tmp_path / "other.json"))), "other images than the run's (graph: ")
