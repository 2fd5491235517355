"""What the tables and JSON files of all measurements have in common."""
from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..cli import as_value_error, folder_path, read_json, write_text_atomic
from ..experiments.experiment import versions

SPREAD = "mean ± sample standard deviation (n - 1) of n seeds; one value where n = 1"


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation, the one value there is, or a dash."""
    if not values:
        return "-"
    mean = f"{round(statistics.mean(values), 1) + 0.0:.1f}"  # + 0.0: no "-0.0"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def slug(text: str) -> str:
    """A name for a file or folder."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def parser_of(module: str, text: str | None) -> argparse.ArgumentParser:
    """`python -m module` with its docstring as help."""
    return argparse.ArgumentParser(prog=f"python -m {module}", description=text,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of measurements on images and weights at hand."""
    cores = os.cpu_count() or 1
    for flag in ("--data", "--weights", "--out"):
        parser.add_argument(flag, type=folder_path, required=True)
    parser.add_argument("--machine", default=f"cpu-{cores}cores")
    parser.add_argument("--workers", type=int, default=min(8, cores - 1), help="as in train.py")


def about(parser: argparse.ArgumentParser, args: argparse.Namespace, always: str,
          *names: str) -> dict[str, Any]:
    """What a JSON says of its making. The command has the flags of `always`, where a word stands for a path,
    and those of `names` that differ from their defaults.
    """
    words = [*parser.prog.split(), *always.split()]
    for name in names:
        value = getattr(args, name)
        if value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return {"command": shlex.join(words), "machine": args.machine, "date": time.strftime("%Y-%m-%d"),
            "versions": versions(torch.device("cpu")), "spread": SPREAD}


def result_file(text: str) -> Path:
    """A flag's file, refused before anything is measured where it could not be written after."""
    path = folder_path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a folder that exists; make the "
                                         "folder, or name another file")
    return path


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier call wrote, {} where there is nothing."""
    if not path.exists():
        return {}
    with as_value_error(path, "does not hold what an earlier call wrote", "move it away"):
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    return found


def write_results(path: Path, found: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(found, indent=1) + "\n")
