"""The short form of `tests.interrupts`: every kind of strike at every point once, in a process of its own."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="workers follow their parent on Linux alone")
def test_workers_end_with_their_parent_and_not_before():
    done = subprocess.run([sys.executable, "-m", "tests.interrupts", "--rounds", "18"], capture_output=True, text=True,
                          timeout=900, cwd=Path(__file__).resolve().parents[2],
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 rounds, no process left" in done.stdout
