"""From image files to training batches, and to features; several processes share both."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .config import Config
from .data import Files, ImageDataset, augment, balanced_batches, chunks, fold, load, preprocess
from .distributed import gather, share
from .engine import Feed, autocast
from .protocols import Protocol
from .ucdr_adapter import Batch


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

    return Feed(config.source_epochs if phase == "source" else config.target_epochs, order, batches)


def extract(encode: Callable[[Tensor], Tensor], files: Files, config: Config, image_size: int,
            device: torch.device) -> tuple[Tensor, list[int]]:
    """Features [N, e] of a file list, on the CPU in float32, and the indices of the N readable files, in every process."""
    dataset = ImageDataset(files, preprocess(image_size), config.stroke_domains)
    features, kept = [], []
    batches = share(chunks(len(files), config.eval_batch))
    for indices, images in load(dataset, batches, config.workers, config.bad_images == "skip", device):
        if len(indices):
            with torch.inference_mode(), autocast(config, device):
                features.append(encode(images.to(device, non_blocking=True)).float().cpu())
            kept += indices.tolist()
    features, kept = gather(features), gather(kept)
    if not kept:
        raise ValueError(f"none of the {len(files)} images could be read; the first is {files.paths[0]}")
    return torch.cat(features), kept
