"""Writers of weight files in every format, and of hostile ones."""
from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import to_hugging_face
from ucdr_ref.clip.load import load_clip

SMALL = dict(vocab_size=40, context_length=8, vision_layers=1, text_layers=1, image_size=16)


class Tree(nn.Module):
    """Holds a state dict as nested modules, so that TorchScript saves it under the same names."""

    def __init__(self, sd: dict[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for key, value in sd.items():
            first, _, rest = key.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = value
            elif value.is_floating_point():
                self.register_parameter(first, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(first, value)
        for name, entries in children.items():
            self.add_module(name, Tree(entries))

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def script(module: nn.Module, path: Path, *example: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and the tracer talks about constants
        torch.jit.trace(module, example or (torch.zeros(1),), check_trace=False).save(str(path))


def save_legacy(obj: object, path: Path) -> None:
    torch.save(obj, path, _use_new_zipfile_serialization=False)


WRITERS = {"torchscript": lambda sd, path: script(Tree(sd), path), "zip": torch.save, "legacy": save_legacy,
           "safetensors": save_file, "hugging_face": lambda sd, path: save_file(to_hugging_face(sd), path)}


def equal(model: nn.Module, sd: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    found = model.state_dict()
    return found.keys() == sd.keys() and all(torch.equal(found[key], sd[key].to(dtype)) for key in sd)


def refusal(path: Path, **options) -> str:
    """The sentence with which `load_clip` refuses a file."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_clip(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 3000
    return message


def rewrite(path: Path, change, **options) -> None:
    """Replaces members of a zip archive: change(name, data) -> data."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            archive.writestr(name, change(name, data))


def with_pickle(data: bytes, source: bytes, path: Path) -> Path:
    """A torch archive whose data.pkl is `data`."""
    path.write_bytes(source)
    rewrite(path, lambda name, old: data if name.endswith("/data.pkl") else old)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def claim(size, stride, *, offset=0, count=4, key="0", storage="FloatStorage") -> bytes:
    """A tensor with these claims, as the instructions that torch.save writes."""
    sizes, strides = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu")
            + number(count) + b"tQ" + number(offset) + sizes + strides + b"\x89ccollections\nOrderedDict\n)RtR")


def tensor_pickle(size, stride, **options) -> bytes:
    return b"\x80\x02}" + text("visual.conv1.weight") + claim(size, stride, **options) + b"s."


def hostile_archives(folder: Path, torchscript: bytes) -> list[Path]:
    torch.save({"a": torch.zeros(4)}, folder / "base")
    base = (folder / "base").read_bytes()
    deep = 100_000
    nested_key = b"\x80\x02}" + b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100)) + b"Ns."
    module = b"c__torch__.a\nB\n)\x81"
    fan = b"\x80\x02" + module + b"".join(
        b"q" + bytes([i]) + module + b"}(" + text("x") + b"h" + bytes([i]) + text("y") + b"h" + bytes([i]) + b"ub"
        for i in range(60)) + b"."
    programs = {
        "stride0": tensor_pickle((1 << 20, 1 << 20, 3, 1), (0, 0, 0, 0)), "size": tensor_pickle((5,), (1,)),
        "negative-offset": tensor_pickle((2,), (1,), offset=-1), "negative-size": tensor_pickle((-2,), (1,)),
        "negative-stride": tensor_pickle((2,), (-1,)), "offset": tensor_pickle((2,), (1,), offset=1 << 62),
        "overflow": tensor_pickle((1 << 62, 8), (1, 1)), "overflow-stride": tensor_pickle((2,), (1 << 62,)),
        "rank": tensor_pickle((1,) * 2000, (1,) * 2000), "numel": tensor_pickle((4,), (1,), count=1 << 40),
        "negative-numel": tensor_pickle((4,), (1,), count=-4), "float-size": tensor_pickle((2.0,), (1,)),
        "other-key": tensor_pickle((4,), (1,), key="../data/0"), "absent-key": tensor_pickle((4,), (1,), key="7"),
        "dtype": tensor_pickle((4,), (1,), storage="QInt8Storage"), "stride-rank": tensor_pickle((4,), (1, 1)),
        "deep-list": b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b".",
        "deep-tuple": b"\x80\x02)" + b"\x85" * deep + b".", "many": b"\x80\x02" + b"]" * 1_100_000 + b".",
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.", "text": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
        "hash": nested_key, "fan": fan, "build": b"\x80\x02ccollections\nOrderedDict\n}X\1\0\0\0aNsb.",
        "cycle": b"\x80\x02" + module + b"q\0}X\1\0\0\0xh\0sb.", "call-tensor": b"\x80\x02" + claim((4,), (1,)) + b")R.",
        "call-storage": b"\x80\x02ctorch\nFloatStorage\nK\4\x85R.",
        "persid": b"\x80\x02X\1\0\0\0aQ.", "protocol4": pickle.dumps({}, 4),
        "getattr": b"\x80\x02cbuiltins\ngetattr\n.", "dotted": b"\x80\x02c__torch__\nos.system\nX\1\0\0\0a\x85R.",
        "stop": b".", "none": b"", "text-opcode": b"(dp0\n.", "pop": b"\x80\x02000.", "inst": b"(S'ls'\nios\nsystem\n."}
    made = [with_pickle(program, base, folder / f"pickle-{name}") for name, program in programs.items()]

    def archive(name: str, data: bytes) -> None:
        made.append(folder / name)
        made[-1].write_bytes(data)

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a/data.pkl", tensor_pickle((4, 3, 1 << 11, 1 << 10), (3 << 21, 1 << 21, 1 << 10, 1), count=12 << 21))
        zipped.writestr("a/data/0", bytes(4 * 12 << 21))
    archive("zip-bomb", bomb.getvalue())
    directory = base.rindex(b"PK\1\2", 0, base.rindex(b"base/data/0"))  # its entry in the central directory
    for name, size in (("huge", 0xFFFFFFF0), ("zip64", 0xFFFFFFFF), ("larger", 1 << 20)):
        changed = bytearray(base)
        changed[directory + 20:directory + 28] = struct.pack("<II", size, size)
        archive(f"zip-{name}", changed)
    changed = bytearray(base)
    changed[directory + 42:directory + 46] = struct.pack("<I", 0xFFFFFF00)
    archive("zip-offset", changed)
    double = io.BytesIO()
    with zipfile.ZipFile(double, "w") as zipped, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for program in (programs["size"], b"\x80\x02}."):
            zipped.writestr("a/data.pkl", program)
    archive("zip-twice", double.getvalue())
    overlap = io.BytesIO()
    count = 2000
    with zipfile.ZipFile(overlap, "w") as zipped:  # 2,000 names for the same 4 MB
        items = b"".join(text(f"{i}") + claim((1 << 20,), (1,), count=1 << 20, key=f"{i}") for i in range(count))
        zipped.writestr("a/data.pkl", b"\x80\x02}(" + items + b"u.")
        zipped.writestr("a/data/0", bytes(4 << 20))
        same = zipped.getinfo("a/data/0")
        for i in range(1, count):
            twin = zipfile.ZipInfo(f"a/data/{i}")
            twin.header_offset, twin.file_size, twin.compress_size, twin.CRC = same.header_offset, 4 << 20, 4 << 20, same.CRC
            zipped.filelist.append(twin)
    archive("zip-overlap", overlap.getvalue())
    return made


def safetensors_bytes(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def hostile_safetensors() -> dict[str, tuple[bytes, str]]:
    def entry(begin, end, shape=(2,), dtype="F32"):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

    good = entry(0, 8)
    return {
        "overlap": (safetensors_bytes({"a": good, "b": entry(4, 16, (3,))}), "its neighbours"),
        "same": (safetensors_bytes({"a": entry(0, 16, (4,)), "b": entry(0, 16, (4,))}), "its neighbours"),
        "gap": (safetensors_bytes({"a": good, "b": entry(12, 16, (1,))}), "its neighbours"),
        "negative": (safetensors_bytes({"a": entry(-8, 0)}), "negative offsets"),
        "negative-shape": (safetensors_bytes({"a": entry(0, 8, (-1, -2))}), "malformed shape"),
        "reversed": (safetensors_bytes({"a": entry(8, 0)}), "does not fit"),
        "past-end": (safetensors_bytes({"a": entry(0, 1 << 40, (1 << 38,))}), "does not fit"),
        "wrong-size": (safetensors_bytes({"a": entry(0, 16)}), "does not fit"),
        "rest": (safetensors_bytes({"a": good}), "belong to no tensor"),
        "dtype": (safetensors_bytes({"a": entry(0, 8, dtype="F8_E4M3")}), "unknown dtype F8_E4M3"),
        "dtype-list": (safetensors_bytes({"a": entry(0, 8, dtype=["F32"])}), "damaged"),
        "bool-shape": (safetensors_bytes({"a": entry(0, 8, (True, 2))}), "malformed"),
        "float-offset": (safetensors_bytes({"a": entry(0.0, 8)}), "malformed"),
        "rank": (safetensors_bytes({"a": entry(0, 4, (1,) * 100_000)}), "malformed"),
        "huge-number": (safetensors_bytes(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
                        "damaged"),
        "header-past-end": (safetensors_bytes({"a": good}, length=1000), "claims a header of 1000 bytes"),
        "header-huge": (safetensors_bytes({"a": good}, length=1 << 40), "claims a header"),
        "header-max": (safetensors_bytes({"a": good}, length=(1 << 64) - 1), "unknown kind"),
        "duplicate": (safetensors_bytes(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
                                        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'), "one key twice"),
        "nesting": (safetensors_bytes(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "RecursionError"),
        "not-json": (safetensors_bytes(b'{"a": nothing}'), "damaged"), "not-utf8": (safetensors_bytes(b'{"\xff": 1}'), "damaged"),
        "list": (safetensors_bytes({"a": [1, 2]}), "damaged"),
        "no-offsets": (safetensors_bytes({"a": {"dtype": "F32"}}), "damaged"),
        "three-offsets": (safetensors_bytes({"a": {**good, "data_offsets": [0, 4, 8]}}), "damaged"),
        "mixed": (safetensors_bytes({"a": good, "b": {**good, "data_offsets": "ab"}}), "damaged"),
        "none": (safetensors_bytes({}, b""), "holds nothing"),
        "name": (safetensors_bytes({"a\n\x1b[31m" * 1000: entry(0, 16, (4,), "I32")}), "not a tensor of floating")}
