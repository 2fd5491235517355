"""Features of image files by any method's `encode`; several processes share the work."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..clip.zero_shot import preprocess
from ..config import Config
from ..machine.processes import autocast, gather, share
from .batches import Files, ImageDataset, chunks, load
from .cache import EncodePaths


def extract(encode: Callable[[Tensor], Tensor], files: Files, config: Config, image_size: int,
            device: torch.device) -> tuple[Tensor, list[int]]:
    """Features [N, e] of a file list, on the CPU in float32, and the indices of the N readable files, in every process."""
    dataset = ImageDataset(files, preprocess(image_size), config.stroke_domains,
                           as_is=config.image_reading == "as-is")
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
        dataset = ImageDataset(files, preprocess(image_size), (*config.stroke_domains, "strokes"),
                               as_is=config.image_reading == "as-is")
        for indices, images in load(dataset, chunks(len(paths), config.eval_batch), config.workers, True, device):
            if len(indices):
                with torch.inference_mode(), autocast(config.precision, device):
                    yield indices, encode(images.to(device, non_blocking=True)).float()

    return encode_paths
