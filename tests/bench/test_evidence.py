"""The commands that measure on real images: what they would run, what they read back, and zero-shot against open_clip's tower."""
from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_state_dict
from ucdr_ref.bench import animals, drawn, frozen, real, speed, strokes
from ucdr_ref.config import Config, add_arguments, resolve
from ucdr_ref.machine.command import terminated
from ucdr_ref.sre.graph import load_graph, read_vectors

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
    flags = [*real.shared_flags(job.held_out, Path("data"), Path("w.pt")), "--seed", str(job.seed), *real.SETTINGS[subset],
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
    fit, fits = frozen.measured_form, []

    def fit_of_encoded(protocol, table):  # the clock runs: all that it reads has been encoded
        fits.append(table)
        validation = protocol.validation
        for files in (protocol.train, validation.query, *validation.galleries.values()):
            assert not set(files.paths) - set(table.rows)
        return fit(protocol, table)

    monkeypatch.setattr(frozen, "measured_form", fit_of_encoded)
    assert real.main([*flags, "--check-open-clip", "icon"]) == 0
    assert len(fits) == 2  # with and without inversion; the check needs none
    path = tmp_path / "all" / "real-my-cpu.json"  # apart from the other subset's runs
    found = json.loads(path.read_text())
    strokes, plain = (next(row for row in found["frozen"] if row["inversion"] == name) for name in ("strokes", "none"))
    twice = len(CLASSES["seen"] + CLASSES["val_unseen"]) * 3  # sketches, which both
    assert plain["encoded"] >= strokes["encoded"] + twice and {row["precision"] for row in found["frozen"]} == {"fp32"}
    assert [file.name for file in (tmp_path / "all").glob("*.pt")] == ["clip-fp32.pt"]
    assert len(found["frozen"]) == 2 * 3 * 2 and {row["inversion"] for row in found["frozen"]} == {"strokes", "none"}
    first = found["frozen"][0]
    assert (first["method"], first["transductive"], first["lambda"]) == ("zero-shot", False, None)
    assert first["unseen"]["mAP@all"] == pytest.approx(found["open_clip"]["icon"]["open_clip"], abs=1e-3)
    assert 0 < first["mixed"]["mAP@all"] <= first["unseen"]["mAP@all"] < 100
    assert all(row["lambda"] in (0.3, 1, 3, 10) for row in found["frozen"] if row["method"].endswith("closed form"))
    assert str(images) not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    capsys.readouterr()
    monkeypatch.setattr("ucdr_ref.images.features.Extractor.stream", lambda *_: pytest.fail("encoded a second time"))
    assert real.main([*flags, "--precision", "fp32"]) == 0  # which is this subset's own
    assert f"| zero-shot | - | - | - | {first['unseen']['mAP@all']:.1f} | - |" in capsys.readouterr().out
    again = json.loads(path.read_text())
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
    vectors = read_vectors(animals.write_attributes(tmp_path, tmp_path / "vectors.txt"), graph).numpy()
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
                           run("true share", 0, {"prototypes": 10.0, "ridge": 60.0})]).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| nearest prototype", "| SRE-CLIP: sre-clip", "| true share: ridge"]
    assert "| 2 | 42.0 ± 2.0 |" in lines[1]


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
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            real.train(["--run", str(folder)], 0, "My CPU")
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert (folder / "last.pt").read_text() == "saved"
    found = json.loads((folder / "seconds.json").read_text())
    assert found["seconds"][0] > 0.5 > found["seconds"][1] > 0 and "--workers" in found["command"]
    assert (found["machine"], found["precision"]) == ("My CPU", "bf16") and found["date"] == time.strftime("%Y-%m-%d")
    assert "command" not in real.spent(folder)  # which holds paths


def test_seconds_of_every_attempt_and_version(tmp_path, monkeypatch):
    monkeypatch.setattr(real.subprocess, "Popen", lambda *_, **__: argparse.Namespace(wait=lambda: 1))
    (tmp_path / "config.json").write_text('{"precision": "fp32"}')
    assert real.spent(tmp_path) == {"seconds": [None, None]}
    for before, after in ([100.0, None], "old"), ([100.0, 7.0], "old"), (None, "killed"):
        (tmp_path / "seconds.json").unlink(missing_ok=True)
        if after == "old":
            (tmp_path / "seconds.json").write_text(json.dumps(before))
            assert real.spent(tmp_path) == {"seconds": before}
        with pytest.raises(ValueError, match="goes on from there"):
            real.train(["--run", str(tmp_path)], 0, "x")
        for old, new in zip(before or [None, None], real.spent(tmp_path)["seconds"], strict=True):
            assert new is None if old is None else old <= new < old + 1
    (tmp_path / "results.json").write_text('{"rows": []}')
    (tmp_path / "seconds.json").unlink()
    assert animals.read(tmp_path, ridge=False) == {"seconds": [None, None], "numbers": {}}


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """`real` without images: a training leaves two files, rows hold who asked for them."""
    asked = []

    def train(flags, workers, machine):
        folder = Path(flags[1])
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text("{}")
        (folder / "seconds.json").write_text(json.dumps({"seconds": [2.0, 1.0], "machine": machine, "precision": "bf16",
                                                         "date": "2026-01-01", "command": flags}))

    def row(domain, seed=0, **more):
        return {"held_out": domain, "seed": seed, "method": "m", "transductive": False, "call": len(asked),
                "unseen": {"mAP@all": 1.0}, "mixed": {"mAP@all": 1.0}, **more}

    monkeypatch.setattr(real, "train", train)
    monkeypatch.setattr(frozen, "frozen_rows", lambda config, *_, **__: [row(config.held_out)])
    monkeypatch.setattr(frozen, "adapter_rows", lambda folder, device, form: [
        row(folder.name.split("-")[0], int(folder.name[-1]), form=form)])

    def call(*flags):
        asked.append(flags)
        assert real.main(["--data", str(tmp_path / "no"), "--weights", "w.pt", "--out", str(tmp_path / "out"), "--subset",
                          "cpu", "--machine", "Xeon 2", *flags]) == 0
        return json.loads((tmp_path / "out" / "real-xeon-2.json").read_text())

    return call


def test_a_partial_call_keeps_the_other_rows(counted, tmp_path):
    whole = counted()
    assert whole["command"] == "python -m ucdr_ref.bench.real --data DIR --weights FILE --out OUT --subset cpu"
    assert len(whole["frozen"]) == 8 and len(whole["trained"]) == len(real.plan("cpu"))
    first = whole["trained"][0]
    assert (first["seconds"], first["precision"], first["date"], first["machine"]) == ([2.0, 1.0], "bf16", "2026-01-01", "Xeon 2")
    assert str(tmp_path) not in json.dumps(whole)
    (tmp_path / "out" / "sketch-paper-3" / "results.json").unlink()  # of another machine
    part = counted("--held-out", "icon", "--variants", "no mask", "--precision", "fp32", "--closed-form", "--seeds", "0")
    assert part["command"].endswith("--subset cpu --precision fp32 --variants 'no mask' --held-out icon --seeds 0 --closed-form")
    for rows in ("frozen", "trained"):
        assert [{**row, "call": 0, "precision": 0} for row in part[rows]] == [
            {**row, "call": 0, "precision": 0} for row in whole[rows]]
    assert [row["call"] for row in part["frozen"]] == [1] * 6 + [2] * 2 and {row["call"] for row in part["trained"]} == {1}
    again = counted("--held-out", "icon", "--variants", "paper", "--closed-form", "icon")
    assert [row["held_out"] for row in again["trained"] if row["call"] == 3] == ["icon"]


def test_drawn_starts_nothing_after_a_failure(tmp_path, monkeypatch, capsys):
    started = []

    def run(line, **_):
        started.append(line)
        time.sleep(0.05)
        return subprocess.CompletedProcess(line, 2, "", "warning\nerror: the disk is full\n")

    monkeypatch.setattr(drawn.subprocess, "run", run)
    assert drawn.main(["--jobs", "1", "--runs", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert len(started) <= 2 and shown.count("\n") == 1 and "ended with 2 (error: the disk is full)" in shown


def test_drawn_records_command_and_machine_and_what_is_not_defined(tmp_path, monkeypatch, capsys):
    rows = [{"method": name, "instance": {"zsl": None, "unseen": 0.5, "seen": 0.5, "h": h}}
            for name, h in (("zero-shot", 0.25), ("sre-clip", None))]
    numbers = drawn.read(rows)
    assert numbers["zsl sre-clip"] is None and numbers["unseen sre-clip"] == 50
    monkeypatch.setattr(drawn, "train", lambda name, seed, flags, runs: {
        "name": name, "seed": seed, "flags": flags, "seconds": 1.0, "numbers": numbers})
    file = tmp_path / "drawn.json"
    file.write_text('{"main": 1}')
    assert drawn.main(["--part", "sre", "--seeds", "0", "--json", str(file), "--machine", "Xeon"]) == 0
    assert "| full | - | 50.0 | 50.0 | - | 25.0 | - |" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["main"] == 1 and found["sre"]["machine"] == "Xeon"
    assert found["sre"]["command"] == "python -m ucdr_ref.bench.drawn --part sre --seeds 0 --json FILE"
    file.write_text("{")
    assert drawn.main(["--part", "sre", "--json", str(file)]) == 2
    assert f"error: {file} does not hold" in capsys.readouterr().err and file.read_text() == "{"
    for flags, told in ((["--jobs", "0"], "--jobs is 0"), (["--json", str(tmp_path / "no" / "a.json")], "a folder that exists")):
        with pytest.raises(SystemExit, match="2"):
            drawn.main(flags)
        assert told in capsys.readouterr().err


def test_thinned_refuses_other_drawings(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "ROOT", tmp_path)
    (tmp_path / "data" / "toy" / "real").mkdir(parents=True)
    with pytest.raises(ValueError, match="something other than drawn data"):
        drawn.thinned()


def test_animals_train_every_variant_and_say_by_what(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(animals, "write_attributes", lambda data, path: str(path))
    monkeypatch.setattr(animals, "train", lambda flags, workers, machine: trained.append(Path(flags[1]).name))
    flags = ["--data", "DATA", "--weights", "w.pt", "--out", str(tmp_path), "--machine", "x"]
    assert animals.main(flags) == 0
    assert len(trained) == len(set(trained)) == 7 * 3
    assert animals.main([*flags, "--seeds", "1", "--variants", "true share"]) == 0
    assert trained[21:] == ["animals-true-share-1"]
    assert json.loads((tmp_path / "animals-x.json").read_text())["command"] == (
        "python -m ucdr_ref.bench.animals --data DIR --weights FILE --out OUT --variants 'true share' --seeds 1")
    with pytest.raises(SystemExit, match="2"):
        animals.main([*flags, "--seeds", "7"])
    assert "invalid choice: 7 (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("module", [animals, drawn, real, speed, strokes])
def test_usage_names_the_command(module, capsys):
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m {module.__name__} ")


def test_bad_folders_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    below = ["--weights", "w.pt", "--out", str(tmp_path / "file" / "out")]
    for module, flags in ((strokes, ["--data", str(tmp_path / "nowhere")]), (strokes, ["--data", str(tmp_path)]),
                          (real, ["--data", "x", *below]), (animals, ["--data", "x", *below]),
                          (animals, ["--data", str(tmp_path / "nowhere"), "--weights", "w.pt", "--out", str(tmp_path)])):
        assert module.main(flags) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and shown.count("\n") == 1 and str(tmp_path) in shown
