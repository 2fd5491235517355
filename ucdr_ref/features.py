"""From image files to training batches, and to features; several processes share both."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .clip.zero_shot import preprocess
from .config import Config
from .data import Files, ImageDataset, augment, balanced_batches, chunks, load
from .engine import Feed
from .index import EncodePaths
from .machine.processes import autocast, fold, gather, share
from .protocols import Protocol
from .ucdr.adapter import Batch

CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory


def feed(phase: str, protocol: Protocol, config: Config, image_size: int, device: torch.device) -> Feed:
    """Domain-balanced, augmented batches of the training files for one phase of UCDR-Adapter."""
    class_ids = torch.tensor([protocol.class_names.index(name) for name in protocol.train.classes])
    domain_ids = torch.tensor([protocol.domain_names.index(name) for name in protocol.train.domains])
    size = config.source_batch if phase == "source" else config.target_batch

    def order(epoch: int) -> list[list[int]]:
        return balanced_batches(domain_ids.tolist(), size, fold(config.seed, phase), epoch, config.balance == "exact")

    def batches(epoch: int, left: Sequence[list[int]]) -> Iterator[tuple[Batch, list[str]]]:
        shares = [share(batch) for batch in left]
        dataset = ImageDataset(protocol.train, augment(image_size, config.train_normalization), config.stroke_domains,
                               fold(config.seed, phase, epoch))
        for indices, images in load(dataset, shares, config.workers, config.bad_images == "skip", device):
            images = images.view(-1, 3, image_size, image_size)  # a share may be empty
            batch = (images, class_ids[indices], domain_ids[indices])
            yield Batch(*(part.to(device, non_blocking=True) for part in batch)), [protocol.train.paths[i] for i in indices]

    epochs = config.source_epochs if phase == "source" else config.target_epochs
    return Feed(epochs, order, batches, lambda batch: cut(batch, phase, config))


def cut(batch: Batch, phase: str, config: Config) -> list[tuple[Batch, float]]:
    """What passes at once of a batch, each part with its share of the images: the losses' weighted sum is the batch's.

    Only phase 2 is a mean over images alone; in phase 1 queues and momentum move once a batch, so it stays whole.
    """
    b = len(batch.images)
    size = config.micro_batch or (CPU_PART if batch.images.device.type == "cpu" else b)
    if phase == "source" or b <= size:
        return [(batch, 1.0)]
    return [(Batch(*part), len(part[0]) / b) for part in zip(*(rows.split(size) for rows in batch))]


def extract(encode: Callable[[Tensor], Tensor], files: Files, config: Config, image_size: int,
            device: torch.device) -> tuple[Tensor, list[int]]:
    """Features [N, e] of a file list, on the CPU in float32, and the indices of the N readable files, in every process."""
    dataset = ImageDataset(files, preprocess(image_size), config.stroke_domains)
    features, kept = [], []
    batches = share(chunks(len(files), config.eval_batch))
    for indices, images in load(dataset, batches, config.workers, config.bad_images == "skip", device):
        if len(indices):
            with torch.inference_mode(), autocast(config.precision, device):
                features.append(encode(images.to(device, non_blocking=True)).float().cpu())
            kept += indices.tolist()
    features, kept = gather(features), gather(kept)
    if not kept:
        raise ValueError(f"none of the {len(files)} images could be read; the first is {files.paths[0]}")
    return torch.cat(features), kept


def path_encoder(encode: Callable[[Tensor], Tensor], image_size: int, config: Config, device: torch.device,
                 invert: str = "auto") -> EncodePaths:
    """encode_paths(paths) -> (indices [b], features [b, .]) batch by batch; unreadable images are left out.

    invert: whether the images are dark strokes on white: yes, no, or auto, where a folder on the path named like a stroke
    domain says so (D14).
    """
    def domain(path: str) -> str:
        if invert == "auto":
            return next((part for part in Path(path).parts[:-1] if part in config.stroke_domains), "")  # D14
        return "strokes" if invert == "yes" else ""

    def encode_paths(paths: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        files = Files(paths, [""] * len(paths), [domain(path) for path in paths])
        dataset = ImageDataset(files, preprocess(image_size), (*config.stroke_domains, "strokes"))
        for indices, images in load(dataset, chunks(len(paths), config.eval_batch), config.workers, True, device):
            if len(indices):
                with torch.inference_mode(), autocast(config.precision, device):
                    yield indices, encode(images.to(device, non_blocking=True)).float()

    return encode_paths
