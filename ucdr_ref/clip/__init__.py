"""CLIP's two ViT towers, tokenizer and weight files; stands alone: torch, torchvision and Pillow are enough.

Read `model` first (towers, from Radford et al. 2021), then `zero_shot` (image transform, "a photo of a
{name}") and `weights` (files of any usual format, none of them executed); `linear` is an exact saving.
"""
from .model import CLIP
from .tokenizer import tokenize
from .weights import load_clip
from .zero_shot import ZeroShot, class_text_features, preprocess

__all__ = ["CLIP", "ZeroShot", "class_text_features", "load_clip", "preprocess", "tokenize"]
