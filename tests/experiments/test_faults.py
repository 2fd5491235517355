"""Full disks, folders that cannot be written, kills between two files, signals at odd moments; and what a run folder records."""
from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import evaluate
import retrieve
import train
from tests.helpers import LONGER, files_of_at_most, flags, logged, refused, same_runs
from ucdr_ref.clip.weights import file_digest
from ucdr_ref.config import from_dict
from ucdr_ref.experiments import classification as sre_evaluation
from ucdr_ref.experiments import experiment
from ucdr_ref.experiments import retrieval as evaluation
from ucdr_ref.machine.files import load_state
from ucdr_ref.training import journal as resume
from ucdr_ref.ucdr.adapter import UCDRAdapter

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and capabilities are Linux's")


def saving(world: Path, run: Path, *more: str) -> list[str]:
    """A short run that saves often."""
    return flags(world, run, *LONGER, "--target-epochs", "1", *more)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(saving(world, run)) == 0
    return run


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in `folder` can be made or changed, by root neither: it gives up its power over permissions meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = struct.pack("Ii", 0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        pytest.skip("capabilities cannot be read here")
    before = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, sets)
    os.chmod(folder, 0o555)
    try:
        with pytest.raises(PermissionError):
            (folder / "probe").touch()
        yield
    finally:
        os.chmod(folder, 0o755)
        sets[0] = before
        libc.capset(header, sets)


@contextmanager
def step_does(monkeypatch: pytest.MonkeyPatch, number: int, act) -> Iterator[None]:
    """`act` runs in training step `number`, from 1."""
    calls = 0

    def step(self, batch, phase, original=UCDRAdapter.step):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(self, batch, phase)

    with monkeypatch.context() as patch:
        patch.setattr(UCDRAdapter, "step", step)
        yield


def die() -> None:
    raise SystemError("killed")


def cut_after(world: Path, run: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with step_does(monkeypatch, step, die), pytest.raises(SystemError):
        train.main(saving(world, run))


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(world, tmp_path, finished, monkeypatch, capsys):
    run = tmp_path / "run"
    cut_after(world, run, 6, monkeypatch)
    before = (run / "last.pt").read_bytes()
    capsys.readouterr()
    with files_of_at_most(len(before) // 2):
        refused(capsys, train.main(saving(world, run)), f"could not write {run / 'last.pt'}", "File too large", "untouched")
    assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*.tmp"))
    assert train.main(saving(world, run)) == 0
    same_runs(run, finished)


def test_a_log_line_that_does_not_fit_is_written_again(world, tmp_path, finished, monkeypatch, capsys):
    run, limits = tmp_path / "run", []

    def fill() -> None:
        context = files_of_at_most((run / "log.jsonl").stat().st_size + 40)  # room for a part of the line
        limits.append(context)
        context.__enter__()

    with step_does(monkeypatch, 6, fill):
        code = train.main(saving(world, run))
    limits[0].__exit__(None, None, None)
    refused(capsys, code, f"could not write {run / 'log.jsonl'}", "run the same command")
    assert train.main(saving(world, run)) == 0
    same_runs(run, finished)


def test_a_full_file_system(world, tmp_path, finished, monkeypatch, capsys):
    """A real one, of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = disk / "run"
        cut_after(world, run, 6, monkeypatch)
        before = (run / "last.pt").read_bytes()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - len(before) // 2))
        capsys.readouterr()
        refused(capsys, train.main(saving(world, run)), "could not write", "No space left on device")
        assert (run / "last.pt").read_bytes() == before
        (disk / "filler").unlink()
        assert train.main(saving(world, run)) == 0
        same_runs(run, finished)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_cannot_be_written(world, tmp_path, finished, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    photos, query = str(world / "data" / "photo"), str(world / "data" / "photo" / "shape_3" / "0.png")
    look = ["--run", str(run), "--gallery", photos, "--query", query, "--workers", "0"]
    with read_only(run):
        refused(capsys, train.main(saving(world, run)), f"could not write {run / 'config.json'}", "Permission denied")
        refused(capsys, train.main(saving(world, run / "new")), str(run / "new"), "Permission denied")
        refused(capsys, evaluate.main(["--run", str(run), "--workers", "0"]), f"could not write {run / 'results.json'}")
        refused(capsys, retrieve.main(look), f"could not write the index in {run / 'index'}", "choose another folder")
        cache = ["--cache", str(tmp_path / "cache")]
        refused(capsys, retrieve.main([*look, *cache, "--out", str(run / "sheet.png")]), f"could not write {run / 'sheet.png'}")
        refused(capsys, retrieve.main([*look, *cache, "--export", str(run / "x.npy")]), f"could not write {run / 'x.npy'}")
        assert retrieve.main([*look, *cache, "--out", str(tmp_path / "sheet.png")]) == 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("name", ["results.json", "per_class.csv", "queries.png"])
def test_tables_that_do_not_fit_leave_the_old_ones(finished, tmp_path, monkeypatch, capsys, name):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / name).read_bytes()
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    refused(capsys, evaluate.main(["--run", str(tmp_path / "run"), "--workers", "0"]), name, "No space left on device")
    assert (tmp_path / "run" / name).read_bytes() == before and not list((tmp_path / "run").glob(".*.tmp"))


def test_index_sheet_and_vectors_that_do_not_fit(world, finished, tmp_path, capsys):
    photos, query = str(world / "data" / "photo"), str(world / "data" / "photo" / "shape_3" / "0.png")
    look = ["--run", str(finished), "--gallery", photos, "--query", query, "--workers", "0", "--cache", str(tmp_path / "cache")]
    with files_of_at_most(1000):
        refused(capsys, retrieve.main(look), "could not write the index", "File too large")
    assert not list((tmp_path / "cache").iterdir())
    assert retrieve.main(look) == 0
    sheet, vectors = tmp_path / "sheet.png", tmp_path / "x.npy"
    sheet.write_bytes(b"old")
    capsys.readouterr()
    with files_of_at_most(1000):
        refused(capsys, retrieve.main([*look, "--out", str(sheet)]), f"could not write {sheet}")
        refused(capsys, retrieve.main([*look, "--export", str(vectors)]), f"could not write {vectors}")
    assert sheet.read_bytes() == b"old" and not vectors.exists()


def test_drawn_data_that_does_not_fit(world, tmp_path, capsys):
    call = ["--run", str(tmp_path / "run"), "--data-root", str(tmp_path / "toy"), "--toy-images", "1", "--weights",
            str(world / "clip.pt")]
    with files_of_at_most(100):
        refused(capsys, train.main(call), str(tmp_path / "toy"), "File too large")
    assert not list(tmp_path.iterdir())


def test_kills_between_the_first_files(world, tmp_path, finished):
    """A folder with a half-written file alone, and one with the config alone, are begun runs."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.4711.tmp").write_text('{"meth')
    assert train.main(saving(world, run)) == 0
    for path in run.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert train.main(saving(world, run)) == 0
    same_runs(run, finished)


def test_a_log_or_record_that_was_tampered_with(world, tmp_path, finished, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    size = (run / "log.jsonl").stat().st_size
    (run / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes()[:-30])
    refused(capsys, train.main(saving(world, run)), f"holds {size - 30} bytes", str(size), "log.jsonl")
    for name in ("run.json", "config.json"):
        for content in ("{", "[1]", "7", "[" * 100_000, "\udcff"):
            (run / name).write_bytes(content.encode(errors="surrogateescape"))
            refused(capsys, train.main(saving(world, run)), str(run / name), "delete that folder")
        shutil.copy(finished / name, run / name)


def test_a_resumed_optimizer_must_fit(finished, tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Adam([weight], lr=0.5)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = "hostile"
    fresh = torch.optim.Adam([weight], lr=0.25)
    resume.load_optimizer(fresh, state, tmp_path)
    assert fresh.param_groups[0]["lr"] == 0.25 and torch.equal(fresh.state[weight]["exp_avg"], torch.full((3, 2), 0.1))
    moments = state["state"][0]
    for wrong in ({**moments, "exp_avg": torch.zeros(2, 3)}, {**moments, "exp_avg": None}, {"step": moments["step"]},
                  {**moments, "step": torch.tensor(-1.0)}, {**moments, "exp_avg_sq": torch.full((3, 2), float("nan"))}, [], None):
        with pytest.raises(ValueError, match="does not fit the 1 parameters"):
            resume.load_optimizer(fresh, {"state": {0: wrong}}, tmp_path)
    for wrong in ({7: moments}, {"0": moments}, [moments], None):
        with pytest.raises(ValueError, match="does not fit the 1 parameters"):
            resume.load_optimizer(fresh, {"state": wrong}, tmp_path)


def test_a_signal_in_the_validation_stops_after_it(world, tmp_path, finished, monkeypatch, capsys):
    score = evaluation.validation_score

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "validation_score", interrupted)
        assert train.main(saving(world, tmp_path / "run")) == 130
    assert "stopped by SIGTERM in phase target" in capsys.readouterr().err.splitlines()[-1]
    assert train.main(saving(world, tmp_path / "run")) == 0
    same_runs(tmp_path / "run", finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_evaluation_is_one_line(world, tmp_path, finished, monkeypatch, capsys, number):
    shutil.copytree(finished, tmp_path / "run")

    def interrupted(*arguments, **options):
        signal.raise_signal(number)

    monkeypatch.setattr(experiment, "evaluate", interrupted)
    assert train.main(saving(world, tmp_path / "run")) == 130
    assert capsys.readouterr().err == f"stopped by {number.name}: run the same command to go on\n"


def test_test_scores_of_a_killed_run_count_once(tmp_path, monkeypatch):
    """The note of an evaluation that the last checkpoint does not know of is replaced, not kept beside the new one (S6)."""
    scores = iter([{"instance": {"h": value}} for value in (0.1, 0.2, 0.3, 0.4)])
    monkeypatch.setattr(sre_evaluation, "predict", lambda *_: None)
    monkeypatch.setattr(sre_evaluation, "accuracies", lambda *_: next(scores))

    class Method:
        unseen_ids, class_names = torch.tensor([0]), ["a"]

    class Target:
        labels = None

        def __len__(self) -> int:
            return 0

    found = []
    for known in (0, 1, 1, 2):  # killed after the second evaluation
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + '{"validation_mAP": 0}\n' * known)
        sre_evaluation.test_score(Method(), Target(), None, tmp_path)
        found.append([json.loads(line)["instance"]["h"] for line in (tmp_path / sre_evaluation.SCORES).read_text().splitlines()])
    assert found == [[0.1], [0.1, 0.2], [0.1, 0.3], [0.1, 0.3, 0.4]]


def test_the_audit_trail(world, finished):
    config = json.loads((finished / "config.json").read_text())
    about = json.loads((finished / "run.json").read_text())
    assert from_dict(config)== from_dict(load_state(finished / "best.pt")["config"])
    assert isinstance(about["command"], list) and about["weights_sha256"] == file_digest(world / "clip.pt")
    assert {"ucdr_ref", "python", "torch", "torchvision", "pillow", "machine", "gpu"} <= set(about["versions"])
    assert {"train", "validation query", "UCDR query", "UCDR gallery unseen", "UCDR gallery mixed"} <= set(about["files"])
    assert all(len(digest) == 64 for digest in about["files"].values())
    lines = logged(finished)
    steps = [(line["phase"], line["epoch"], line["step"]) for line in lines if "step" in line]
    assert len(set(steps)) == len(steps) and {phase for phase, *_ in steps} == {"source", "target"}
    for line in lines:
        if "step" in line:
            terms = {"source": {"align", "triplet"}, "target": {"align"}}[line["phase"]]
            assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    results = json.loads((finished / "results.json").read_text())
    assert from_dict(results["config"]) == from_dict(config) and len(results["rows"]) == 12
    assert results["versions"]["torch"] == about["versions"]["torch"]


def test_another_class_list_is_refused_unless_told_otherwise(world, tmp_path, capsys):
    moved = tmp_path / "world"
    shutil.copytree(world, moved)
    assert train.main(saving(moved, tmp_path / "run", "--target-epochs", "0")) == 0
    split = json.loads((moved / "split.json").read_text())
    gone = split["train"].pop()
    (moved / "split.json").write_text(json.dumps(split))
    call = ["--run", str(tmp_path / "run"), "--workers", "0", "--out", str(tmp_path / "out")]
    refused(capsys, evaluate.main(call), "not those that", "train", "--other-data")
    assert not (tmp_path / "out").exists()
    assert evaluate.main([*call, "--other-data"]) == 0 and (tmp_path / "out" / "results.json").exists()
    split["train"] = split["train"][::-1] + [gone]
    (moved / "split.json").write_text(json.dumps(split))
    refused(capsys, evaluate.main(call), "train")


def test_two_trainings_never_share_a_run_folder(world, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    code = "import sys, pathlib, ucdr_ref.experiments.run_folder as r; held = r.lock(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=Path(train.__file__).parent, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        refused(capsys, train.main(saving(world, run)), f"another process is training in {run}")
        assert [path.name for path in run.iterdir()] == [".lock"]
        holder.kill()
    assert train.main(saving(world, run)) == 0
