"""Features of image files by any method's `encode`: in memory, or kept on the disk as a folder's index.

`n` files, `e` CLIP embedding, `g` readable images of a folder.
"""
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cli import ProgressLine, digest_of, load_state, save_atomic
from ..clip.zero_shot import normalize, resize_crop
from ..config import Config
from ..distributed import all_gather, autocast, rank, world_size
from .folders import File, list_images
from .images import Files, ImageDataset, load_batches, split_indices

EVAL_BATCH = 128
SAVE_SECONDS = 60  # between two writings of an index


def stream_features(method: Any, config: Config, files: Files, invert: str = "domain",
                    unreadable: list[str] | None = None) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(indices, features [b, e] and inverted [b] on the CPU) of the readable images, batch by batch.

    method: with `clip` and `encode`, images [b, 3, H, W] -> features [b, e]; config: its precision, workers
    and stroke_domains. invert: of `ImageDataset`; unreadable, ValueError: as `load_batches`.
    """
    device, transform = method.clip.visual.proj.device, resize_crop(method.clip.image_size)
    dataset = ImageDataset(files, transform, config.stroke_domains, invert=invert)
    batches = split_indices(len(files), EVAL_BATCH)
    progress = ProgressLine("encoding", len(files))
    loaded = load_batches(dataset, batches, config.workers, unreadable)
    for (indices, images, inverted), batch in zip(loaded, batches):  # `loaded` first: it runs to its end
        if len(indices):
            with torch.no_grad(), autocast(config.precision, device):
                features = method.encode(normalize(images.to(device))).float()
            yield indices.tolist(), features.cpu(), inverted
        progress.update(batch.stop)
    progress.close()


@dataclass
class FeatureCache:
    """Features in memory, each file encoded once and by one process: the galleries of tests overlap."""

    method: Any  # this and config: of `stream_features`
    config: Config
    rows: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, files: Files) -> Tensor:
        """Features [n, e] on the device, in every process. Raises as `load_batches`."""
        if new := [i for i, path in enumerate(files.paths) if path not in self.rows]:
            batches = split_indices(len(new), EVAL_BATCH)[rank()::world_size()]  # of all domains each
            part = files.keep([new[i] for batch in batches for i in batch])
            stream = stream_features(self.method, self.config, part)
            named = [([part.paths[i] for i in found], rows) for found, rows, _ in stream]
            for paths, rows in all_gather(named):
                self.rows |= zip(paths, rows)
        table = torch.stack([self.rows[path] for path in files.paths])
        return table.to(self.method.clip.visual.proj.device)


@dataclass(frozen=True)
class Index:
    """Row i of `features` [g, e] (float32, on the CPU) is of `paths[i]`, relative to `folder`, sorted."""

    folder: str
    paths: list[str]
    features: Tensor
    inverted: Tensor  # [g], bool
    encoded: int  # images encoded now

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.paths[i])


def load_index(folder: str | os.PathLike[str], method: Any, config: Config, key: str, cache: Path,
               invert: str = "domain", files: Sequence[File] = (),
               unreadable: list[str] | None = None) -> Index:
    """The index of a folder's images: from its file in `cache` as far as it goes, the rest encoded.

    key: digest of the method and its weights. files: some of `list_images(folder)`; empty: all. Folders below
    `folder`, not above it, tell which images are of a stroke domain. An image is encoded again when its path,
    size or times change. The file is written about once a minute, at the end and when interrupted; the last
    of two processes wins. unreadable, ValueError: as `load_batches`, also when no image is readable.
    """
    root = os.path.realpath(folder)
    content = [root, key, invert, config.precision, sorted(config.stroke_domains)]
    path = cache / f"{digest_of(content)[:32]}.pt"
    rows, files = load_rows(path), files or list_images(root)
    known = len(rows)
    if new := [file for file in files if file not in rows]:
        cache.mkdir(parents=True, exist_ok=True)
        names = [name for name, *_ in new]
        images = Files([os.path.join(root, name) for name in names], names, list(map(os.path.dirname, names)))
        saved = time.monotonic()
        try:
            for indices, features, inverted in stream_features(method, config, images, invert, unreadable):
                rows |= zip([new[i] for i in indices], torch.cat([features, inverted[:, None]], dim=1))
                if time.monotonic() > saved + SAVE_SECONDS:
                    save_rows(path, rows)
                    saved = time.monotonic()
        finally:
            if len(rows) > known:
                save_rows(path, rows)
    found = [file for file in files if file in rows]
    if not found:
        raise ValueError(f"none of the {len(files)} images below {root} is readable")
    table = torch.stack([rows[file] for file in found])
    return Index(root, [name for name, *_ in found], table[:, :-1], table[:, -1] > 0, len(rows) - known)


def save_rows(path: Path, rows: dict[File, Tensor]) -> None:
    """rows: {image: [e + 1], features and whether it was inverted}, also of images that are gone."""
    names = "\0".join(name for name, *_ in rows)  # one text and two tensors are quick to read
    state = torch.tensor([state for _, *state in rows])
    save_atomic({"names": names, "state": state, "rows": torch.stack(list(rows.values()))}, path)


def load_rows(path: Path) -> dict[File, Tensor]:
    """What `save_rows` wrote; nothing, with a notice, where the file is broken."""
    if not path.exists():
        return {}
    try:
        content = load_state(path)
        files = zip(content["names"].split("\0"), content["state"].tolist(), content["rows"], strict=True)
        return {(name, *state): row for name, state, row in files}
    except Exception:  # whatever is wrong with it, it can be made anew
        print(f"{path}: broken index; its images are encoded again", file=sys.stderr)
        return {}
