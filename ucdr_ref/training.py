"""The training loop of both papers (`fit` is the whole of it), its checkpoints and its log.

All randomness of a step follows from (seed, phase, epoch, step), so an interrupted run that is started again
equals one that was not.
"""
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cli import ProgressLine, as_value_error, is_main, load_state, save_atomic, signals_to
from .config import PATHS, Config, differences, from_dict
from .distributed import all_gather, autocast, average, barrier, derive_seed

SAVE_EVERY = 50  # steps between two checkpoints


@dataclass(frozen=True)
class Run:
    folder: Path
    seed: int
    precision: str
    device: torch.device
    extra: dict[str, Any]  # into every checkpoint; among it "config", a dict
    patience: int  # epochs without a better score before the last phase stops


@dataclass
class PhaseData:
    """What a phase iterates over; `load` yields, for what is left of an epoch's order, a batch and the number
    of its images in this process.
    """

    epochs: int
    order: Callable[[int], Sequence[Any]]
    load: Callable[[int, Sequence[Any]], Iterator[tuple[Any, int]]]
    # What passes at once of a batch, each part with its share of the images.
    microbatches: Callable[[Any], list[tuple[Any, float]]] = lambda batch: [(batch, 1.0)]
    validates: Callable[[int], bool] = lambda epochs: True  # whether to take a score after that many epochs
    batch_size: int = 1  # images of a whole batch

    def plan(self) -> str:
        steps = self.epochs * len(self.order(0))
        few = " (few: take smaller batches or more epochs)" * (0 < steps < 20)
        return f"{steps} steps of {self.batch_size} images{few}"


@dataclass
class Progress:
    phase: int = 0
    epoch: int = 0
    step: int = 0
    best: float = -1.0  # score
    epochs_without_improvement: int = 0
    log_bytes: int = 0


def train(method: Any, phases: Mapping[str, PhaseData], validate: Callable[[], float] | None,
          run: Run) -> None:
    """All phases, from where last.pt stands; leaves last.pt, best.pt and log.jsonl in the run folder.

    method: a module with PHASES, trainable(phase) (parameters by name), start(phase), optimizer(phase),
    learning_rate(phase, epoch, step) and step(batch, phase) (loss terms by name).
    validate: the score by which the last phase keeps its best epoch and stops early; None keeps the last.
    Raises KeyboardInterrupt after SIGINT or SIGTERM, ValueError at a non-finite loss.
    """
    checkpointer = Checkpointer(run, method)
    with signals_to(checkpointer.stop):
        for phase in method.PHASES[checkpointer.progress.phase:]:
            selecting = validate if phase == method.PHASES[-1] else None
            fit(method, phase, phases[phase], selecting, checkpointer)
            progress = checkpointer.progress
            checkpointer.progress = Progress(progress.phase + 1, log_bytes=progress.log_bytes)
    if checkpointer.stopping:  # came while the last step was saved: now for who listened before
        signal.raise_signal(checkpointer.stopping[0])
    if validate is None or not phases[method.PHASES[-1]].epochs:
        checkpointer.save_best(method)


def fit(method: Any, phase: str, data: PhaseData, validate: Callable[[], float] | None,
        checkpointer: "Checkpointer") -> None:
    """One phase: steps, checkpoints, validation after each epoch, early stop."""
    run, progress = checkpointer.run, checkpointer.progress
    method.start(phase)
    trained = method.trainable(phase)
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = method.optimizer(phase)
    checkpointer.resume(optimizer, phase)
    per_epoch = len(data.order(0))  # the last epoch may be shorter
    line = ProgressLine(phase, data.epochs * per_epoch * data.batch_size)
    while progress.epoch < data.epochs and progress.epochs_without_improvement < run.patience:
        order = data.order(progress.epoch)
        for batch, count in data.load(progress.epoch, order[progress.step:]):
            torch.manual_seed(derive_seed(run.seed, phase, progress.epoch, progress.step))
            for group in optimizer.param_groups:
                rate = method.learning_rate(phase, progress.epoch, progress.step)
                group["lr"] = rate * group.get("factor", 1.0)
            optimizer.zero_grad(set_to_none=True)
            sums: list[Tensor] = []
            for part, share in data.microbatches(batch):
                with autocast(run.precision, run.device):
                    terms = method.step(part, phase)
                (share * terms["loss"]).backward()  # adds to the gradients of the parts before
                sums.append(share * torch.stack([term.detach().float() for term in terms.values()]))
            losses = torch.stack(sums).sum(0)
            gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
            average([*gradients, losses], weight=count)
            norm = torch.stack([gradient.norm() for gradient in gradients]).sum()
            *numbers, size = torch.cat([losses, norm[None]]).tolist()  # where a step waits for the device
            values = dict(zip(terms, numbers))
            if not all(map(math.isfinite, [*numbers, size])):
                checkpointer.refuse({**values, "gradient": size}, phase)
            optimizer.step()
            progress.step += 1
            checkpointer.log({"phase": phase, "epoch": progress.epoch, "step": progress.step, **values})
            line.update((progress.epoch * per_epoch + progress.step) * data.batch_size,
                        f"epoch {progress.epoch + 1}/{data.epochs} | "
                        + " ".join(f"{name} {value:.3f}" for name, value in values.items()))
            checkpointer.save(method, optimizer, phase, progress.step % SAVE_EVERY == 0)
        progress.epoch, progress.step = progress.epoch + 1, 0
        line.close()
        if validate is not None and data.validates(progress.epoch):
            score = all_gather([validate()])[0]
            progress.epochs_without_improvement += 1
            if score > progress.best:
                progress.best, progress.epochs_without_improvement = score, 0
                checkpointer.save_best(method)
            checkpointer.log({"phase": phase, "epoch": progress.epoch, "score": score})
            print(f"{phase} epoch {progress.epoch}/{data.epochs} | score {score:.4f}")
        checkpointer.save(method, optimizer, phase, due=True)


class Checkpointer:
    """How far a training is; its log and checkpoints. The method takes over the weights of last.pt."""

    def __init__(self, run: Run, method: Any) -> None:
        self.run, self.progress, self.last = run, Progress(), run.folder / "last.pt"
        self.optimizer_state: dict[str, Any] | None = None  # of last.pt, until a phase takes it
        self.stopping: list[int] = []  # signals received
        if self.last.exists():
            state = load_state(self.last)
            with as_value_error(self.last, "is no checkpoint of a training", "delete it and train again"):
                self.progress, self.optimizer_state = Progress(**state["progress"]), state["optimizer"]
                config, weights = from_dict(state["config"]), state["method"]
            check_config(from_dict(run.extra["config"]), config, self.last)
            load_own_state(method, weights, self.last)

    def stop(self, number: int, frame: Any) -> None:
        """Handles a signal: the step is finished first; a second SIGINT ends the process."""
        self.stopping.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def resume(self, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """The optimizer goes on as it was when the phase was interrupted."""
        if self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
            print(f"resumed from {self.place(phase)}")

    def place(self, phase: str) -> str:
        return f"phase {phase}, epoch {self.progress.epoch + 1}, step {self.progress.step}"

    def log(self, values: dict[str, Any]) -> None:
        """A line of JSON in log.jsonl; lines of steps that are done again are cut off."""
        if is_main():
            with open(self.run.folder / "log.jsonl", "ab") as file:
                file.truncate(min(file.tell(), self.progress.log_bytes))
                file.write((json.dumps(values) + "\n").encode())
                self.progress.log_bytes = file.tell()

    def save(self, method: Any, optimizer: torch.optim.Optimizer, phase: str, due: bool) -> None:
        """Writes last.pt where it is due or a process is to stop, which raises KeyboardInterrupt."""
        stop = all_gather([*self.stopping])  # of all processes; a copy: the next signal waits
        if due or stop:
            save_atomic({"progress": asdict(self.progress), "method": own_state(method),
                         "optimizer": optimizer.state_dict(), **self.run.extra}, self.last)
            barrier()
        if stop:
            reason = signal.Signals(self.stopping[0]).name if self.stopping else "another process"
            raise KeyboardInterrupt(f"stopped by {reason} in {self.place(phase)}; the same command goes on")

    def refuse(self, values: dict[str, float], phase: str) -> None:
        """Raises ValueError at numbers that are not finite."""
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise ValueError(f"{bad} not finite after {self.place(phase)}; take a smaller learning rate")

    def save_best(self, method: Any) -> None:
        save_atomic({"method": own_state(method), **self.run.extra}, self.run.folder / "best.pt")


def own_state(method: Any) -> dict[str, Tensor]:
    """The method's state without CLIP's frozen weights."""
    return {name: value for name, value in method.state_dict().items() if not name.startswith("clip.")}


def load_own_state(method: Any, state: Mapping[str, Tensor], path: Path) -> None:
    """Takes over an `own_state`; ValueError unless names and shapes are the method's."""
    there, here = ({name: list(value.shape) for name, value in part.items()}
                   for part in (state, own_state(method)))
    for name in there | here:
        if there.get(name) != here.get(name):
            raise ValueError(f"{path} was trained with other weights, classes or domains ({name} is "
                             f"{there.get(name)} there, {here.get(name)} here)")
    method.load_state_dict(state, strict=False)


def check_config(ours: Config, theirs: Config, path: Path) -> None:
    """ValueError where a checkpoint's config is not the run's."""
    if different := differences(ours, theirs, also=PATHS):
        raise ValueError(f"{path} is of a run with another config ({'; '.join(different)})")
