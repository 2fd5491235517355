"""Images from disk to batches: reading, transforms, stroke inversion, domain-balanced order.

Nothing here keeps a random state, so that an interrupted run goes on exactly as it would have.
"""
import ctypes
import hashlib
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..cli import as_value_error, one_line
from ..clip.zero_shot import CLIP_MEAN, CLIP_STD, Transform
from ..distributed import derive_seed
from .folders import named_like

# Mean and standard deviation of the training images' normalisation (D4).
STATISTICS = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
WAIT_SECONDS = 120  # for the next batch of the processes that read images


@dataclass(frozen=True)
class Files:
    """A list of images with their labels as text."""

    paths: list[str]
    classes: list[str]
    domains: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __add__(self, other: "Files") -> "Files":
        return Files(self.paths + other.paths, self.classes + other.classes, self.domains + other.domains)

    def keep(self, indices: Sequence[int]) -> "Files":
        return Files(*([column[i] for i in indices] for column in (self.paths, self.classes, self.domains)))

    def digest(self, root: str) -> str:
        """sha256 over the paths, relative to `root`."""
        names = "\n".join(os.path.relpath(path, root) for path in self.paths)
        return hashlib.sha256(os.fsencode(names)).hexdigest()


def open_image(path: str) -> Image.Image:
    """An image as RGB: first frame, upright, transparency over white; ValueError where it is not readable."""
    Image.init()
    formats = [name for name in Image.OPEN if name != "EPS"]  # which Ghostscript would execute
    with (as_value_error(f"{path}:", "not a readable image", "replace or remove it"),
          warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # of size, twice of which is an error, and of broken EXIF
        with Image.open(path, formats=formats) as image:
            if max(image.size) > 1000 * min(image.size):  # scaled by its short side it takes gigabytes
                raise ValueError("a side is over 1000 times the other")
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):  # deep grey: the largest value becomes white
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0).clip(min=0)
        image = Image.fromarray(np.rint(values * (255 / (values.max() or 1))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def augment(image_size: int) -> Transform:
    """The training transform of both phases: RGB image -> uint8 [3, H, W]."""
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, scale=(0.8, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.4), transforms.PILToTensor()])


def is_strokes(image: Image.Image) -> bool:
    """Whether an RGB image has no colour, a light ground, at the border above all, and a little ink."""
    pixels = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(np.int16)
    grey, coloured = pixels.mean(2), np.ptp(pixels, axis=2) > 32
    border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
    light = (grey > 200).mean() >= 0.7 and (border > 200).mean() >= 0.85
    return bool(coloured.mean() <= 0.02 and light and 0.002 <= (grey < 128).mean() <= 0.16)


class ImageDataset(Dataset):
    """Item i: i, the transformed image and whether it was inverted; or a sentence why it cannot be read.

    invert: "domain" inverts the colours of stroke domains (D14), which may be a folder in a domain's name,
    such as `sketch/cat`; "auto" also of what looks like strokes (`is_strokes`), which evaluation never does;
    "none" nothing.
    """

    def __init__(self, files: Files, transform: Transform, stroke_domains: Sequence[str], seed: int = 0,
                 invert: str = "domain") -> None:
        self.files, self.transform, self.seed, self.invert = files, transform, seed, invert
        self.strokes = {domain for domain in set(files.domains)
                        if named_like(domain.split(os.sep), stroke_domains)}

    def __getitem__(self, i: int) -> tuple[int, np.ndarray, bool] | str:
        try:
            image = open_image(self.files.paths[i])
        except ValueError as error:
            return str(error)
        inverted = self.invert != "none" and (
            self.files.domains[i] in self.strokes or self.invert == "auto" and is_strokes(image))  # D14
        if inverted:
            image = ImageOps.invert(image)
        with torch.random.fork_rng(devices=[]):  # of the CPU alone, as the next line: a fifth of the time
            torch.default_generator.manual_seed(derive_seed(self.seed, i))
            # An array passes between processes by a pipe; a tensor would take shared memory, often little.
            return i, self.transform(image).numpy(), inverted


def load_batches(dataset: ImageDataset, batches: Sequence[Sequence[int]], workers: int,
                 unreadable: list[str] | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (indices [b], images uint8 [b, 3, H, W], inverted bool [b]) of each batch, on the CPU.

    Sentences about unreadable images are appended to `unreadable`; without that list the first such image
    raises ValueError. So does a process that reads images and is gone, or silent for WAIT_SECONDS.
    """
    workers = min(workers, len(batches))
    # Workers inherit the mask: SIGINT and SIGTERM reach them too, but a training still finishes its step.
    if sys.platform != "win32":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        loaded: Any = iter(DataLoader(
            dataset, batch_sampler=list(map(list, batches)), num_workers=workers, collate_fn=list,
            timeout=WAIT_SECONDS if workers else 0, worker_init_fn=end_with_main))
        if workers:
            for worker in loaded._workers:  # or neither PyTorch nor this process's exit could end them
                worker._popen.terminate = worker.kill
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for items in loaded:
            sentences = [item for item in items if isinstance(item, str)]
            if unreadable is not None:
                unreadable += sentences
            elif sentences:
                raise ValueError(sentences[0])
            good = [item for item in items if not isinstance(item, str)]
            indices, images, inverted = ([item[part] for item in good] for part in range(3))
            yield (torch.tensor(indices, dtype=torch.long), torch.from_numpy(np.array(images, np.uint8)),
                   torch.tensor(inverted, dtype=torch.bool))
    except RuntimeError as error:
        raise ValueError(f"a process that reads images failed ({one_line(error)}); take --workers 0, or give "
                         "more memory (in a container also --shm-size)") from error
    finally:
        if workers:  # here, as a signal that meets PyTorch's own end of it, in a destructor, would be lost
            loaded._shutdown_workers()


def end_with_main(worker: int) -> None:
    """On Linux a worker is killed with the thread that started it; elsewhere it ends in seconds."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def split_indices(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def balanced_batches(domain_ids: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches, as many as the smallest of the s domains allows, with batch // s images of each."""
    members, share, rounds = domain_shares(domain_ids, batch)
    orders = []
    for domain, indices in members.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch, domain))
        orders.append(torch.tensor(indices)[torch.randperm(len(indices), generator=generator)].tolist())
    return [[i for order in orders for i in order[g * share:(g + 1) * share]] for g in range(rounds)]


def released_batches(domain_ids: Sequence[int], sampled: int, batch: int, turn: int) -> list[list[int]]:
    """The released order of the run's pass number `turn`, phase 1's passes counted first (D15).

    One generator, seeded with 0, shuffles the s domains one after another. A stream takes sampled // s images
    of each in turn, on from where the pass before stopped, round and round, and is cut at `batch`; `sampled`
    is phase 2's batch in both phases.
    """
    members, share, rounds = domain_shares(domain_ids, sampled)
    generator = random.Random(0)
    for order in members.values():
        generator.shuffle(order)
    first = turn * rounds * share  # images taken of each domain before this pass
    stream = [order[k % len(order)] for start in range(first, first + rounds * share, share)
              for order in members.values() for k in range(start, start + share)]
    return [stream[start:start + batch] for start in range(0, len(stream), batch)]


def domain_shares(domain_ids: Sequence[int], batch: int) -> tuple[dict[int, list[int]], int, int]:
    """{domain: its indices}, each domain's images in a round, rounds; ValueError for a batch below s."""
    members = {domain: [i for i, other in enumerate(domain_ids) if other == domain]
               for domain in sorted(set(domain_ids))}
    if batch < len(members):
        raise ValueError(f"a batch of {batch} cannot hold the {len(members)} source domains; raise "
                         "--source-batch and --target-batch")
    smallest = min(map(len, members.values()))
    share = min(batch // len(members), smallest)
    return members, share, smallest // share
