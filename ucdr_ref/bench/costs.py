"""What an image costs before any training: to be read, and to be part of a closed form's fit."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..clip.zero_shot import CLIP_MEAN, CLIP_STD, ZeroShot, normalize, resize_crop
from ..demo.pretrain import random_clip
from ..images.batches import Files, ImageDataset, chunks, load
from ..machine.processes import autocast
from ..ucdr.closed_form import STRENGTHS, measure
from .peers import random_features, timed

PHOTOS, PHOTO_SIZE = 64, (500, 375)
DOMAINS = 5


def write_photos(folder: str) -> list[str]:
    """JPEG files of smooth colours, which compress as photos do."""
    generator, paths = torch.Generator().manual_seed(0), []
    for i in range(PHOTOS):
        dots = torch.randint(256, (24, 32, 3), dtype=torch.uint8, generator=generator).numpy()
        paths.append(os.path.join(folder, f"{i}.jpg"))
        Image.fromarray(dots).resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def reader(side: str, paths: list[str], image_size: int) -> Iterable[Any]:
    """Batches of a tower's input, read in this process: by ours, or by CLIP's own transform."""
    n, batches = len(paths), [list(indices) for indices in chunks(len(paths), 16)]
    if side == "plain":
        return DataLoader(PlainPhotos(paths, image_size), batch_sampler=batches)
    dataset = ImageDataset(Files(paths, [""] * n, [""] * n), resize_crop(image_size), ())
    return (normalize(images) for _, images, _ in load(dataset, batches, 0, False, torch.device("cpu")))


def measure_reading(side: str, image_size: int) -> dict[str, float]:
    """One process reading JPEG files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(folder)
        result = timed(lambda: list(reader(side, paths, image_size)), 5, torch.device("cpu"))
    return {**result, "images_per_s": PHOTOS / result["cpu_s"]}


class PlainPhotos(Dataset):
    def __init__(self, paths: list[str], size: int) -> None:
        self.paths = paths
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose([transforms.Resize(size, bicubic), transforms.CenterCrop(size),
                                             transforms.ToTensor(),
                                             transforms.Normalize(CLIP_MEAN, CLIP_STD)])

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def measure_closed_form(shape: dict[str, int], sizes: dict[str, Any],
                        device: torch.device) -> dict[str, float]:
    """A pass of the tower over a batch, and the fit of as many random features as the metrics' gallery has.

    The fit includes a form for each lambda that is tried. `passes`: CPU-seconds of pass and fit per training
    image (seconds on a GPU), in passes of the image tower.
    """
    method = ZeroShot(random_clip(**shape).eval().requires_grad_(False).to(device))
    images = torch.randn(sizes["batch"], 3, shape["image_size"], shape["image_size"], device=device)

    def encode() -> None:
        with torch.inference_mode(), autocast(sizes["precision"], device):
            method.encode(images)

    one_pass = timed(encode, sizes["steps"], device)
    features = random_features(1, sizes["sizes"][1], shape["embed_dim"])
    z, class_ids = (part.to(device) for part in features[2:])
    domain_ids = torch.arange(len(z), device=device) % DOMAINS

    def fit() -> None:
        measured = measure(z, class_ids, domain_ids, DOMAINS)
        for strength in STRENGTHS:
            measured.form(strength)

    fitted = timed(fit, 1, device)
    clock = "wall_s" if device.type == "cuda" else "cpu_s"
    image, share = one_pass[clock] / sizes["batch"], fitted[clock] / len(z)
    return {"pass_s_per_image": image, "fit_s": fitted[clock], "fit_s_per_image": share,
            "images": len(z), "passes": (image + share) / image, "memory_gib": fitted["memory_gib"]}
