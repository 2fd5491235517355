"""Images from disk to batches: reading, transforms, stroke inversion, domain-balanced order.

Nothing here keeps a random state, so that an interrupted run goes on exactly as it would have.
"""
from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..clip.weights import check_file, one_line
from ..clip.zero_shot import CLIP_MEAN, CLIP_STD, Transform
from ..machine.processes import fold

# Mean and standard deviation of the training images' normalisation (D4).
STATISTICS = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
MAX_PIXELS = 120_000_000  # more is taken for a decompression bomb
MAX_RATIO = 1000  # of the sides: a longer strip would be scaled to gigabytes with its short side
TILE = 1024  # side in pixels of what is converted at once
STOPS = (signal.SIGINT, signal.SIGTERM)
# Raster formats alone: Pillow would hand an EPS, whatever its name, to Ghostscript.
FORMATS = ("JPEG", "MPO", "JPEG2000", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO")
ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".webp", ".avif", ".gif",
                     ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"))


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
        """sha256 over the paths below `root`: two runs can be seen to use the same list."""
        names = "\n".join(os.path.relpath(path, root) for path in self.paths)
        return hashlib.sha256(os.fsencode(names)).hexdigest()


def open_image(path: str, as_is: bool = False) -> Image.Image:
    """An image as RGB: first frame, upright, transparency over white, 16 bits scaled to 8.

    `as_is` (D19): Pillow's own conversion, neither turned by EXIF nor composited. Raises ValueError that
    names the file when it is not a readable image.
    """
    try:
        check_file(path)
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]  # as this Pillow was built
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, an error below, and of broken EXIF
            with Image.open(path, formats=known) as image:
                size = f"{image.width} x {image.height} pixels"
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{size} are more than {MAX_PIXELS}")
                if max(image.size) > MAX_RATIO * min(image.size):
                    raise ValueError(f"{size}: one side is more than {MAX_RATIO} times the other")
                if as_is:  # D19
                    return image.convert("RGB")
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{path}: not a readable image ({one_line(error)})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Tile by tile, so that the arithmetic of a small file of many pixels does not take gigabytes."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    scale = 0.0  # what takes the values of deep grey images to 0..255
    if image.mode.startswith("I"):
        scale = 1 / 257  # 16-bit files come as I or I;16
    elif image.mode == "F":  # spans 0..1 or 0..255
        scale = 255.0 if np.max(image.getextrema()) <= 1 else 1.0
    result = Image.new("RGB", image.size)
    for x, y in product(range(0, image.width, TILE), range(0, image.height, TILE)):
        tile = image.crop((x, y, min(x + TILE, image.width), min(y + TILE, image.height)))
        if scale:
            values = np.nan_to_num(np.asarray(tile, dtype=np.float64)) * scale
            tile = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
        if {"A", "a"}.intersection(tile.getbands()) or "transparency" in tile.info:
            tile = tile.convert("RGBA")
            tile = Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile)
        result.paste(tile.convert("RGB"), (x, y))
    return result


def augment(image_size: int) -> Transform:
    """The training transform of both phases: RGB image -> uint8 [3, H, W]."""
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size, scale=(0.8, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.4), transforms.PILToTensor()])


def is_strokes(image: Image.Image) -> bool:
    """Whether an RGB image is drawn in dark strokes on a light ground, judged on a thumbnail of 64 x 64.

    It has no colour (2 % of the pixels may have channels that differ by more than 32), a light ground (70 %
    of the pixels and 85 % of the border are above 200) and a little ink (0.2 to 16 % are below 128). Clip art
    in outlines and thin black icons are strokes to this rule as well.
    """
    pixels = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(np.int16)
    grey, coloured = pixels.mean(2), np.ptp(pixels, axis=2) > 32
    border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
    light = (grey > 200).mean() >= 0.7 and (border > 200).mean() >= 0.85
    return bool(coloured.mean() <= 0.02 and light and 0.002 <= (grey < 128).mean() <= 0.16)


Item = tuple[int, Tensor, bool] | str


class ImageDataset(Dataset):
    """Item i: i, the transformed image and whether it was inverted; or a sentence why it cannot be read.

    invert: "domain" inverts the colours of images of the stroke domains (D14), "auto" of those that look like
    strokes (`is_strokes`), "yes" of all, "no" of none. as_is: as `open_image` takes it.
    """

    def __init__(self, files: Files, transform: Transform, stroke_domains: Sequence[str], seed: int = 0,
                 invert: str = "domain", as_is: bool = False) -> None:
        if invert not in ("domain", "auto", "yes", "no"):
            raise ValueError(f"invert {invert!r}: expected domain, auto, yes or no")
        self.files, self.transform, self.seed = files, transform, seed
        self.invert, self.as_is = invert, as_is
        self.stroke_domains = frozenset(stroke_domains)

    def __getitem__(self, i: int) -> Item:
        try:
            image = open_image(self.files.paths[i], self.as_is)  # D19
        except ValueError as error:
            return str(error)
        inverted = (self.invert == "yes" or self.invert == "auto" and is_strokes(image)
                    or self.invert == "domain" and self.files.domains[i] in self.stroke_domains)  # D14
        if inverted:
            image = ImageOps.invert(image)
        with torch.random.fork_rng(devices=[]):  # of the CPU alone, as the next line: a fifth of the time
            torch.default_generator.manual_seed(fold(self.seed, i))
            return i, self.transform(image), inverted


def collate(items: list[Item]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Indices [b], images uint8 [b, 3, H, W] and inverted [b] of readable images; the others' sentences."""
    good = [item for item in items if not isinstance(item, str)]
    indices = torch.tensor([i for i, _, _ in good], dtype=torch.long)
    images = torch.stack([image for _, image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    inverted = torch.tensor([flag for _, _, flag in good], dtype=torch.bool)
    return indices, images, inverted, [item for item in items if isinstance(item, str)]


def load(dataset: ImageDataset, batches: Sequence[Sequence[int]], workers: int, skip_bad: bool,
         device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (indices [b], images uint8 [b, 3, H, W], inverted bool [b]) for each list of indices.

    They are on the CPU, pinned for a GPU. Unreadable images raise ValueError, or are left out with a line on
    stderr when `skip_bad`. The workers end with the generator, and with this process.
    """
    workers = min(workers, len(batches))
    loader = DataLoader(dataset, batch_sampler=[list(batch) for batch in batches], num_workers=workers,
                        collate_fn=collate, pin_memory=device.type == "cuda",
                        prefetch_factor=4 if workers else None, worker_init_fn=leave_signals)
    loaded = None
    try:
        with signals_held():
            loaded = iter(loader)
        for indices, images, inverted, bad in loaded:
            if bad and not skip_bad:
                raise ValueError(f"{bad[0]}; remove it or run with --bad-images skip")
            for sentence in bad:
                print(f"skipped {sentence}", file=sys.stderr)
            yield indices, images, inverted
    except RuntimeError as error:  # a worker was killed, in a container most often for want of shared memory
        raise ValueError(f"a process that reads images failed ({one_line(error)}); give more memory or "
                         "shared memory, or take --workers 0") from error
    finally:
        if workers and loaded is not None:  # now: a traceback may keep the iterator alive for long
            loaded._shutdown_workers()  # type: ignore[attr-defined]


@contextmanager
def signals_held() -> Iterator[None]:
    """Around the start of processes, which inherit it: SIGINT and SIGTERM wait until the block is over."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach workers too, but the main process finishes its step, so they go on.

    On Linux they end when it is gone, whatever they wait for, and when it sends them SIGTERM at its exit.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # Linux
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an ignored signal could not be waited for
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        threading.Thread(target=end_with_main, args=(os.getppid(),), daemon=True).start()


def end_with_main(parent: int) -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    # Workers started later hold the pipe by which `is_alive` knows; the parent's number changes at once.
    while os.getppid() == parent and main.is_alive():
        sent = signal.sigtimedwait([signal.SIGTERM], 1)
        if sent and sent.si_pid == main.pid:
            break
    os._exit(0)


def chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def balanced_batches(domain_ids: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches, as many as the smallest of the s domains allows, with batch // s images of each.

    Raises ValueError for a batch smaller than s.
    """
    members, share, rounds = domain_shares(domain_ids, batch)
    orders = []
    for domain, indices in members.items():
        generator = torch.Generator().manual_seed(fold(seed, "order", epoch, domain))
        orders.append(torch.tensor(indices)[torch.randperm(len(indices), generator=generator)].tolist())
    return [[i for order in orders for i in order[g * share:(g + 1) * share]] for g in range(rounds)]


def released_batches(domain_ids: Sequence[int], sampled: int, batch: int, turn: int) -> list[list[int]]:
    """The released order of the run's pass number `turn`, phase 1's passes counted first (D15).

    Each domain is shuffled once, with seed 0 whatever the run's. A stream takes sampled // s images of each
    of the s domains in turn, going on where the pass before stopped and from a domain's end to its start, and
    is cut at `batch`. `sampled` is phase 2's batch in both phases. Raises as `balanced_batches`.
    """
    members, share, rounds = domain_shares(domain_ids, sampled)
    orders = [np.random.RandomState(0).permutation(indices).tolist() for indices in members.values()]
    first = turn * rounds * share  # images taken of each domain before this pass
    stream = [order[k % len(order)] for start in range(first, first + rounds * share, share)
              for order in orders for k in range(start, start + share)]
    return [stream[start:start + batch] for start in range(0, len(stream), batch)]


def domain_shares(domain_ids: Sequence[int], batch: int) -> tuple[dict[int, list[int]], int, int]:
    """{domain: its indices}, each domain's images in a round, the rounds that the smallest domain allows."""
    members: dict[int, list[int]] = {domain: [] for domain in sorted(set(domain_ids))}
    for i, domain in enumerate(domain_ids):
        members[domain].append(i)
    if batch < len(members):
        raise ValueError(f"a batch of {batch} cannot hold the {len(members)} source domains; raise "
                         f"--source-batch and --target-batch to {len(members)} or more")
    smallest = min(map(len, members.values()))
    share = min(batch // len(members), smallest)
    return members, share, smallest // share
