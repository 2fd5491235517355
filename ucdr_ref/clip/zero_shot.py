"""Zero-shot CLIP: its image transform, its text for a class, and the baseline."""
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
    """CLIP's evaluation transform: image -> [3, H, W] float32."""
    return transforms.Compose([resize_crop(image_size), normalize])


def resize_crop(image_size: int) -> Transform:
    """image -> uint8 [3, H, W], RGB: short side resized (bicubic), centre crop."""
    return transforms.Compose([
        rgb, transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(image_size), transforms.PILToTensor()])


def rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """uint8 [..., 3, H, W] -> (images / 255 - mean) / std, float32."""
    return transforms.functional.normalize(images / 255, mean, std, inplace=True)


def class_to_text(name: str) -> str:
    return name.replace("_", " ")


@torch.no_grad()
def text_features(clip: CLIP, texts: Sequence[str]) -> Tensor:
    """L2-normalised features [q, e] of texts; ValueError without text tower."""
    clip.require_text()
    ids = tokenize(texts, clip.context_length).to(clip.logit_scale.device)
    return F.normalize(torch.cat([clip.encode_text(part) for part in ids.split(256)]).float(), dim=-1)


def class_text_features(clip: CLIP, class_names: Sequence[str]) -> Tensor:
    """The same of "a photo of a {name}": [c, e]; ValueError also without names."""
    if isinstance(class_names, str) or not class_names:
        raise ValueError(f"class names are {class_names!r}, not a list of one or more")
    return text_features(clip, [f"a photo of a {class_to_text(name)}" for name in class_names])


class ZeroShot(nn.Module):
    """CLIP as a method that needs no training."""

    PHASES: tuple[str, ...] = ()

    def __init__(self, clip: CLIP, normalized: bool = True) -> None:
        super().__init__()
        self.clip, self.normalized = clip.requires_grad_(False), normalized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> features [b, e]"""
        features = self.clip.encode_image(images).float()
        return F.normalize(features, dim=-1) if self.normalized else features  # D18
