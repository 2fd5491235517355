"""CLIP from a weight file of any usual format, told by its content. Nothing in a file is executed."""
import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import CLIP

OPENAI_SHA256 = {  # as published
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}
EXPECTED = ("expected a ViT CLIP: OpenAI's TorchScript archive, a state dict of torch.save, or safetensors "
            "(weights/README.md says where to get them)")
SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
KNOWN = {  # what a TorchScript archive's pickle may ask for
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64,
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2":
        lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)}
IGNORED = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
HUGGING_FACE = {  # part of a name -> OpenAI's, in this order
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "", "patch_embedding.": "conv1.",
    "position_embedding.weight": "positional_embedding", "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.", "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.", "layer_norm": "ln_", "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.": "attn.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj."}


def load_clip(path: str | Path) -> CLIP:
    """CLIP, frozen, in float32, from a file of a kind that EXPECTED names.

    Raises FileNotFoundError; ValueError for a damaged file, one of another kind, and one named as OpenAI's
    with another digest.
    """
    file = check_file(path, f"; {EXPECTED}")
    digest = OPENAI_SHA256.get(file.name)
    if digest and (found := file_digest(file)) != digest:
        raise ValueError(f"{file} is not OpenAI's: its sha256 is {found}, not {digest}; download it again "
                         "or, if it is another model, rename it (weights/README.md)")
    try:
        model = CLIP.from_state_dict(openai_names(read_tensors(file)))
        for key, value in model.state_dict().items():
            if not value.isfinite().all() or value.dim() > 1 and not value.any():
                raise ValueError(f"{key} is all zero or not finite: an unfinished download?")
    except Exception as error:  # a broken file can make a parser raise anything
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's message advises to trust the file
            reason = "a damaged pickle, or one of other things than weights"
        raise ValueError(f"{file} is not usable ({' '.join(reason.split())[:1500]}); {EXPECTED}") from error
    return model


def read_tensors(file: Path) -> Any:
    """What a weight file holds."""
    with open(file, "rb") as stream:
        head = stream.read(40)
    if is_zip := head.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            folder = archive.namelist()[0].partition("/")[0]
            if f"{folder}/constants.pkl" in archive.namelist():
                return read_torchscript(archive, folder)
    if is_zip or head.startswith(b"\x80\x02\x8a\n"):  # torch.save before version 1.6
        return torch.load(file, "cpu", weights_only=True, mmap=is_zip)
    if head[8:9] == b"{":
        return read_safetensors(file)
    raise ValueError(f"it begins with {head!r}")


def read_torchscript(archive: zipfile.ZipFile, folder: str) -> dict[str, Tensor]:
    """The tensors of a module and its submodules by attribute path; the archive's code is not read."""
    class Module:
        """Stands in for any TorchScript class."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("__torch__"):
                return Module
            if module == "torch.jit._pickle":  # typed lists
                return lambda value, *_: value
            return KNOWN[f"{module}.{name}"]

        def persistent_load(self, claim: Any) -> Tensor:
            _, dtype, key, *_ = claim
            return torch.frombuffer(bytearray(archive.read(f"{folder}/data/{key}")), dtype=dtype)

    def tensors(module: Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from tensors(value, f"{prefix}{name}.")

    with archive.open(f"{folder}/data.pkl") as stream:
        return dict(tensors(Reader(stream).load()))


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Length of the header (8 bytes), JSON header {name: dtype, shape, data_offsets}, data"""
    content = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)  # mapped, not read
    start = 8 + int.from_bytes(content[:8].tolist(), "little")
    header = json.loads(bytes(content[8:start].tolist()))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        flat = content[start + begin : start + end].clone().view(SAFETENSORS[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])
    return tensors


def openai_names(content: Any) -> dict[str, Tensor]:
    """The state dict within what a file held, under OpenAI's names; ValueError when there is none."""
    for name in ("state_dict", "model_state_dict", "model"):
        content = content.get(name, content)
    weights = {}
    for key, value in content.items():
        name = key.removeprefix("module.")
        if name.endswith(IGNORED) or ".k_proj." in name or ".v_proj." in name:
            continue
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise ValueError(f"its entry {key!r} is not a floating-point tensor")
        if ".q_proj." in name:
            value = torch.cat([content[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        elif name in ("visual_projection.weight", "text_projection.weight"):
            value = value.t()
        for part, ours in HUGGING_FACE.items():
            name = name.replace(part, ours)
        weights[name] = value
    return weights


def check_file(path: str | Path, advice: str = "") -> Path:
    """Raises FileNotFoundError, which ends in `advice`."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} {'is no file' if file.exists() else 'does not exist'}{advice}")
    return file


def file_digest(path: str | Path) -> str:
    """sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: str | Path, advice: str = "") -> str:
    """A UTF-8 file's text. Raises as `check_file`, ValueError for other bytes."""
    file = check_file(path, advice)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text{advice}") from None
