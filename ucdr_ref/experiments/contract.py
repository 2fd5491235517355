"""What every experiment is made of, whatever its task and method."""
from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..clip.model import CLIP
from ..machine.options import Shared
from ..training.loop import Feed


class Method(typing.Protocol):
    """What evaluation and search need of a method; PHASES is empty for one that is not trained by steps."""

    PHASES: tuple[str, ...]
    clip: CLIP

    def encode(self, images: Tensor) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


@dataclass(frozen=True)
class Training:
    """What the loop is given once the run folder is open."""

    feeds: Mapping[str, Feed]
    validate: Callable[[], float] | None  # the score that chooses the best epoch; None keeps the last
    options: Shared
    patience: int  # epochs without a better score before the last phase stops
    extra: dict[str, Any] = field(default_factory=dict)  # goes into every checkpoint


@dataclass(frozen=True)
class Experiment:
    """An experiment that is ready to be trained."""

    method: Any
    class_names: list[str]
    domain_names: list[str]
    summary: str  # files and classes, as --dry-run prints them
    files: dict[str, Any]  # digests of the file lists, for run.json
    start: Callable[[Path], Training]
    finish: Callable[[Path], None] = lambda folder: None  # after the last phase, before evaluation
