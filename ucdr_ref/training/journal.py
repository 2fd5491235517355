"""What a run keeps of its training, in memory and in its folder, checked before the run goes on."""
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..clip.weights import check_file
from ..machine import processes
from ..machine.files import in_place, load_state, save_atomic, writing
from ..machine.options import Shared
from ..machine.processes import Stopped, is_main, memory_gib

ADVICE = "delete it to start again, or name another --run"
INTACT = "the last checkpoint is intact: free space, then run the same command to go on"


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

    def next_phase(self) -> None:
        self.progress = Progress(self.progress.phase + 1, log_bytes=self.progress.log_bytes)
        self.optimizer_state = None

    def record(self, values: dict[str, Any]) -> None:
        """Appends one line of JSON to the log."""
        line = (json.dumps(values) + "\n").encode()
        with writing(str(self.run.folder / "log.jsonl"), INTACT):
            if self.log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.progress.log_bytes += len(line)

    def checkpoint(self, method: Stateful, optimizer: torch.optim.Optimizer, phase: str, due: bool) -> None:
        """Writes last.pt where it is due or a process was told to stop, and then raises Stopped."""
        stop = processes.gather([*self.stopping])  # the signals of all processes
        if due or stop:
            if isinstance(self.log, io.FileIO):  # first the log, whose length last.pt knows
                os.fsync(self.log.fileno())
            state = {"progress": asdict(self.progress), "method": own_state(method),
                     "optimizer": optimizer.state_dict()}
            save_atomic({**state, **self.run.extra}, self.run.folder / "last.pt")
            processes.wait()
        if stop:
            reason = signal.Signals(self.stopping[0]).name if self.stopping else "another process"
            raise Stopped(f"stopped by {reason} in phase {phase}, epoch {self.progress.epoch + 1}, step "
                          f"{self.progress.step}; all is saved: run the same command to go on")

    def keep_best(self, method: Stateful) -> None:
        save_atomic({"method": own_state(method), **self.run.extra}, self.run.folder / "best.pt")


def own_state(method: Stateful) -> dict[str, Tensor]:
    """The method's state without CLIP's frozen weights, which stay in their own file."""
    return {name: value for name, value in method.state_dict().items() if not name.startswith("clip.")}


def load_own_state(method: Stateful, state: dict[str, Tensor], path: Path) -> None:
    """Takes over what `own_state` gave; ValueError unless names and shapes are the method's."""
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ValueError(f"{path} holds something other than tensors by name; use another checkpoint")
    there, here = ({name: list(value.shape) for name, value in part.items()}
                   for part in (state, own_state(method)))
    wrong = sorted(there.keys() ^ here.keys()) or [name for name in here if there[name] != here[name]]
    if wrong:
        raise Misfit(path, wrong[0], there.get(wrong[0]), here.get(wrong[0]))
    method.load_state_dict(state, strict=False)


class Misfit(ValueError):
    """A checkpoint of other weights, classes or domains; a weight that is absent has the size None."""

    def __init__(self, path: Path, name: str, there: list[int] | None, here: list[int] | None) -> None:
        sizes = ["absent" if size is None else size for size in (there, here)]
        super().__init__(f"{path} was trained with other weights, classes or domains: {name} is {sizes[0]} "
                         f"there, {sizes[1]} here; give the run's own --weights and --data-root")


def read_last(path: Path, phases: int) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    """Weights, progress and the optimizer's state of a last.pt; ValueError when it is no such file."""
    def kinds(values: dict[str, Any]) -> dict[str, type]:
        return {name: type(value) for name, value in values.items()}

    state = load_state(path)
    found = state.get("progress")
    if not (isinstance(found, dict) and kinds(found) == kinds(asdict(Progress()))
            and all(0 <= value < 2**53 for name, value in found.items() if name != "best")
            and found["phase"] < phases and math.isfinite(found["best"])):
        raise ValueError(f"{path}: its progress is {str(found)[:200]!r}, not where a run of {phases} "
                         f"phases can stand; {ADVICE}")
    if not (isinstance(state.get("method"), dict) and isinstance(state.get("optimizer"), dict)):
        raise ValueError(f"{path} lacks the weights or the optimizer's state; {ADVICE}")
    return state["method"], Progress(**found), state["optimizer"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Takes over the moments in `state`; rates and other settings stay the config's.

    Raises ValueError unless they are what a step of this optimizer leaves for parameters of these shapes.
    """
    probes = [nn.Parameter(torch.zeros_like(parameter)) for group in optimizer.param_groups
              for parameter in group["params"]]
    for probe in probes:
        probe.grad = torch.zeros_like(probe)
    trial = type(optimizer)(probes, **optimizer.defaults)
    trial.step()
    expected = trial.state_dict()["state"]

    def kinds(moments: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (value.shape, value.dtype) for name, value in moments.items()}

    try:
        sound = all(kinds(moments) == kinds(expected[index]) and moments.get("step", 0) >= 0
                    and all(value.isfinite().all() for value in moments.values())
                    for index, moments in state["state"].items())
    except (AttributeError, KeyError, TypeError):  # no tensors by name and number
        sound = False
    if not sound:
        raise ValueError(f"{path}: the optimizer's state does not fit the {len(probes)} parameters "
                         f"that are trained; {ADVICE}")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


@contextmanager
def open_log(path: Path, size: int) -> Iterator[BinaryIO]:
    """The log, cut to the `size` that last.pt knows of: later steps are done, and written, again.

    Not buffered: a line is in the file once `record` returns. Raises ValueError for a shorter file.
    """
    if not is_main():
        yield io.BytesIO()
        return
    found = check_file(path).stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(f"{path} holds {found} bytes, but last.pt beside it knows of {size}: bring "
                         "the log back, or delete that folder to start anew")
    with writing(str(path), INTACT):
        log = open(path, "ab", buffering=0, opener=in_place)
        log.truncate(size)
    with log:
        yield log  # type: ignore[misc]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list while the block runs, so that a step can be finished first."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, lambda n, _: received.append(n))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except Stopped:
        if processes.world() > 1:  # torchrun sends SIGTERM once the first of them has ended: let all say why
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressLine:
    """On stderr, where that is a terminal twice a second, else every 15 seconds and at an epoch's end:

    `target 2/10 | 120/480 | loss 1.234 align 0.98 | 812 img/s | 9.1 GiB | eta 3m12s`
    """

    def __init__(self, phase: str, epochs: int, device: torch.device) -> None:
        self.phase, self.epochs, self.device = phase, epochs, device
        self.start, self.images, self.steps, self.shown = 0.0, 0, 0, 0.0
        self.live = sys.stderr.isatty()
        self.out = sys.stderr if is_main() else io.StringIO()

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
        terms = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        text = (f"{self.phase} {progress.epoch + 1}/{self.epochs} | {progress.step}/{steps} | {terms} | "
                f"{self.images / seconds:.0f} img/s | {memory_gib(self.device):.1f} GiB | "
                f"eta {left // 60}m{left % 60:02d}s")
        self.out.write(f"\r{text:<110}" if self.live else text + "\n")
        self.out.flush()

    def end(self, text: str = "") -> None:
        if self.live:
            self.out.write("\n")
        if text:
            print(text, file=self.out, flush=True)
