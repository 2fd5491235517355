"""CLIP from a weight file of any usual format, told from its content. Nothing in a file is executed."""
from __future__ import annotations

import hashlib
import json
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import CLIP

OPENAI_SHA256 = {  # published: also part of OpenAI's download addresses
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}
EXPECTED = ("expected ViT CLIP weights: OpenAI's TorchScript archive, a state dict saved by torch.save, or "
            "safetensors (weights/README.md says where to get them)")
OTHER_KINDS = {b"\x89PNG": "a PNG image", b"<": "a web page", b"version https://git-lfs": "a Git LFS pointer"}
SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
KNOWN = {  # all that a TorchScript archive's pickle may ask for besides its modules
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64,
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2":
        lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)}
CONSTANTS = ("input_resolution", "context_length", "vocab_size")  # that some writers keep
HUGGING_FACE = {  # part of a name -> OpenAI's, in this order
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "", "patch_embedding.": "conv1.",
    "position_embedding.weight": "positional_embedding", "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.", "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.", "layer_norm": "ln_", "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.": "attn.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj."}


def load_clip(path: str | os.PathLike[str], heads: int | None = None,
              dtype: torch.dtype = torch.float32) -> CLIP:
    """CLIP, frozen, from OpenAI's TorchScript archive, a state dict of torch.save, or safetensors.

    heads: of both towers; width / 64 when None. dtype: of the parameters (files are often float16). Raises
    FileNotFoundError, or ValueError that says what the file is, what was expected and where to get it; also
    for a file that bears the name of one of OpenAI's and has another digest.
    """
    file = check_file(path, f"; {EXPECTED}")
    digest = OPENAI_SHA256.get(file.name)
    if digest is not None and (found := file_digest(file)) != digest:
        raise ValueError(f"{file} is not OpenAI's {file.name}: its sha256 is {found}, not {digest}; "
                         "download it again (weights/README.md), or rename it if it is another model")
    try:
        model = CLIP.from_state_dict(openai_names(read_tensors(file)), heads, dtype)
        for key, value in model.state_dict().items():
            if not value.isfinite().all() or value.dim() > 1 and not value.any():
                raise ValueError(f"{key} is all zero or not finite in {dtype}: an unfinished download?")
    except Exception as error:  # whatever a broken file makes a parser do is a fact about the file
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's message advises to trust the file
            reason = "a damaged pickle, or one of other things than weights"
        elif type(error) is not ValueError:  # not a sentence of ours
            reason = f"truncated or damaged ({type(error).__name__}: {reason})"
        raise ValueError(f"{file}: {reason}; {EXPECTED}") from error
    return model


def read_tensors(file: Path) -> Any:
    """What a weight file of any kind holds: usually a dict of tensors by name."""
    with open(file, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            members = {name.partition("/")[2]: name for name in archive.namelist()}
            if "constants.pkl" in members:
                return read_torchscript(archive, members)
        if "data.pkl" not in members:
            raise ValueError("a zip archive that PyTorch did not write")
        return torch.load(file, "cpu", weights_only=True, mmap=True)
    if head.startswith(b"\x80\x02\x8a\n"):  # torch.save before version 1.6
        return torch.load(file, "cpu", weights_only=True)
    if head[8:9] == b"{":
        return read_safetensors(file)
    for start, kind in OTHER_KINDS.items():
        if head.startswith(start):
            raise ValueError(kind)
    raise ValueError(f"of an unknown kind: it begins with {head[:8].hex(' ')}" if head else "an empty file")


def read_torchscript(archive: zipfile.ZipFile, members: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a module and its submodules by attribute path; the archive's code is not looked at."""
    class Module:
        """Inert stand-in for any TorchScript class: its attributes and nothing else."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("__torch__"):
                return Module
            if module == "torch.jit._pickle":  # typed lists
                return lambda value, *_: value
            if f"{module}.{name}" not in KNOWN:
                raise pickle.UnpicklingError(f"{module}.{name}")
            return KNOWN[f"{module}.{name}"]

        def persistent_load(self, claim: Any) -> Tensor:
            _, dtype, key, *_ = claim  # "storage", dtype, key, device, number of elements
            return torch.frombuffer(bytearray(archive.read(members[f"data/{key}"])), dtype=dtype)

    def tensors(module: Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from tensors(value, f"{prefix}{name}.")

    with archive.open(members["data.pkl"]) as stream:
        return dict(tensors(Reader(stream).load()))


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Length of the header (8 bytes), JSON header {name: dtype, shape, data_offsets}, data."""
    with open(file, "rb") as stream:
        content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if start + end > len(content):
            raise ValueError(f"truncated: {name!r} ends at byte {start + end} of {len(content)}")
        flat = torch.frombuffer(content[start + begin : start + end], dtype=SAFETENSORS[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])  # RuntimeError for data of another size
    return tensors


def openai_names(content: Any) -> dict[str, Tensor]:
    """The CLIP state dict within what a file held, under OpenAI's names; ValueError when there is none.

    Of Hugging Face's `CLIPModel`, q, k, v are stacked and both projections transposed.
    """
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"it holds a {type(content).__name__} that is no state dict of tensors by name")
    weights = {}
    for key, value in content.items():
        name = str(key).removeprefix("module.")
        if name in CONSTANTS or name.endswith(("position_ids", "attn_mask")):
            continue
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise ValueError(f"its entry {key!r} is not a tensor of floating point numbers")
        if ".k_proj." in name or ".v_proj." in name:
            continue  # stacked below q
        if ".q_proj." in name:
            value = torch.cat([content[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        elif name in ("visual_projection.weight", "text_projection.weight"):
            value = value.t()
        for part, ours in HUGGING_FACE.items():
            name = name.replace(part, ours)
        weights[name] = value
    return weights


def check_file(path: str | os.PathLike[str], advice: str = "") -> Path:
    """`path` where a file is; FileNotFoundError, or ValueError for a folder, which end in `advice`."""
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist{advice}")
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a file{advice}")
    return file


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, in hexadecimal. Raises as `check_file`, and OSError."""
    digest = hashlib.sha256()
    with open(check_file(path), "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: str | os.PathLike[str], advice: str = "") -> str:
    """A UTF-8 file's text, less a byte order mark. Raises as `check_file`, ValueError for other bytes."""
    file = check_file(path, advice)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}){advice}") from None


def one_line(error: BaseException) -> str:
    """An error's message on one line, of at most 1,500 characters."""
    text = str(error) or type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text)[:1500]
