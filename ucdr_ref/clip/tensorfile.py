"""Tensor files read without executing anything: TorchScript archives, `torch.save` files of both layouts, and
safetensors.

Every size that a file claims is checked against the file before memory is taken: storages lie inside the
file, tensors inside their storage, and all of them together are bounded by the file's size.
"""
from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .unpickle import MAX_NAME, MAX_RANK, FormatError, Instance, is_size, unpickle

LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # with which torch.save began before 1.6
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
               "U8": torch.uint8, "BOOL": torch.bool}
NOT_WEIGHTS = {b"\x89PNG": "is a PNG image", b"\xff\xd8\xff": "is a JPEG image",
               b"\x1f\x8b": "is a gzip archive", b"<": "is a web page or XML", b"{": "is JSON text",
               b"version https://git-lfs": "is a Git LFS pointer, not the file itself",
               b"\x80": "is a pickle that torch.save did not write"}
MAX_HEADER = 10_000_000  # bytes of a safetensors header; CLIP's are below 100,000
DAMAGED = "(truncated or damaged)"
TOO_MUCH = f"claims more tensor data than it holds {DAMAGED}"
BIG_ENDIAN = "was written on a big-endian machine; save it again on a little-endian one"


def read_any(path: Path) -> Any:
    """What a tensor file holds: usually a dict; of a TorchScript archive, its tensors by attribute path.

    The tensors are in memory of their own. Raises FormatError, with a reason but without the path.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        file.seek(0)
        if head.startswith(b"PK\x03\x04"):
            reader = read_zip
        elif head.startswith(LEGACY_MAGIC):
            reader = read_legacy
        elif head[8:9] == b"{" and b"\0" in head[:8]:
            reader = read_safetensors
        else:
            kinds = [text for start, text in NOT_WEIGHTS.items() if head.startswith(start)]
            kinds.append(f"is of an unknown kind (its first bytes are {head[:8].hex(' ')})")
            raise FormatError(kinds[0] if head else "is empty")
        try:
            return reader(file, os.fstat(file.fileno()).st_size)
        except FormatError:
            raise
        except Exception as error:  # whatever a broken file makes a parser do is a fact about the file
            raise FormatError(f"is truncated or damaged ({type(error).__name__}: {error})") from error


def read_zip(file: BufferedReader, size: int) -> Any:
    """`PREFIX/data.pkl` and `PREFIX/data/KEY` of a torch.save or TorchScript archive, stored uncompressed."""
    archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise FormatError("is a zip archive that holds two members of one name")
    if sum(member.compress_size for member in members.values()) > size:
        raise FormatError(TOO_MUCH)
    roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise FormatError("is a zip archive, but not one that PyTorch wrote (it holds no data.pkl)")
    prefix = roots[0].removesuffix("data.pkl")

    @functools.cache
    def content(name: str) -> bytearray:
        label = f"is a zip archive whose member {name[:MAX_NAME]}"
        if (member := members.get(prefix + name)) is None:
            raise FormatError(f"{label} is missing {DAMAGED}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise FormatError(f"{label} is a compressed member; PyTorch stores members as they are")
        try:
            return bytearray(archive.read(member))
        except (zipfile.BadZipFile, EOFError) as error:
            raise FormatError(f"{label} is damaged: it does not match the stored checksum") from error

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        found = content("data/" + key)
        if count * dtype.itemsize > len(found):
            raise FormatError(f"claims {count} elements of {dtype} in its member data/{key}, which holds "
                              f"{len(found)} bytes")
        return vector(found, dtype, count)

    if prefix + "byteorder" in members and content("byteorder") != b"little":
        raise FormatError(BIG_ENDIAN)
    root = unpickle(content("data.pkl"), storage)
    return dict(tensors_below(root, "")) if isinstance(root, Instance) else root


def vector(content: bytearray, dtype: torch.dtype, count: int) -> Tensor:
    """The first `count` elements, little-endian."""
    return torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def tensors_below(module: Instance, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(attribute path, tensor) of a TorchScript module and its submodules."""
    for name, value in module.attributes.items():
        if isinstance(value, (Tensor, Instance)):
            if not isinstance(name, str) or len(prefix + name) > MAX_NAME:
                raise FormatError("is a TorchScript archive with a malformed attribute name")
            if isinstance(value, Tensor):
                yield prefix + name, value
            else:
                yield from tensors_below(value, f"{prefix}{name}.")


def read_legacy(file: BufferedReader, size: int) -> Any:
    """torch.save before 1.6: pickles of magic number, version, platform, object, storage keys; then data."""
    storages: dict[str, tuple[bytearray, int]] = {}  # content and number of elements

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        """Filled below, when its place in the file is known."""
        nonlocal size
        if key not in storages:
            size -= count * dtype.itemsize
            if size < 0:
                raise FormatError(TOO_MUCH)
            storages[key] = bytearray(count * dtype.itemsize), count
        content, elements = storages[key]
        if (len(content), elements) != (count * dtype.itemsize, count):
            raise FormatError(f"describes its storage {key[:MAX_NAME]} twice, differently")
        return vector(content, dtype, count)

    _, _, platform, root, keys = (unpickle(file, storage) for _ in range(5))
    if platform["little_endian"] is not True:
        raise FormatError(BIG_ENDIAN)
    for key in keys:
        content, elements = storages.pop(key)
        if int.from_bytes(file.read(8), "little") != elements or file.readinto(content) != len(content):
            raise FormatError(f"does not hold its storage {key[:MAX_NAME]} whole {DAMAGED}")
    if storages:
        raise FormatError(f"lacks {len(storages)} storages {DAMAGED}")
    return root


def read_safetensors(file: BufferedReader, size: int) -> dict[str, Tensor]:
    """Length of the header (8 bytes), JSON header {name: dtype, shape, data_offsets}, data without gaps."""
    start = 8 + int.from_bytes(file.read(8), "little")
    if start > min(size, 8 + MAX_HEADER):
        raise FormatError(f"looks like safetensors, but claims a header of {start - 8} bytes in a file of "
                          f"{size}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise FormatError("is a safetensors file whose header names one key twice")
        return entries

    header = json.loads(file.read(start - 8).decode(), object_pairs_hook=unique)
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape, dtype = entry["shape"], SAFETENSORS.get(entry["dtype"])
        label = f"is a safetensors file whose tensor {name[:MAX_NAME]}"
        if dtype is None:
            raise FormatError(f"{label} has the unknown dtype {str(entry['dtype'])[:20]}; known are "
                              f"{', '.join(SAFETENSORS)}")
        well_formed = isinstance(shape, list) and len(shape) <= MAX_RANK
        if not (well_formed and all(map(is_size, [*shape, begin, end]))):
            raise FormatError(f"{label} has a malformed shape or negative offsets")
        count = math.prod(shape)
        if begin != position or end - begin != count * dtype.itemsize or start + end > size:
            raise FormatError(f"{label} lies at bytes {begin} to {end}, which does not fit its shape "
                              f"{shape}, its neighbours or the file")
        content = bytearray(end - begin)
        if file.readinto(content) != len(content):
            raise FormatError("became shorter while it was read")
        tensors[name] = vector(content, dtype, count).view(shape)
        position = end
    if rest := size - start - position:
        raise FormatError(f"is a safetensors file with {rest} bytes that belong to no tensor")
    return tensors


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, in hexadecimal. Raises FileNotFoundError or ValueError as `load_clip`."""
    digest = hashlib.sha256()
    file = regular_file(path)
    try:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise unreadable(file, error) from error
    return digest.hexdigest()


def regular_file(path: str | os.PathLike[str], advice: str = "") -> Path:
    """`path` if a regular file is there; opening a FIFO would wait for ever."""
    file = Path(path)
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{show(file)} does not exist{advice}") from None
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    # The kernel's own files say that they are regular, and some of them never end.
    if not stat.S_ISREG(mode) or os.path.realpath(file).startswith(("/proc/", "/sys/")):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ValueError(f"{show(file)} is {kind}{advice}")
    return file


def read_text(path: str | os.PathLike[str], advice: str = "") -> str:
    """A UTF-8 file's text, less a byte order mark. Raises as `regular_file`, ValueError for other bytes."""
    file = regular_file(path, advice)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{show(file)} is not UTF-8 text ({error}){advice}") from None
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{show(file)} cannot be read ({getattr(error, 'strerror', None) or error})")


def show(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else ascii(text)


def tidy(error: BaseException) -> str:
    """The message on one line of bounded length, without control characters of a hostile file."""
    text = "".join(c if c.isprintable() else " " for c in (str(error) or type(error).__name__)[:1500])
    return text if len(text) < 1500 else text + "..."
