"""CLIP as it is: its image transform, its text for a class, and the zero-shot baseline behind a method's `encode`."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from .model import CLIP
from .tokenizer import tokenize

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Transform = Callable[[Image.Image], Tensor]


def preprocess(image_size: int) -> Transform:
    """CLIP's evaluation transform: RGB image -> [3, H, W], short side resized (bicubic), centre crop, CLIP's mean and std."""
    return transforms.Compose([
        transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC, antialias=True), transforms.CenterCrop(image_size),
        transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])


def readable(name: str) -> str:
    """A class folder's name as text: underscores become spaces."""
    return name.replace("_", " ")


def class_text_features(clip: CLIP, class_names: Sequence[str], chunk: int = 256) -> Tensor:
    """L2-normalised features [c, e] of "a photo of a {name}", without gradient; ValueError when there is no text tower."""
    clip.require_text()
    ids = tokenize([f"a photo of a {readable(name)}" for name in class_names], clip.context_length)
    with torch.no_grad():
        features = [clip.encode_text(part.to(clip.logit_scale.device)) for part in ids.split(chunk)]
    return F.normalize(torch.cat(features).float(), dim=-1)


class ZeroShot(nn.Module):
    """CLIP as it is, behind a method's `encode`: the baseline, with features L2-normalised or as they are (D18)."""

    def __init__(self, clip: CLIP, normalized: bool = True) -> None:
        super().__init__()
        self.clip, self.normalized = clip.requires_grad_(False), normalized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> features [b, e]."""
        features = self.clip.encode_image(images).float()
        return F.normalize(features, dim=-1) if self.normalized else features  # D18
