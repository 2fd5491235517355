"""The short form of the fuzz test, in a process of its own: it watches for foreign code and sets alarms."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_some_dozen_cases():
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--cases", "80", "--seed", "7"], timeout=300,
                          cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "no traceback, no hang, nothing executed" in done.stdout
