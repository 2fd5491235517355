"""The short form of the kill test: one round of each kind, in a process that has not used PyTorch yet."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_three_rounds():
    done = subprocess.run([sys.executable, "-m", "tests.killtest", "--rounds", "3", "--seed", "1"], capture_output=True,
                          text=True, timeout=900, cwd=Path(__file__).resolve().parents[2],
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 rounds, all bit-identical" in done.stdout
