"""Two processes compute what one does, through a crash and a stop; no process outlives another."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import retrieve
import train
from tests.helpers import flags
from ucdr_ref.machine import processes as distributed
from ucdr_ref.machine.files import load_state
from ucdr_ref.ucdr.adapter import UCDRAdapter

ROOT = Path(__file__).resolve().parents[2]
# train.py, but process 1 sends itself the signal `number` in its `at`-th step.
DRIVER = """
import os, sys, time
import torch.distributed as dist
import train
from ucdr_ref.ucdr.adapter import UCDRAdapter
number, at = map(int, sys.argv[1:3])
step, calls = UCDRAdapter.step, []
def interrupted(self, batch, phase):
    calls.append(len(batch.images))
    os.write(2, f"\\nbatch {os.environ['RANK']} {len(batch.images)}\\n".encode())  # in one piece
    if number and len(calls) == at and os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)
    return step(self, batch, phase)
UCDRAdapter.step = interrupted
part = dist.destroy_process_group
def slowly():  # by then torchrun has seen the other one end, and sends SIGTERM to this one
    time.sleep(1 if os.environ["RANK"] == "1" else 0)
    part()
dist.destroy_process_group = slowly
code = train.main(sys.argv[3:])
sys.exit(code)
"""


def uneven(world: Path, run: Path, *more: str) -> list[str]:
    """The released grouping makes batches of 7, and last ones of 1, which two processes cannot halve."""
    return flags(world, run, "--source-batch", "7", "--target-batch", "7", "--target-epochs", "2", "--balance", "released",
                 "--triplet-mean", "paired", "--save-every", "2", "--eval-batch", "5", "--device", "cpu", *more)


def launch(driver: Path, number: int, at: int, arguments: list[str]) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           "--local-addr=127.0.0.1", "--", str(driver), str(number), str(at), *arguments],
                          capture_output=True, text=True, env=env, timeout=300)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_through_kill_and_stop(world, tmp_path, monkeypatch):
    assert train.main(uneven(world, tmp_path / "one")) == 0
    driver, two = tmp_path / "driver.py", tmp_path / "two"
    driver.write_text(DRIVER)

    killed = launch(driver, 9, 4, uneven(world, two))  # SIGKILL
    assert killed.returncode != 0 and "error: process 0 could not exchange with another one" in killed.stderr, killed.stderr  # it noticed by itself
    assert load_state(two / "last.pt")["progress"]["step"] == 2

    stopped = launch(driver, 15, 6, uneven(world, two))  # SIGTERM
    assert stopped.returncode != 0 and "stopped by another process in phase" in stopped.stderr, stopped.stderr
    assert "stopped by SIGTERM in phase" in stopped.stderr and len(log(two)) == 8
    # Batches of 7 and one of 1 as shares: even one that is empty changes nothing.
    for rank, sizes in (("0", [3, 3, 3, 0, 3, 3]), ("1", [4, 4, 4, 1, 4, 4])):
        assert [int(size) for size in re.findall(rf"batch {rank} (\d+)", stopped.stderr)] == sizes

    calls = []

    def interrupted(self, batch, phase, step=UCDRAdapter.step):
        calls.append(phase)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, phase)

    with monkeypatch.context() as patch:
        patch.setattr(UCDRAdapter, "step", interrupted)
        assert train.main(uneven(world, two)) == 130  # one process takes two steps
    assert len(log(two)) == 10

    finished = launch(driver, 0, 0, uneven(world, two, "--micro-batch", "2"))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("zero-shot ") == 3  # one of them speaks

    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_state(folder / name)["method"] for folder in (two, tmp_path / "one"))
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for ours, theirs in zip(log(two), log(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (two, tmp_path / "one")]
    assert rows[0] == [pytest.approx(row, abs=1e-5) for row in rows[1]]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_the_whole_in_order(monkeypatch, world):
    monkeypatch.setattr(distributed, "world", lambda: world)
    for count in (0, 1, 5, 21):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(distributed.share(list(range(count))))
        assert sum(shares, []) == list(range(count)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sre_clip_and_a_search_want_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert train.main(["--method", "sre-clip", "--run", str(tmp_path / "sre")]) == 2
    assert "without torchrun" in capsys.readouterr().err and not (tmp_path / "sre").exists()
    weights = str(ROOT / "weights" / "demo-clip.pt")
    assert retrieve.main(["--weights", weights, "--gallery", str(tmp_path), "--query", "a.png"]) == 2
    assert "a search needs one process" in capsys.readouterr().err
