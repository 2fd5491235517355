"""What all measurements share: trainings, means over seeds, and command, machine and date in their JSON."""
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..cli import read_json, write_text_atomic
from ..experiments.experiment import versions

ROOT = Path(__file__).resolve().parents[2]


def train(folder: Path, flags: Sequence[str]) -> None:
    """An ordinary `python train.py` in the folder, unless it is finished; a stopped one goes on."""
    if not (folder / "results.json").exists():
        line = [sys.executable, str(ROOT / "train.py"), "--run", str(folder), *flags]
        if status := subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"{shlex.join(line)} ended with {status}; the same command goes on from there")


def spread(values: Sequence[float], show_n: bool = False) -> str:
    """Mean ± sample standard deviation (n - 1), with n where asked; the value itself where there is one."""
    mean = f"{round(statistics.mean(values), 1) + 0.0:.1f}"  # + 0.0: no "-0.0"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.1f}" + f" ({len(values)})" * show_n


def origin(command: str, machine: str) -> dict[str, Any]:
    return {"command": command, "machine": machine, "versions": versions(torch.device("cpu")),
            "date": time.strftime("%Y-%m-%d")}


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier call wrote, {} where there is nothing."""
    return read_json(path) if path.exists() else {}


def write_results(path: Path, found: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(found, indent=1) + "\n")
