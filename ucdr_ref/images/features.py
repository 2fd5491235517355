"""Features of image files by any method's `encode`."""
from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..clip.model import CLIP
from ..clip.zero_shot import normalize, resize_crop
from ..machine.options import Shared
from ..machine.processes import autocast
from .batches import Files, ImageDataset, chunks, load
from .cache import EncodePaths


class Encoder(typing.Protocol):
    """What extraction needs of a method."""

    clip: CLIP

    def encode(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Extractor:
    """A method bound to the run's options and device: image files in, features [n, e] (float32) out."""

    method: Encoder
    options: Shared
    device: torch.device

    def stream(self, files: Files, batches: Sequence[Sequence[int]], skip_bad: bool,
               invert: str = "domain") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(indices [b], features [b, e], inverted [b]) of the readable images of each batch of indices.

        invert: as `ImageDataset` takes it. Unreadable images raise ValueError unless `skip_bad`.
        """
        options, transform = self.options, resize_crop(self.method.clip.image_size)
        dataset = ImageDataset(files, transform, options.stroke_domains, invert=invert,
                               as_is=options.image_reading == "as-is")
        for indices, images, inverted in load(dataset, batches, options.workers, skip_bad, self.device):
            if len(indices):
                with torch.inference_mode(), autocast(options.precision, self.device):
                    inputs = normalize(images.to(self.device, non_blocking=True))
                    features = self.method.encode(inputs).float()
                # The consumer runs outside of both, with a usual tensor, not an inference one.
                yield indices, features.clone(), inverted

    def of_paths(self, invert: str = "domain", flags: bool = False) -> EncodePaths:
        """encode_paths(paths) -> (indices [b], features [b, e]) of each batch's readable images.

        invert: as in `stream`; an image is of a stroke domain when a folder on its path has its name (D14).
        flags: one more column tells which images were inverted, [b, e + 1].
        """
        def domain(path: str) -> str:
            return next((part for part in Path(path).parts[:-1] if part in self.options.stroke_domains), "")

        def encode_paths(paths: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
            files = Files(paths, [""] * len(paths), [domain(path) for path in paths])  # D14
            batches = chunks(len(paths), self.options.eval_batch)
            for indices, rows, inverted in self.stream(files, batches, True, invert):
                yield indices, torch.cat([rows.cpu(), inverted[:, None].float()], dim=1) if flags else rows

        return encode_paths


def prototypes(parts: Iterable[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """The sums of the classes' features [classes, e], directions; zero for a class without any.

    parts: pairs of normalised features [n, e] and their class ids [n].
    """
    sums = Tensor()
    for features, labels in parts:
        sums = sums if len(sums) else features.new_zeros(classes, features.shape[1])
        sums.index_add_(0, labels, features)
    return sums
