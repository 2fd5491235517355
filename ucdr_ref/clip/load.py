"""CLIP from a weight file of any usual format."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .model import CLIP, IGNORED_KEYS
from .tensorfile import FormatError, file_digest, read_any, regular_file, show, tidy, unreadable

OPENAI_SHA256 = {  # published: also part of OpenAI's download addresses
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}
EXPECTED = ("expected ViT CLIP weights: OpenAI's TorchScript archive, a state dict saved by torch.save, or "
            "safetensors (weights/README.md says where to get them)")
WRAPPERS = ("state_dict", "model_state_dict", "model")
HUGGING_FACE = {  # part of a name -> OpenAI's, in this order
    "vision_model.": "visual.", "text_model.": "", "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.", "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.", "post_layernorm.": "ln_post.", "final_layer_norm.": "ln_final.",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
    "encoder.layers.": "transformer.resblocks.",
    ".self_attn.q_proj.": ".attn.in_proj_", ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj."}


def load_clip(path: str | os.PathLike[str], heads: int | tuple[int, int] | None = None, verify: bool = True,
              dtype: torch.dtype = torch.float32) -> CLIP:
    """CLIP from a weight file, whose format is told from its content; nothing in it is executed.

    Formats: OpenAI's TorchScript archive; a state dict of torch.save, alone or under `state_dict`,
    `model_state_dict` or `model`, with or without a `module.` prefix; safetensors. Names: OpenAI's /
    open_clip's, or Hugging Face's `CLIPModel`.
    heads: of both towers, or (vision, text); width / 64 when None. dtype: of the parameters (files are often
    float16). verify: a file that bears the name of one of OpenAI's must have its digest. Raises
    FileNotFoundError, or ValueError that says what the file is, what was expected and where to get it.
    """
    file = regular_file(path, f"; {EXPECTED}")
    expected = OPENAI_SHA256.get(file.name)
    if verify and expected is not None and (found := file_digest(file)) != expected:
        raise ValueError(f"{show(file)} is not OpenAI's {file.name}: its sha256 is {found}, not {expected}; "
                         "download it again (weights/README.md), rename it, or load it with --no-verify")
    try:
        weights = openai_names(read_any(file))
        if (total := sum(value.nbytes for value in weights.values())) > 2 * file.stat().st_size:
            raise FormatError(f"names {total} bytes of tensors, more than twice its own size: "
                              "they share their storage")
        model = CLIP.from_state_dict(weights, heads, dtype)
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
        name = show(file) if isinstance(error, FormatError) else f"{show(file)}:"
        raise ValueError(f"{name} {tidy(error)}; {EXPECTED}") from error
    for key, value in model.state_dict().items():
        if not torch.isfinite(torch.stack(torch.aminmax(value))).all():
            raise ValueError(f"{show(file)}: {key} holds values that are not finite in {dtype}; get the file "
                             "again (weights/README.md)")
    return model


def openai_names(content: Any) -> dict[str, Tensor]:
    """The CLIP state dict within what a weight file held, under OpenAI's names.

    Raises FormatError when there is none, or an entry is not a tensor of floating point numbers.
    """
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(inner := content.get(name), Mapping):
            content = inner
    if not (isinstance(content, Mapping) and content and all(isinstance(key, str) for key in content)):
        kind = "nothing" if content in (None, {}) else f"a {type(content).__name__}"
        raise FormatError(f"holds {kind} rather than a state dict of tensors by name")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    weights = {}
    for key, value in content.items():
        if key in IGNORED_KEYS or key.rpartition(".")[2] in ("position_ids", "attn_mask"):
            continue  # constants that some writers keep
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            kind = f"of type {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise FormatError(f"has an entry {key[:100]} that is {kind}, "
                              "not a tensor of floating point numbers")
        weights[key] = value
    if any(key.startswith(("vision_model.", "text_model.")) for key in weights):
        return from_hugging_face(weights)
    return weights


def from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `CLIPModel` state dict under OpenAI's names: q, k, v stacked, both projections transposed."""
    renamed = {}
    for key, value in weights.items():
        if match := re.fullmatch(r"(.+\.self_attn\.)[qkv](_proj\.(?:weight|bias))", key):
            names = [f"{match[1]}{letter}{match[2]}" for letter in "qkv"]
            if absent := [name for name in names if name not in weights]:
                raise FormatError(f"is not a complete CLIPModel: missing keys {', '.join(absent)}")
            if key != names[0]:
                continue  # stacked below its q
            value = torch.cat([weights[name] for name in names])
        elif key in ("visual_projection.weight", "text_projection.weight"):
            value = value.t().contiguous()
        for part, name in HUGGING_FACE.items():
            key = key.replace(part, name)
        renamed[key] = value
    return renamed
