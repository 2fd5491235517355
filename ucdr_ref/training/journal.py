"""What a run that is started again takes from `last.pt` and `log.jsonl`, checked before it is used."""
from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..clip.tensorfile import regular_file, show
from ..machine import processes as distributed
from ..machine.files import WriteError, load_state
from ..machine.processes import is_main, memory_gib

ADVICE = "delete it to start again, or name another --run"


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimizer, all that a resumed run needs."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    best: float = -1.0  # validation mAP
    stale: int = 0  # epochs since the best
    log_bytes: int = 0


def read_last(path: Path, phases: int) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    """Weights, progress and the optimizer's state of a `last.pt`; ValueError in one sentence when it is no such file."""
    state = load_state(path)
    found = state.get("progress")
    known = {field.name: type(field.default) for field in fields(Progress)}
    if not (isinstance(found, dict) and found.keys() == known.keys() and all(type(found[name]) is known[name] for name in known)
            and all(0 <= value < 2**53 for name, value in found.items() if name != "best") and found["phase"] < phases
            and math.isfinite(found["best"])):
        raise ValueError(f"{show(path)}: its progress is {str(found)[:200]!r}, not where a run of {phases} phases can stand; "
                         f"{ADVICE}")
    if not (isinstance(state.get("method"), dict) and isinstance(state.get("optimizer"), dict)):
        raise ValueError(f"{show(path)} lacks the weights or the optimizer's state; {ADVICE}")
    return state["method"], Progress(**found), state["optimizer"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Takes over the moments that `state` holds for each parameter; rates and other settings stay the config's.

    Raises ValueError unless every parameter's moments are what this optimizer keeps for one of its shape.
    """
    probe = nn.Parameter(torch.zeros(2))
    trial = type(optimizer)([probe], **optimizer.defaults)
    probe.grad = torch.zeros(2)
    trial.step()
    expected = trial.state[probe]
    own = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = state.get("state")

    def fits(value: Any, like: Tensor, parameter: nn.Parameter) -> bool:
        shape = parameter.shape if like.shape == probe.shape else like.shape
        if not (isinstance(value, Tensor) and value.shape == shape and value.dtype == like.dtype):
            return False
        return bool(value.isfinite().all()) and (like.shape == probe.shape or bool((value >= 0).all()))

    sound = isinstance(moments, dict) and all(
        type(index) is int and 0 <= index < len(parameters) and isinstance(entry, dict) and entry.keys() == expected.keys()
        and all(fits(entry[name], expected[name], parameters[index]) for name in expected) for index, entry in moments.items())
    if not sound:
        raise ValueError(f"{show(path)}: the optimizer's state does not fit the {len(parameters)} parameters that are trained; "
                         f"{ADVICE}")
    optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})


@contextmanager
def open_log(path: Path, size: int) -> Iterator[BinaryIO]:
    """The log, cut to the `size` that the last checkpoint knows of: later steps are done, and written, again.

    Not buffered: a line is in the file once `record` returns. Raises ValueError when the file is shorter, WriteError when it
    cannot be written.
    """
    if not is_main():
        yield io.BytesIO()
        return
    found = regular_file(path).stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(f"{show(path)} holds {found} bytes, but last.pt beside it knows of {size}: bring the log back, or "
                         "delete that folder to start anew")
    try:
        log = open(path, "ab", buffering=0)
        log.truncate(size)
    except OSError as error:
        raise unwritten(path, error) from error
    with log:
        yield log  # type: ignore[misc]


def record(log: BinaryIO, progress: Progress, values: dict[str, Any]) -> None:
    """Appends one line of JSON."""
    line = (json.dumps(values) + "\n").encode()
    try:
        if log.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise unwritten(Path(log.name), error) from error
    progress.log_bytes += len(line)


def sync(log: BinaryIO) -> None:
    """To the disk, before a checkpoint that knows the log's length."""
    if isinstance(log, io.FileIO):
        os.fsync(log.fileno())


def unwritten(path: Path, error: OSError) -> WriteError:
    return WriteError(f"could not write {show(path)} ({error.strerror or error}); the last checkpoint is intact: free space, "
                      "then run the same command to go on")


class ProgressLine:
    """`target 2/10 | 120/480 | loss 1.234 align 0.98 | 812 img/s | 9.1 GiB | eta 3m12s` on stderr, at most twice a second."""

    def __init__(self, phase: str, epochs: int) -> None:
        self.phase, self.epochs = phase, epochs
        self.start, self.images, self.steps, self.shown = 0.0, 0, 0, 0.0
        self.live = sys.stderr.isatty()
        self.out = sys.stderr if distributed.is_main() else io.StringIO()

    def show(self, progress: Progress, steps: int, images: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if not self.start:  # the first step pays for start-up: it counts for nothing
            self.start = now
            return
        self.images, self.steps = self.images + images, self.steps + 1
        if now - self.shown < (0.5 if self.live else 15) and progress.step < steps:
            return
        self.shown, seconds = now, now - self.start
        left = int((steps * (self.epochs - progress.epoch) - progress.step) * seconds / self.steps)
        self.write(f"{self.phase} {progress.epoch + 1}/{self.epochs} | {progress.step}/{steps} | "
                   + " ".join(f"{name} {value:.3f}" for name, value in values.items())
                   + f" | {self.images / seconds:.0f} img/s | {memory_gib():.1f} GiB | eta {left // 60}m{left % 60:02d}s")

    def write(self, text: str) -> None:
        self.out.write(f"\r{text:<110}" if self.live else text + "\n")
        self.out.flush()

    def end(self, text: str = "") -> None:
        if self.live:
            self.out.write("\n")
        if text:
            print(text, file=self.out, flush=True)
