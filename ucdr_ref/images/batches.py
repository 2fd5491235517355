"""Images from disk to batches: reading, transforms, stroke inversion, domain-balanced batches.

Nothing here keeps a random state: what an image or an order looks like follows from the seed, the phase, the epoch and the
index, so a run that was interrupted goes on exactly as it would have.
"""
from __future__ import annotations

import hashlib
import os
import signal
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..clip.zero_shot import CLIP_MEAN, CLIP_STD, Transform
from ..machine.processes import fold

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_PIXELS = 120_000_000  # more is taken for a decompression bomb
# Raster formats alone: Pillow would hand an EPS, whatever its name, to Ghostscript.
FORMATS = ("JPEG", "MPO", "JPEG2000", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO")
ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp",
                     ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"))


@dataclass(frozen=True)
class Files:
    """A list of images with their labels as text; the three lists have one length."""

    paths: list[str]
    classes: list[str]
    domains: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __add__(self, other: Files) -> Files:
        return Files(self.paths + other.paths, self.classes + other.classes, self.domains + other.domains)

    def keep(self, indices: Sequence[int]) -> Files:
        return Files(*([column[i] for i in indices] for column in (self.paths, self.classes, self.domains)))

    def digest(self, root: str) -> str:
        """sha256 over the paths below `root`, so that two runs can be seen to use the same list."""
        names = "\n".join(os.path.relpath(path, root) for path in self.paths)
        return hashlib.sha256(os.fsencode(names)).hexdigest()


@cache
def known_formats() -> tuple[str, ...]:
    """FORMATS as far as this build of Pillow has them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(path: str, as_is: bool = False) -> Image.Image:
    """Any image that Pillow reads as RGB: first frame, upright, transparency over white, 16 bits scaled to 8.

    `as_is` (D19): Pillow's own conversion, neither turned by EXIF nor composited: what is transparent shows.
    Raises ValueError that names the file when it is not a readable image.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's size warning is an error below; broken EXIF is no reason to speak
            with Image.open(path, formats=known_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
                return image.convert("RGB") if as_is else to_rgb(ImageOps.exif_transpose(image))  # D19
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, ArithmeticError, AttributeError,
            MemoryError, RuntimeError, AssertionError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise all of these on damaged files.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = os.fsencode(path)
        raise ValueError(f"{name!r}: not a readable image ({reason}); remove it or run with --bad-images skip") from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float64)
        # 16-bit files come as I or I;16; floating-point ones span 0..1 or 0..255.
        scale = 1 / 257 if image.mode != "F" else 255.0 if pixels.max(initial=0) <= 1 else 1.0
        image = Image.fromarray((np.nan_to_num(pixels) * scale).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def augment(image_size: int, normalization: str) -> Transform:
    """The training transform of both phases; `normalization` clip or imagenet (D4)."""
    mean, std = (CLIP_MEAN, CLIP_STD) if normalization == "clip" else (IMAGENET_MEAN, IMAGENET_STD)  # D4
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, scale=(0.8, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.4), transforms.ToTensor(), transforms.Normalize(mean, std)])


class ImageDataset(Dataset):
    """Item i: the transformed image, or the sentence that says why it cannot be read."""

    def __init__(self, files: Files, transform: Transform, stroke_domains: Sequence[str], seed: int = 0,
                 as_is: bool = False) -> None:
        self.files, self.transform, self.seed, self.as_is = files, transform, seed, as_is
        self.stroke_domains = frozenset(stroke_domains)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            image = open_image(self.files.paths[i], self.as_is)  # D19
        except ValueError as error:
            return i, str(error)
        if self.files.domains[i] in self.stroke_domains:
            image = ImageOps.invert(image)  # D14
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(fold(self.seed, i))  # the CPU's alone: a fifth of an item's time is saved
            return i, self.transform(image)


def collate(items: list[tuple[int, Tensor | str]]) -> tuple[Tensor, Tensor, list[str]]:
    """-> indices [b] and images [b, 3, H, W] of the readable ones, and a sentence for each other one."""
    good = [(i, image) for i, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return torch.tensor([i for i, _ in good], dtype=torch.long), images, [text for _, text in items if isinstance(text, str)]


def load(dataset: ImageDataset, batches: Sequence[Sequence[int]], workers: int, skip_bad: bool,
         device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (indices [b], images [b, 3, H, W] on the CPU, pinned for a GPU) for each list of indices.

    Unreadable images raise ValueError, or are left out with one line on stderr when `skip_bad`.
    """
    workers = min(workers, len(batches))
    loader = DataLoader(dataset, batch_sampler=[list(batch) for batch in batches], num_workers=workers, collate_fn=collate,
                        pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None, worker_init_fn=leave_signals)
    for indices, images, bad in loader:
        if bad and not skip_bad:
            raise ValueError(bad[0])
        for sentence in bad:
            print(f"skipped {sentence}", file=sys.stderr)
        yield indices, images


def leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a terminal; the main one finishes its step, so workers must go on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def balanced_batches(domain_ids: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Domain-balanced order of one epoch: as many batches as the smallest domain allows, each with as many
    images per domain.

    With s domains a batch holds (batch // s) * s images. Raises ValueError when the batch is smaller than the
    number of domains.
    """
    members, share, rounds = domain_shares(domain_ids, batch)
    orders = []
    for domain, indices in members.items():
        generator = torch.Generator().manual_seed(fold(seed, "order", epoch, domain))
        orders.append([indices[j] for j in torch.randperm(len(indices), generator=generator).tolist()])
    return [[i for order in orders for i in order[g * share:(g + 1) * share]] for g in range(rounds)]


def released_batches(domain_ids: Sequence[int], sampled: int, batch: int, turn: int) -> list[list[int]]:
    """The released order of the run's pass number `turn`, phase 1's passes counted first (D15).

    Each domain is shuffled once, with seed 0 whatever the run's. A stream takes sampled // s images of each of
    the s domains in turn, going on in a domain where the pass before stopped and from its end to its start, and
    is cut at `batch`. `sampled` is phase 2's batch in both phases. Raises ValueError as `balanced_batches` does.
    """
    members, share, rounds = domain_shares(domain_ids, sampled)
    orders = []
    for indices in members.values():
        orders.append([indices[j] for j in np.random.RandomState(0).permutation(len(indices))])
    first = turn * rounds * share  # images taken of each domain before this pass
    stream = [order[k % len(order)] for start in range(first, first + rounds * share, share)
              for order in orders for k in range(start, start + share)]
    return [stream[start:start + batch] for start in range(0, len(stream), batch)]


def domain_shares(domain_ids: Sequence[int], batch: int) -> tuple[dict[int, list[int]], int, int]:
    """{domain: its indices}, the images of each domain in a round of at most `batch`, and the rounds that the
    smallest domain allows; ValueError when the batch is smaller than the number of domains."""
    members: dict[int, list[int]] = {}
    for i, domain in enumerate(domain_ids):
        members.setdefault(domain, []).append(i)
    share = batch // len(members)
    if share == 0:
        raise ValueError(f"a batch of {batch} cannot hold the {len(members)} source domains; raise --source-batch and "
                         f"--target-batch to {len(members)} or more")
    smallest = min(len(indices) for indices in members.values())
    share = min(share, smallest)
    return dict(sorted(members.items())), share, smallest // share
