"""CLIP from a weight file of any usual format."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .model import CLIP, IGNORED_KEYS
from .tensorfile import FormatError, file_digest, read_any, regular_file, show, tidy

OPENAI_SHA256 = {  # published: also part of OpenAI's download addresses
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}
EXPECTED = ("expected ViT CLIP weights: OpenAI's TorchScript archive, a state dict saved by torch.save, or "
            "safetensors (weights/README.md says where to get them)")
WRAPPERS = ("state_dict", "model_state_dict", "model")
HUGGING_FACE = {  # patterns are full matches; (1) is the layer
    r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"vision_model\.embeddings\.patch_embedding\.weight": "visual.conv1.weight",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"vision_model\.pre_layrnorm\.(weight|bias)": r"visual.ln_pre.\1",
    r"vision_model\.post_layernorm\.(weight|bias)": r"visual.ln_post.\1",
    r"visual_projection\.weight": "visual.proj",
    r"text_model\.embeddings\.token_embedding\.weight": "token_embedding.weight",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.final_layer_norm\.(weight|bias)": r"ln_final.\1",
    r"text_projection\.weight": "text_projection"}
HUGGING_FACE_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
BLOCK_PARTS = {"self_attn.out_proj": "attn.out_proj.", "layer_norm1": "ln_1.", "layer_norm2": "ln_2.",
               "mlp.fc1": "mlp.c_fc.",
               "mlp.fc2": "mlp.c_proj.", "self_attn.q_proj": "attn.in_proj_"}


def load_clip(path: str | os.PathLike[str], heads: int | tuple[int, int] | None = None, verify: bool = True,
              dtype: torch.dtype = torch.float32) -> CLIP:
    """CLIP from a weight file; the format is told from the content, never from the name, and nothing in it is
    executed.

    Formats: OpenAI's TorchScript archive; a state dict of torch.save, alone or under `state_dict`,
    `model_state_dict` or `model`, with or without a `module.` prefix; safetensors. Names: OpenAI's /
    open_clip's, or Hugging Face's `CLIPModel`.
    heads: of both towers, or (vision, text); width / 64 when None. dtype: of the parameters (files are often
    float16).
    verify: compare the digest of a file that bears the name of one of OpenAI's files, and the checksums of a
    zip archive. Raises FileNotFoundError, or ValueError that says what the file is, what was expected and
    where to get it.
    """
    file = regular_file(path, f"; {EXPECTED}")
    expected = OPENAI_SHA256.get(file.name)
    if verify and expected is not None and (found := file_digest(file)) != expected:
        raise ValueError(f"{show(file)} is not OpenAI's {file.name}: its sha256 is {found}, the published "
                         f"one {expected}; "
                         "download it again (weights/README.md), rename it, or load it unverified "
                         "(--no-verify)")
    try:
        weights = openai_names(read_any(file, checksums=verify))
        if (total := sum(value.nbytes for value in weights.values())) > 2 * file.stat().st_size:
            raise FormatError(f"names {total} bytes of tensors, more than twice its own size: they share "
                              f"their storage")
        model = CLIP.from_state_dict(weights, heads, dtype)
    except FormatError as error:
        raise ValueError(f"{show(file)} {tidy(error)}; {EXPECTED}") from error
    except OSError as error:
        raise ValueError(f"{show(file)} cannot be read ({error.strerror or error})") from error
    except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"{show(file)}: {tidy(error)}; {EXPECTED}") from error
    for key, value in model.state_dict().items():
        if not torch.isfinite(torch.stack(torch.aminmax(value))).all():
            raise ValueError(f"{show(file)}: {key} holds values that are not finite in {dtype}; get the file "
                             f"again "
                             "(weights/README.md)")
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
        last = key.rpartition(".")[2]
        if key in IGNORED_KEYS or last in ("position_ids", "attn_mask"):  # constants that some writers keep
            continue
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            found = f"of type {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise FormatError(f"has an entry {key[:100]} that is {found}, not a tensor of floating point "
                              f"numbers")
        weights[key] = value
    if any(key.startswith(("vision_model.", "text_model.")) for key in weights):
        return from_hugging_face(weights)
    return weights


def from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `CLIPModel` state dict under OpenAI's names: q, k, v stacked, both projections transposed, other
    keys as they are.
    """
    renamed = {}
    for key, value in weights.items():
        if match := HUGGING_FACE_BLOCK.fullmatch(key):
            tower, layer, part, kind = match.groups()
            if part in ("self_attn.k_proj",
                        "self_attn.v_proj") and key.replace(part, "self_attn.q_proj") in weights:
                continue  # stacked below its q_proj
            if part == "self_attn.q_proj":
                names = [key.replace(part, f"self_attn.{letter}_proj") for letter in "qkv"]
                if absent := [name for name in names if name not in weights]:
                    raise FormatError(f"is not a complete CLIPModel: missing keys {', '.join(absent)}")
                value = torch.cat([weights[name] for name in names])
            if part in BLOCK_PARTS:
                prefix = "visual." if tower == "vision" else ""
                key = f"{prefix}transformer.resblocks.{layer}.{BLOCK_PARTS[part]}{kind}"
        else:
            if key in ("visual_projection.weight", "text_projection.weight") and value.dim() == 2:
                value = value.t().contiguous()
            for pattern, name in HUGGING_FACE.items():
                if match := re.fullmatch(pattern, key):
                    key = match.expand(name)
                    break
        renamed[key] = value
    return renamed
