"""CLIP's ViT towers (read `model` first), tokenizer, weight files; needs torch, torchvision and Pillow."""
from .model import CLIP
from .tokenizer import tokenize
from .weights import load_clip
from .zero_shot import ZeroShot, class_text_features, preprocess

__all__ = ["CLIP", "ZeroShot", "class_text_features", "load_clip", "preprocess", "tokenize"]
