"""The short form of the fuzz test, in a process of its own: it watches for foreign code and sets alarms."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs and alarms")
def test_some_hundred_cases():
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--images", "300", "--files", "120", "--seed", "7"], timeout=900,
                          cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "no crash, no hang, nothing executed" in done.stdout
