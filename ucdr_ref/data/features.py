"""Features of image files by any method's `encode`: in memory, or kept on the disk as a folder's index.

`n` files, `e` CLIP embedding, `g` readable images of a folder.
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cli import ProgressLine, digest_of, load_state, make_folder, one_line, save_atomic
from ..clip.zero_shot import normalize, resize_crop
from ..distributed import all_gather, autocast, rank, world_size
from .folders import File, folder_key, list_images
from .images import Files, ImageDataset, load_batches, split_indices

EVAL_BATCH = 128
SAVE_SECONDS = 60  # between two writings of an index


@dataclass(frozen=True)
class Extractor:
    """A method on its device: image files in, features [n, e] (float32) out."""

    method: Any  # with `clip` and `encode`: images [b, 3, H, W] -> features [b, e]
    device: torch.device
    precision: str
    workers: int
    stroke_domains: Sequence[str]

    def stream(self, files: Files, batches: Sequence[Sequence[int]], invert: str = "domain",
               unreadable: list[str] | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(indices [b], features [b, e], inverted [b]) of the readable images of each batch of indices.

        invert: as `ImageDataset` takes it; unreadable: as `load_batches`. ValueError as there, and for
        features that are not finite.
        """
        transform = resize_crop(self.method.clip.image_size)
        dataset = ImageDataset(files, transform, self.stroke_domains, invert=invert)
        loaded = load_batches(dataset, batches, self.workers, self.device, unreadable)
        progress, done = ProgressLine("encoding", sum(map(len, batches))), 0
        for batch, (indices, images, inverted) in zip(batches, loaded):
            if len(indices):
                with torch.inference_mode(), autocast(self.precision, self.device):
                    inputs = normalize(images.to(self.device, non_blocking=True))
                    features = self.method.encode(inputs).float()
                if not features.isfinite().all():
                    raise ValueError(f"{files.paths[batch[0]]} and the images after it: features are not "
                                     "finite; check --weights and --precision")
                # The consumer runs outside of both, with a usual tensor, not an inference one.
                yield indices, features.clone(), inverted
            done += len(batch)
            progress.update(done)
        progress.close()


@dataclass
class FeatureCache:
    """Features in memory, each file encoded once and by one process: the galleries of tests overlap."""

    extractor: Extractor
    rows: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, files: Files) -> Tensor:
        """Features [n, e] on the device, in every process. Raises as `Extractor.stream`."""
        if new := files.keep([i for i, path in enumerate(files.paths) if path not in self.rows]):
            batches = split_indices(len(new), EVAL_BATCH)[rank()::world_size()]  # of all domains each
            stream = self.extractor.stream(new, batches)
            for indices, rows in all_gather([(indices.tolist(), rows.cpu()) for indices, rows, _ in stream]):
                self.rows |= zip([new.paths[i] for i in indices], rows)
        return torch.stack([self.rows[path] for path in files.paths]).to(self.extractor.device)


@dataclass(frozen=True)
class Index:
    """Row i of `features` [g, e] (float32, on the CPU) is of `paths[i]`, relative to `folder`, sorted."""

    folder: str
    paths: list[str]
    features: Tensor
    inverted: Tensor  # [g], bool
    unreadable: list[str]  # a sentence for each image that was left out
    encoded: int  # images encoded now

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.paths[i])


def stroke_folder(path: str, stroke_domains: Collection[str]) -> str:
    """The first folder on a relative path that is named like a stroke domain (D14); empty without one."""
    strokes = set(map(folder_key, stroke_domains))
    return next((part for part in Path(path).parts[:-1] if folder_key(part) in strokes), "")


def load_index(folder: str | os.PathLike[str], extractor: Extractor, key: str, cache: Path,
               invert: str = "domain", without: Collection[str] = ()) -> Index:
    """The index of all images below `folder`: from its file in `cache` as far as it goes, the rest encoded.

    key: digest of the method and its weights. without: folders in it that are passed over. Folders below
    `folder`, not above it, tell which images are of a stroke domain. An image is encoded again when its path,
    size or times change. The file is written about once a minute, and when the encoding ends or is
    interrupted; of two processes that write it the last one wins. ValueError when no image is readable, and
    as `list_images`, `Extractor.stream` and `save_atomic`.
    """
    root, notes, unreadable = os.path.realpath(folder), list[str](), list[str]()
    listed = list_images(root, notes)
    for line in notes:
        print(line, file=sys.stderr)
    strokes = sorted(extractor.stroke_domains)
    path = cache / f"{digest_of([root, key, invert, extractor.precision, strokes])[:32]}.pt"
    row, parts = load_rows(path, listed)
    known, files = len(row), [file for file in listed if file[0].split(os.sep)[0] not in without]
    if new := [file for file in files if file not in row]:
        make_folder(cache)
        names = [name for name, *_ in new]
        images = Files([os.path.join(root, name) for name in names], names,
                       [stroke_folder(name, strokes) for name in names])
        stream = extractor.stream(images, split_indices(len(new), EVAL_BATCH), invert, unreadable)
        next_save = time.monotonic() + SAVE_SECONDS
        try:
            for indices, features, inverted in stream:
                parts.append(torch.cat([features.cpu(), inverted[:, None]], dim=1))
                for i in indices.tolist():
                    row[new[i]] = len(row)
                if (start := time.monotonic()) > next_save:
                    save_rows(path, row, parts)
                    next_save = start + max(SAVE_SECONDS, 100 * (time.monotonic() - start))
        finally:
            if len(row) > known:
                save_rows(path, row, parts)
    found = [file for file in files if file in row]
    if not found:
        raise ValueError(f"none of the {len(files)} images below {root} could be read: {unreadable[0]}")
    rows = take(torch.cat(parts) if new else parts[0], [row[file] for file in found])
    return Index(root, [name for name, *_ in found], rows[:, :-1], rows[:, -1] > 0, unreadable,
                 len(new) - len(unreadable))


def take(rows: Tensor, order: list[int]) -> Tensor:
    """Rows in this order; as they are on the disk, not in memory, where it is theirs."""
    return rows if order == list(range(len(rows))) else rows[order]


def save_rows(path: Path, row: dict[File, int], parts: list[Tensor]) -> None:
    """row: each image's row in the joined parts [m, e + 1], features and whether it was inverted."""
    names = "\0".join(name for name, *_ in row)  # one text and one tensor are quick to read
    state = torch.tensor([state for _, *state in row])
    save_atomic({"names": names, "state": state, "rows": torch.cat(parts)}, path)


def load_rows(path: Path, files: Collection[File]) -> tuple[dict[File, int], list[Tensor]]:
    """What `save_rows` wrote of `files`; nothing, with a notice, where the file is broken."""
    if not path.exists():
        return {}, []
    try:
        content = load_state(path)
        names, state = content["names"].split("\0"), content["state"].tolist()
        stored = {(name, *values): i for i, (name, values) in enumerate(zip(names, state, strict=True))}
        kept = [file for file in files if file in stored]
        rows = take(content["rows"], [stored[file] for file in kept])
        return {file: i for i, file in enumerate(kept)}, [rows]
    except Exception as error:  # whatever is wrong with it, it can be made anew
        print(f"{path}: broken index ({one_line(error)}); the images are encoded again", file=sys.stderr)
        return {}, []
