"""What a measurement's JSON says of the command that made it, and where that may go."""
from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from ..experiments.run_folder import explained
from ..machine.command import place
from ..machine.files import write_text_atomic


def as_called(parser: argparse.ArgumentParser, args: argparse.Namespace, always: str, *names: str) -> str:
    """The command: the flags of `always`, where a word stands for a path, and those of `names` that differ
    from their defaults.
    """
    words = [*parser.prog.split(), *always.split()]
    for name in names:
        value = getattr(args, name)
        if value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def result_file(text: str) -> Path:
    """A flag's file, refused before anything is measured where it could not be written after."""
    path = place(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a folder that exists; make the "
                                         "folder, or name another file")
    return path


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier call wrote, {} where there is nothing."""
    if not path.exists():
        return {}
    with explained(path, "does not hold what an earlier call wrote", "move it away"):
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    return found


def write_results(path: Path, found: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(found, indent=1) + "\n")
