"""The kill test and the interrupts of readers, in processes that have not used PyTorch yet: short, and whole."""
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(module: str, rounds: int) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--rounds", str(rounds), "--seed", "1"], capture_output=True, text=True,
                          timeout=3600, cwd=Path(__file__).resolve().parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("rounds", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_trainings_end_as_one_that_was_not(rounds):
    assert f"{rounds} rounds, all bit-identical" in run("tests.killtest", rounds)


@pytest.mark.skipif(sys.platform != "linux", reason="workers follow their parent on Linux alone")
@pytest.mark.parametrize("rounds", [4, pytest.param(36, marks=pytest.mark.slow)])
def test_workers_end_with_their_parent(rounds):
    assert f"{rounds} rounds, no process left" in run("tests.interrupts", rounds)
