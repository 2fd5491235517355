"""What a run keeps of its training, in memory and in its folder, checked before it is used when the run is
started again.
"""
from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import sys
import threading
import time
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..clip.tensorfile import regular_file, show
from ..machine import processes
from ..machine.files import WriteError, in_place, load_state, save_atomic
from ..machine.options import Shared
from ..machine.processes import Stopped, is_main, memory_gib

ADVICE = "delete it to start again, or name another --run"


@dataclass(frozen=True)
class Run:
    """The folder a run writes into, how it trains, and what goes with its weights into every checkpoint."""

    folder: Path
    options: Shared
    device: torch.device
    extra: dict[str, Any]
    patience: int  # epochs without a better score before the last phase stops


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimizer, all that a resumed run needs."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    best: float = -1.0  # validation mAP
    stale: int = 0  # epochs since the best
    log_bytes: int = 0


class Stateful(typing.Protocol):
    """Anything with a module's state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


@contextmanager
def opened(run: Run, method: Stateful, phases: int) -> Iterator[Journal]:
    """The journal of a run, from where last.pt stands; the method takes over the weights in it."""
    progress, optimizer_state = Progress(), None
    last = run.folder / "last.pt"
    if last.exists():
        weights, progress, optimizer_state = read_last(last, phases)
        load_own_state(method, weights, last)
    with open_log(run.folder / "log.jsonl", progress.log_bytes) as log, stop_signals() as stopping:
        yield Journal(run, progress, optimizer_state, log, stopping)


@dataclass
class Journal:
    """How far a training is, its log, its checkpoints, and whether it was told to stop."""

    run: Run
    progress: Progress
    optimizer_state: dict[str, Any] | None  # of last.pt, until a phase has taken it
    log: BinaryIO
    stopping: list[int]  # signals received

    def resume(self, optimizer: torch.optim.Optimizer) -> None:
        """The interrupted phase's moments go into its optimizer."""
        if self.optimizer_state is not None:
            load_optimizer(optimizer, self.optimizer_state, self.run.folder / "last.pt")

    def next_phase(self, index: int) -> None:
        self.progress, self.optimizer_state = Progress(phase=index, log_bytes=self.progress.log_bytes), None

    def record(self, values: dict[str, Any]) -> None:
        """Appends one line of JSON to the log."""
        line = (json.dumps(values) + "\n").encode()
        try:
            if self.log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise unwritten(Path(self.log.name), error) from error
        self.progress.log_bytes += len(line)

    def save(self, method: Stateful, optimizer: torch.optim.Optimizer) -> None:
        """last.pt, after the log, whose length it knows, is on the disk."""
        if isinstance(self.log, io.FileIO):
            os.fsync(self.log.fileno())
        state = {"progress": asdict(self.progress), "method": own_state(method),
                 "optimizer": optimizer.state_dict()}
        save_atomic({**state, **self.run.extra}, self.run.folder / "last.pt")
        processes.wait()

    def keep_best(self, method: Stateful) -> None:
        """best.pt"""
        save_atomic({"method": own_state(method), **self.run.extra}, self.run.folder / "best.pt")

    def stop_wanted(self) -> bool:
        """Whether any process was told to stop."""
        return processes.any_of(bool(self.stopping))

    def stopped(self, phase: str) -> Stopped:
        reason = signal.Signals(self.stopping[0]).name if self.stopping else "another process"
        return Stopped(f"stopped by {reason} in phase {phase}, epoch {self.progress.epoch + 1}, step "
                       f"{self.progress.step}; "
                       "everything is saved: run the same command to go on")


def own_state(method: Stateful) -> dict[str, Tensor]:
    """The method's state without CLIP's frozen weights, which stay in their own file."""
    return {name: value for name, value in method.state_dict().items() if not name.startswith("clip.")}


def load_own_state(method: Stateful, state: dict[str, Tensor], path: Path) -> None:
    """Strict, in names and shapes; ValueError in one sentence."""
    expected = own_state(method)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ValueError(f"{path} holds something other than tensors by name; use another checkpoint")
    wrong = (sorted(set(expected).symmetric_difference(state))
             or [name for name in expected if expected[name].shape != state[name].shape])
    if wrong:
        name = wrong[0]
        raise Misfit(path, name,
                     *(list(part[name].shape) if name in part else None for part in (state, expected)))
    method.load_state_dict(state, strict=False)


class Misfit(ValueError):
    """A checkpoint of other weights, classes or domains."""

    def __init__(self, path: Path, name: str, there: list[int] | None, here: list[int] | None) -> None:
        super().__init__(f"{path} was trained with other weights, classes or domains: {name} is "
                         f"{shape(there)} there, "
                         f"{shape(here)} here; give the run's own --weights and --data-root")


def shape(size: list[int] | None) -> str:
    return "absent" if size is None else str(size)


def read_last(path: Path, phases: int) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    """Weights, progress and the optimizer's state of a `last.pt`; ValueError in one sentence when it is no
    such file.
    """
    state = load_state(path)
    found = state.get("progress")
    known = {field.name: type(field.default) for field in fields(Progress)}
    if not (isinstance(found, dict) and found.keys() == known.keys()
            and all(type(found[name]) is known[name] for name in known)
            and all(0 <= value < 2**53 for name, value in found.items()
                    if name != "best") and found["phase"] < phases
            and math.isfinite(found["best"])):
        raise ValueError(f"{show(path)}: its progress is {str(found)[:200]!r}, not where a run of {phases} "
                         f"phases can stand; "
                         f"{ADVICE}")
    if not (isinstance(state.get("method"), dict) and isinstance(state.get("optimizer"), dict)):
        raise ValueError(f"{show(path)} lacks the weights or the optimizer's state; {ADVICE}")
    return state["method"], Progress(**found), state["optimizer"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Takes over the moments that `state` holds for each parameter; rates and other settings stay the
    config's.

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
        and all(fits(entry[name], expected[name], parameters[index])
                for name in expected) for index, entry in moments.items())
    if not sound:
        raise ValueError(f"{show(path)}: the optimizer's state does not fit the {len(parameters)} parameters "
                         f"that are trained; "
                         f"{ADVICE}")
    optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})


@contextmanager
def open_log(path: Path, size: int) -> Iterator[BinaryIO]:
    """The log, cut to the `size` that the last checkpoint knows of: later steps are done, and written, again.

    Not buffered: a line is in the file once `record` returns. Raises ValueError when the file is shorter,
    WriteError when it cannot be written.
    """
    if not is_main():
        yield io.BytesIO()
        return
    found = regular_file(path).stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(f"{show(path)} holds {found} bytes, but last.pt beside it knows of {size}: bring "
                         f"the log back, or "
                         "delete that folder to start anew")
    try:
        log = open(path, "ab", buffering=0, opener=in_place)
        log.truncate(size)
    except OSError as error:
        raise unwritten(path, error) from error
    with log:
        yield log  # type: ignore[misc]


def unwritten(path: Path, error: OSError) -> WriteError:
    return WriteError(f"could not write {show(path)} ({error.strerror or error}); the last checkpoint is "
                      f"intact: free space, "
                      "then run the same command to go on")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list for as long as the block runs, so that a step can be finished
    first.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, lambda n, _: received.append(n))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressLine:
    """`target 2/10 | 120/480 | loss 1.234 align 0.98 | 812 img/s | 9.1 GiB | eta 3m12s` on stderr, at most
    twice a second.
    """

    def __init__(self, phase: str, epochs: int, device: torch.device) -> None:
        self.phase, self.epochs, self.device = phase, epochs, device
        self.start, self.images, self.steps, self.shown = 0.0, 0, 0, 0.0
        self.live = sys.stderr.isatty()
        self.out = sys.stderr if processes.is_main() else io.StringIO()

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
                   + f" | {self.images / seconds:.0f} img/s | {memory_gib(self.device):.1f} GiB | eta "
                     f"{left // 60}m{left % 60:02d}s")

    def write(self, text: str) -> None:
        self.out.write(f"\r{text:<110}" if self.live else text + "\n")
        self.out.flush()

    def end(self, text: str = "") -> None:
        if self.live:
            self.out.write("\n")
        if text:
            print(text, file=self.out, flush=True)
