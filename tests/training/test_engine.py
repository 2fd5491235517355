"""The loop: a run that is interrupted anywhere ends as one that was not, and says what stopped it."""
from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import train as entry
from tests.helpers import LONGER, equal, flags, logged, same_runs
from ucdr_ref.machine.files import load_state
from ucdr_ref.training import journal
from ucdr_ref.ucdr.adapter import UCDRAdapter


def long_flags(world: Path, run: Path, *more: str) -> list[str]:
    return flags(world, run, *LONGER, *more)


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert entry.main(long_flags(world, run)) == 0
    return run


def test_a_run_leaves_what_was_promised(uninterrupted: Path):
    names = {path.name for path in uninterrupted.iterdir() if path.name != ".lock"}
    assert names == {"config.json", "run.json", "files.json.gz", "log.jsonl", "last.pt", "best.pt", "results.json",
                     "per_class.csv", "per_query.csv", "queries.png", "report.html"}
    about = json.loads((uninterrupted / "run.json").read_text())
    assert {"command", "versions", "weights_sha256", "files"} <= set(about)
    lines = logged(uninterrupted)
    assert [line["phase"] for line in lines if "step" in line].count("source") > 2
    assert all({"loss", "align"} <= set(line) for line in lines if "step" in line)
    assert len([line for line in lines if "validation_mAP" in line]) == 3
    best = max(line["validation_mAP"] for line in lines if "validation_mAP" in line)
    assert load_state(uninterrupted / "last.pt")["progress"]["best"] == best


@pytest.mark.parametrize("dies_at", [1, 3, 4, 8, 14, 19])
def test_resumed_equals_uninterrupted(world, tmp_path, uninterrupted, monkeypatch, dies_at):
    """The process dies, without any chance to save, in step `dies_at`; the same command goes on."""
    calls = 0

    def dying(self, batch, phase, step=UCDRAdapter.step):
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise SystemError("killed")
        return step(self, batch, phase)

    monkeypatch.setattr(UCDRAdapter, "step", dying)
    with pytest.raises(SystemError):
        entry.main(long_flags(world, tmp_path / "cut"))
    assert entry.main(long_flags(world, tmp_path / "cut")) == 0
    same_runs(tmp_path / "cut", uninterrupted)


def test_a_batch_in_parts_is_the_same_batch(world, tmp_path, uninterrupted, monkeypatch):
    """Parts of 3 images log what whole batches do, step by step, and resume to the last bit."""
    taken = []

    def counted(self, batch, phase, step=UCDRAdapter.step):
        taken.append((phase, len(batch.images)))
        if len(taken) == dies_at:
            raise SystemError("killed")
        return step(self, batch, phase)

    monkeypatch.setattr(UCDRAdapter, "step", counted)
    dies_at = 0
    assert entry.main(long_flags(world, tmp_path / "parts", "--micro-batch", "3")) == 0
    assert {size for phase, size in taken if phase == "target"} == {3, 2}
    assert {size for phase, size in taken if phase == "source"} == {6}
    logs = [logged(run) for run in (tmp_path / "parts", uninterrupted)]
    assert logs[0] == [pytest.approx(line, abs=1e-4) for line in logs[1]]
    taken, dies_at = [], len(taken) - 1  # between two parts
    with pytest.raises(SystemError):
        entry.main(long_flags(world, tmp_path / "cut", "--micro-batch", "3"))
    dies_at = 0
    assert entry.main(long_flags(world, tmp_path / "cut", "--micro-batch", "3")) == 0
    same_runs(tmp_path / "cut", tmp_path / "parts")


def test_dying_inside_a_checkpoint_leaves_the_last_one(world, tmp_path, uninterrupted, monkeypatch):
    saves = 0

    def dying(obj, path, save=journal.save_atomic):
        nonlocal saves
        saves += 1
        if saves == 3:
            (path.parent / (path.name + ".tmp")).write_bytes(b"half")
            raise SystemError("killed")
        save(obj, path)

    monkeypatch.setattr(journal, "save_atomic", dying)
    with pytest.raises(SystemError):
        entry.main(long_flags(world, tmp_path / "cut"))
    assert entry.main(long_flags(world, tmp_path / "cut")) == 0
    (tmp_path / "cut" / "last.pt.tmp").unlink(missing_ok=True)
    same_runs(tmp_path / "cut", uninterrupted)


def test_a_finished_run_is_not_trained_again(world, tmp_path, uninterrupted, monkeypatch):
    before = (uninterrupted / "last.pt").read_bytes()
    monkeypatch.setattr(UCDRAdapter, "step", None)
    assert entry.main(long_flags(world, uninterrupted)) == 0
    assert (uninterrupted / "last.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(world, tmp_path, uninterrupted, monkeypatch, capsys, number):
    calls = 0

    def interrupted(self, batch, phase, step=UCDRAdapter.step):
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(number)
        return step(self, batch, phase)

    monkeypatch.setattr(UCDRAdapter, "step", interrupted)
    assert entry.main(long_flags(world, tmp_path / "cut")) == 130
    assert f"stopped by {number.name} in phase" in capsys.readouterr().err.splitlines()[-1]
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 5
    assert entry.main(long_flags(world, tmp_path / "cut")) == 0
    same_runs(tmp_path / "cut", uninterrupted)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(world, tmp_path, monkeypatch, capsys):
    calls = 0

    def broken(self, batch, phase, step=UCDRAdapter.step):
        nonlocal calls
        calls += 1
        terms = step(self, batch, phase)
        return terms if calls != 7 else {**terms, "align": terms["align"] * float("nan"), "loss": terms["loss"] * float("inf")}

    monkeypatch.setattr(UCDRAdapter, "step", broken)
    run = tmp_path / "bad"
    assert entry.main(long_flags(world, run)) == 2
    assert "loss, align not finite in phase" in capsys.readouterr().err
    report = json.loads((run / "nonfinite.json").read_text())
    assert report["terms"] == ["loss", "align"] and all(Path(path).exists() for path in report["files"])
    assert all(torch.isfinite(value).all() for value in load_state(run / "last.pt")["method"].values())


def test_a_gradient_that_is_not_finite_stops_too(world, tmp_path, monkeypatch, capsys):
    def broken(self, batch, phase, step=UCDRAdapter.step):
        terms = step(self, batch, phase)
        terms["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return terms

    monkeypatch.setattr(UCDRAdapter, "step", broken)
    assert entry.main(long_flags(world, tmp_path / "bad")) == 2
    assert "gradient not finite" in capsys.readouterr().err


def test_early_stop_and_selection(world, tmp_path):
    run = tmp_path / "short"
    assert entry.main(long_flags(world, run, "--target-lr", "0", "--target-epochs", "9")) == 0
    lines = logged(run)
    assert len([line for line in lines if "validation_mAP" in line]) == 3  # the second and the third are no better
    run = tmp_path / "last"
    assert entry.main(long_flags(world, run, "--selection", "last")) == 0
    last, best = load_state(run / "last.pt"), load_state(run / "best.pt")
    assert equal(last["method"], best["method"])


def test_phase_one_alone(world, tmp_path):
    assert entry.main(long_flags(world, tmp_path / "one", "--target-epochs", "0")) == 0
    assert (tmp_path / "one" / "best.pt").exists()
