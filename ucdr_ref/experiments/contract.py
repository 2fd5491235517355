"""What every experiment is made of, whatever its task and method."""
from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.features import Encoder
from ..training.journal import Stateful
from ..training.loop import Feed, Run


class Method(Encoder, Stateful, typing.Protocol):
    """What evaluation and search need of a method; PHASES is empty for one that is not trained by steps."""

    PHASES: tuple[str, ...]


# What the loop is given beside the method: feeds by phase, the score of `loop.train`, the run.
Training = tuple[Mapping[str, Feed], Callable[[], float] | None, Run]


@dataclass(frozen=True)
class Experiment:
    """An experiment that is ready to be trained."""

    method: Any
    summary: str  # files and classes, as --dry-run prints them
    # Of the open run folder and what checkpoints hold, but for the names and what the task adds.
    start: Callable[[Path, dict[str, Any]], Training]
    finish: Callable[[Path], None] = lambda folder: None  # after the last phase, before evaluation
