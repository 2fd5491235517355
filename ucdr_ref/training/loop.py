"""The training loop of both papers.

All randomness of a step follows from (seed, phase, epoch, step), so a run that is started again by the same
command equals one that was never interrupted.
"""
from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import processes
from ..machine.files import write_text_atomic
from ..machine.processes import autocast, fold
from .journal import Journal, ProgressLine, Run, Stateful, opened


@dataclass
class Feed:
    """What a phase iterates over: `load` yields (batch, its files) for what is left of an epoch's order.

    `cut` gives what passes at once of a batch, to save memory, each with its share of the images. `validates`
    says after how many epochs a score is taken.
    """

    epochs: int
    order: Callable[[int], Sequence[Any]]
    load: Callable[[int, Sequence[Any]], Iterator[tuple[Any, list[str]]]]
    cut: Callable[[Any], list[tuple[Any, float]]] = lambda batch: [(batch, 1.0)]
    validates: Callable[[int], bool] = lambda epochs: True


class Method(Stateful, typing.Protocol):
    """What the loop needs of a method; any module with these will do."""

    PHASES: tuple[str, ...]

    def trainable(self, phase: str) -> dict[str, nn.Parameter]: ...
    def start(self, phase: str) -> None: ...
    def optimizer(self, phase: str) -> torch.optim.Optimizer: ...
    def learning_rate(self, phase: str, epoch: int, step: int) -> float: ...
    def step(self, batch: Any, phase: str) -> dict[str, Tensor]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def train(method: Method, feeds: Mapping[str, Feed], validate: Callable[[], float] | None, run: Run) -> None:
    """All phases, from where last.pt stands; leaves last.pt, best.pt and log.jsonl in the run folder.

    `validate` gives the score by which the last phase keeps its best epoch and stops early; None keeps the
    last. Raises Stopped after SIGINT or SIGTERM, ValueError at a non-finite loss.
    """
    with opened(run, method, len(method.PHASES)) as journal:
        for phase in method.PHASES[journal.progress.phase:]:
            selecting = validate if phase == method.PHASES[-1] else None
            fit(method, phase, feeds[phase], selecting, journal)
            journal.next_phase()
    if validate is None or not feeds[method.PHASES[-1]].epochs:
        journal.keep_best(method)


def fit(method: Method, phase: str, feed: Feed, validate: Callable[[], float] | None,
        journal: Journal) -> None:
    """One phase: steps, checkpoints, validation after each epoch, early stop."""
    run, progress = journal.run, journal.progress
    method.start(phase)
    trained = method.trainable(phase)
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = method.optimizer(phase)
    journal.resume(optimizer)
    line = ProgressLine(phase, feed.epochs, run.device)
    while progress.epoch < feed.epochs and (validate is None or progress.stale < run.patience):
        order = feed.order(progress.epoch)
        for batch, files in feed.load(progress.epoch, order[progress.step:]):
            torch.manual_seed(fold(run.options.seed, phase, progress.epoch, progress.step))
            for group in optimizer.param_groups:
                rate = method.learning_rate(phase, progress.epoch, progress.step)
                group["lr"] = rate * group.get("factor", 1.0)
            optimizer.zero_grad(set_to_none=True)
            sums: list[Tensor] = []
            for part, share in feed.cut(batch):
                with autocast(run.options.precision, run.device):
                    terms = method.step(part, phase)
                (share * terms["loss"]).backward()  # adds to the gradients of the parts before
                sums.append(share * torch.stack([term.detach().float() for term in terms.values()]))
            shown = torch.stack(sums).sum(0)
            gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
            processes.average([*gradients, shown], weight=len(files))
            norm = torch.stack([gradient.norm() for gradient in gradients]).sum()
            *numbers, size = torch.cat([shown, norm[None]]).tolist()  # where a step waits for the device
            values = dict(zip(terms, numbers))
            stop_if_not_finite(values, size, {"phase": phase, **asdict(progress), "files": files}, run)
            optimizer.step()
            progress.step += 1
            journal.record({"phase": phase, "epoch": progress.epoch, "step": progress.step, **values})
            line.show(progress, len(order), len(files) * processes.world(), values)
            journal.checkpoint(method, optimizer, phase, progress.step % run.options.save_every == 0)
        progress.epoch, progress.step = progress.epoch + 1, 0
        if validate is not None and feed.validates(progress.epoch):
            found = processes.gather([validate()])[0]
            progress.stale += 1
            if found > progress.best:
                progress.best, progress.stale = found, 0
                journal.keep_best(method)
            journal.record({"phase": phase, "epoch": progress.epoch, "validation_mAP": found})
            line.end(f"{phase} {progress.epoch}/{feed.epochs} | selection score {found:.4f} (best "
                     f"{progress.best:.4f})")
        journal.checkpoint(method, optimizer, phase, due=True)
    line.end()


def stop_if_not_finite(values: dict[str, float], gradient: float, where: dict[str, Any], run: Run) -> None:
    """ValueError before a non-finite loss or gradient reaches the weights; nonfinite.json tells the batch."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad and math.isfinite(gradient):
        return
    bad = bad or ["gradient"]
    where["files"] = processes.gather(where["files"])
    path = run.folder / "nonfinite.json"
    shown = {name: repr(value) for name, value in values.items()}  # JSON has no word for NaN
    write_text_atomic(path, json.dumps({"terms": bad, "values": shown, **where}, indent=2) + "\n")
    place = f"phase {where['phase']}, epoch {where['epoch'] + 1}, step {where['step'] + 1}"
    raise ValueError(f"{', '.join(bad)} not finite in {place}; the batch's files are in {path}: look at them "
                     "or lower the learning rate (the last checkpoint is intact)")
