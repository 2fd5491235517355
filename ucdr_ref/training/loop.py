"""The training loop.

All randomness of a step follows from (seed, phase, epoch, step), so a
run that is started again by the same command equals one that was never interrupted.
"""
from __future__ import annotations

import json
import math
import signal
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..clip.model import CLIP
from ..config import Config
from ..machine import processes as distributed
from ..machine.files import save_atomic, write_text_atomic
from ..machine.processes import Stopped, autocast, fold
from .journal import Progress, ProgressLine, load_optimizer, open_log, read_last, record, sync


@dataclass
class Feed:
    """What a phase iterates over. `load` yields (batch, its files) for the batches of an epoch's order that are left.

    `cut` gives what passes at once of a batch, to save memory, each with its share of the images. `validates` says
    after how many epochs a score is taken.
    """

    epochs: int
    order: Callable[[int], Sequence[Any]]
    load: Callable[[int, Sequence[Any]], Iterator[tuple[Any, list[str]]]]
    cut: Callable[[Any], list[tuple[Any, float]]] = lambda batch: [(batch, 1.0)]
    validates: Callable[[int], bool] = lambda epochs: True


@dataclass(frozen=True)
class Run:
    """The folder a run writes into, and what goes with its weights into every checkpoint."""

    folder: Path
    config: Config
    device: torch.device
    extra: dict[str, Any]


class Encoder(typing.Protocol):
    """What evaluation and retrieval need of a method."""

    clip: CLIP

    def encode(self, images: Tensor) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


class Method(Encoder, typing.Protocol):
    """What the loop needs of a method; any module with these will do."""

    PHASES: tuple[str, ...]

    def trainable(self, phase: str) -> dict[str, nn.Parameter]: ...
    def start(self, phase: str) -> None: ...
    def optimizer(self, phase: str) -> torch.optim.Optimizer: ...
    def learning_rate(self, phase: str, epoch: int, step: int) -> float: ...
    def step(self, batch: Any, phase: str) -> dict[str, Tensor]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def own_state(method: Encoder) -> dict[str, Tensor]:
    """The method's state without CLIP's frozen weights, which stay in their own file."""
    return {name: value for name, value in method.state_dict().items() if not name.startswith("clip.")}


def load_own_state(method: Encoder, state: dict[str, Tensor], path: Path) -> None:
    """Strict, in names and shapes; ValueError in one sentence."""
    expected = own_state(method)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ValueError(f"{path} holds something other than tensors by name; use another checkpoint")
    wrong = (sorted(set(expected).symmetric_difference(state))
             or [name for name in expected if expected[name].shape != state[name].shape])
    if wrong:
        name = wrong[0]
        raise Misfit(path, name, *(list(part[name].shape) if name in part else None for part in (state, expected)))
    method.load_state_dict(state, strict=False)


class Misfit(ValueError):
    """A checkpoint of other weights, classes or domains."""

    def __init__(self, path: Path, name: str, there: list[int] | None, here: list[int] | None) -> None:
        super().__init__(f"{path} was trained with other weights, classes or domains: {name} is {shape(there)} there, "
                         f"{shape(here)} here; give the run's own --weights and --data-root")


def shape(size: list[int] | None) -> str:
    return "absent" if size is None else str(size)


def train(method: Method, feeds: Mapping[str, Feed], validate: Callable[[], float] | None, run: Run) -> None:
    """All phases of a method, from where last.pt stands; leaves last.pt, best.pt and log.jsonl in the run folder.

    `validate` gives the mAP by which the last phase keeps its best epoch and stops early; None keeps the last.
    Raises Stopped after SIGINT or SIGTERM, ValueError at a non-finite loss.
    """
    progress, optimizer_state = Progress(), None
    last = run.folder / "last.pt"
    if last.exists():
        weights, progress, optimizer_state = read_last(last, len(method.PHASES))
        load_own_state(method, weights, last)
    with open_log(run.folder / "log.jsonl", progress.log_bytes) as log, stop_signals() as stopping:
        for index, phase in enumerate(method.PHASES):
            if index < progress.phase:
                continue
            selecting = validate if index == len(method.PHASES) - 1 else None
            fit(method, phase, feeds[phase], selecting, run, progress, optimizer_state, log, stopping)
            progress, optimizer_state = Progress(phase=index + 1, log_bytes=progress.log_bytes), None
    if validate is None or not feeds[method.PHASES[-1]].epochs:
        save_atomic({"method": own_state(method), **run.extra}, run.folder / "best.pt")


def fit(method: Method, phase: str, feed: Feed, validate: Callable[[], float] | None, run: Run, progress: Progress,
        optimizer_state: dict[str, Any] | None, log: BinaryIO, stopping: list[int]) -> None:
    """One phase: steps, checkpoints, validation after each epoch, early stop."""
    config = run.config
    method.start(phase)
    trained = thawed(method, phase)
    optimizer = method.optimizer(phase)
    if optimizer_state is not None:
        load_optimizer(optimizer, optimizer_state, run.folder / "last.pt")

    def save() -> None:
        sync(log)
        save_atomic({"progress": asdict(progress), "method": own_state(method), "optimizer": optimizer.state_dict(), **run.extra},
                    run.folder / "last.pt")
        distributed.wait()

    line = ProgressLine(phase, feed.epochs)
    while progress.epoch < feed.epochs and (validate is None or progress.stale < config.patience):
        order = feed.order(progress.epoch)
        for batch, files in feed.load(progress.epoch, order[progress.step:]):
            torch.manual_seed(fold(config.seed, phase, progress.epoch, progress.step))
            for group in optimizer.param_groups:
                group["lr"] = method.learning_rate(phase, progress.epoch, progress.step) * group.get("factor", 1.0)
            optimizer.zero_grad(set_to_none=True)
            sums: list[Tensor] = []
            for part, share in feed.cut(batch):
                with autocast(config.precision, run.device):
                    terms = method.step(part, phase)
                (share * terms["loss"]).backward()  # adds to the gradients of the parts before
                sums.append(share * torch.stack([term.detach().float() for term in terms.values()]))
            shown = torch.stack(sums).sum(0)
            gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
            distributed.average([*gradients, shown], weight=len(files))
            norm = torch.stack([gradient.norm() for gradient in gradients]).sum()
            *numbers, size = torch.cat([shown, norm[None]]).tolist()  # the step's only wait for the device
            values = dict(zip(terms, numbers))
            stop_if_not_finite(values, size, {"phase": phase, **asdict(progress), "files": files}, run)
            optimizer.step()
            progress.step += 1
            record(log, progress, {"phase": phase, "epoch": progress.epoch, "step": progress.step, **values})
            line.show(progress, len(order), len(files) * distributed.world(), values)
            stop = distributed.any_of(bool(stopping))
            if stop or progress.step % config.save_every == 0:
                save()
            if stop:
                raise stopped(stopping, phase, progress)
        progress.epoch, progress.step = progress.epoch + 1, 0
        if validate is not None and feed.validates(progress.epoch):
            found = distributed.gather([validate()])[0]
            progress.stale = 0 if found > progress.best else progress.stale + 1
            if found > progress.best:
                progress.best = found
                save_atomic({"method": own_state(method), **run.extra}, run.folder / "best.pt")
            record(log, progress, {"phase": phase, "epoch": progress.epoch, "validation_mAP": found})
            line.end(f"{phase} {progress.epoch}/{feed.epochs} | selection score {found:.4f} (best {progress.best:.4f})")
        save()
        if distributed.any_of(bool(stopping)):  # a signal came in the validation
            raise stopped(stopping, phase, progress)
    line.end()


def thawed(method: Method, phase: str) -> dict[str, nn.Parameter]:
    """The parameters that the phase trains; all others are frozen."""
    trained = method.trainable(phase)
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained


def stopped(stopping: list[int], phase: str, progress: Progress) -> Stopped:
    reason = signal.Signals(stopping[0]).name if stopping else "another process"
    return Stopped(f"stopped by {reason} in phase {phase}, epoch {progress.epoch + 1}, step {progress.step}; everything is "
                   "saved: run the same command to go on")


def stop_if_not_finite(values: dict[str, float], gradient: float, where: dict[str, Any], run: Run) -> None:
    """Raises ValueError before a non-finite loss or gradient reaches the weights; the batch goes into nonfinite.json."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad and math.isfinite(gradient):
        return
    bad = bad or ["gradient"]
    where["files"] = distributed.gather(where["files"])
    path = run.folder / "nonfinite.json"
    shown = {name: repr(value) for name, value in values.items()}  # JSON has no word for NaN
    write_text_atomic(path, json.dumps({"terms": bad, "values": shown, **where}, indent=2) + "\n")
    raise ValueError(f"{', '.join(bad)} not finite in phase {where['phase']}, epoch {where['epoch'] + 1}, step "
                     f"{where['step'] + 1}; the batch's files are in {path}; lower the learning rate or look at them (the "
                     "last checkpoint is intact)")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list for as long as the block runs, so that a step can be finished first."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
