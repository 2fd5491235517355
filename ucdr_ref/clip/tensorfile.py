"""Tensor files read without executing anything: TorchScript archives, `torch.save` files of both layouts, and
safetensors.

Every size that a file claims is checked against the file before memory is taken: storages lie inside the
file, tensors inside their storage, and all of them together are bounded by the file's size.
"""
from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .unpickle import MAX_NAME, MAX_RANK, FormatError, Instance, LoadStorage, is_size, unpickle

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
BIG_ENDIAN = "was written on a big-endian machine; save it again on a little-endian one"


class Source:
    """A regular file mapped privately; its tensors are views of the pages, unless `copy` is true."""

    def __init__(self, file: BufferedReader, copy: bool, checksums: bool) -> None:
        self.file, self.copy, self.checksums = file, copy, checksums
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.size = len(self.map)
        self.taken = 0

    def number(self, start: int, length: int) -> int:
        return int.from_bytes(self.map[start:start + length], "little")

    def tensor(self, dtype: torch.dtype, start: int, count: int) -> Tensor:
        """`count` little-endian elements from byte `start` as a vector."""
        length = count * dtype.itemsize
        self.taken += length
        if count < 0 or start < 0 or start + length > self.size or self.taken > self.size:
            raise FormatError(f"claims more tensor data than its {self.size} bytes hold {DAMAGED}")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if self.copy:  # read: pages of a file that became shorter would end the process
            own = torch.empty(length, dtype=torch.uint8)
            self.file.seek(start)
            if self.file.readinto(own.numpy().data) != length:
                raise FormatError("became shorter while it was read")
            return own.view(dtype)
        view = torch.frombuffer(self.map, dtype=torch.uint8, count=length, offset=start)
        return (view.clone() if start % dtype.itemsize else view).view(dtype)


def read_any(path: Path, *, copy: bool = False, checksums: bool = True) -> Any:
    """What a tensor file holds: usually a dict; of a TorchScript archive, its tensors by attribute path.

    copy: tensors in memory of their own rather than views of the mapped file. checksums: compare those of a
    zip archive. Raises FormatError, with a reason but without the path.
    """
    with open(path, "rb") as file:
        head = file.read(64)
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
            return reader(Source(file, copy, checksums))
        except FormatError:
            raise
        except Exception as error:  # whatever a broken file makes a parser do is a fact about the file
            raise FormatError(f"is truncated or damaged ({type(error).__name__}: {error})") from error


def read_zip(source: Source) -> Any:
    """`PREFIX/data.pkl` and `PREFIX/data/KEY` of a torch.save or TorchScript archive, stored uncompressed."""
    with zipfile.ZipFile(source.file) as archive:
        listed = archive.infolist()
    members = {member.filename: member for member in listed}
    if len(members) != len(listed):
        raise FormatError("is a zip archive that holds two members of one name")
    roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise FormatError("is a zip archive, but not one that PyTorch wrote (it holds no data.pkl)")
    prefix = roots[0].removesuffix("data.pkl")

    def locate(name: str) -> tuple[int, int]:
        """First byte and end of a member."""
        label = f"is a zip archive whose member {name[:MAX_NAME]}"
        if (member := members.get(prefix + name)) is None:
            raise FormatError(f"{label} is missing {DAMAGED}")
        at = member.header_offset
        start = at + 30 + source.number(at + 26, 2) + source.number(at + 28, 2)
        end = start + member.file_size
        stored = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
        if not stored or member.file_size != member.compress_size:
            raise FormatError(f"{label} is a compressed member; PyTorch stores members as they are")
        if source.map[at:at + 4] != b"PK\x03\x04" or end > source.size:
            raise FormatError(f"{label} does not lie inside it {DAMAGED}")
        if source.checksums:
            with memoryview(source.map) as view, view[start:end] as content:
                if zlib.crc32(content) != member.CRC:
                    raise FormatError(f"{label} is damaged: it does not match the stored checksum")
        return start, end

    def content(name: str) -> bytes:
        start, end = locate(name)
        return source.map[start:end]

    cache: dict[tuple[str, torch.dtype], Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if (key, dtype) not in cache:
            start, end = locate("data/" + key)
            if count * dtype.itemsize > end - start:
                raise FormatError(f"claims {count} elements of {dtype} in its member data/{key}, which holds "
                                  f"{end - start} bytes")
            cache[key, dtype] = source.tensor(dtype, start, count)
        return cache[key, dtype]

    if prefix + "byteorder" in members and content("byteorder") != b"little":
        raise FormatError(BIG_ENDIAN)
    root = unpickle(content("data.pkl"), storage)
    return dict(tensors_below(root, "")) if isinstance(root, Instance) else root


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


def read_legacy(source: Source) -> Any:
    """torch.save before 1.6: pickles of magic number, version, platform, object, storage keys; then data."""
    sizes: dict[str, tuple[torch.dtype, int]] = {}

    def note(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if sizes.setdefault(key, (dtype, count)) != (dtype, count):
            raise FormatError(f"describes its storage {key[:MAX_NAME]} twice, differently")
        return torch.empty(count, dtype=dtype, device="meta")

    def pickled(storage: LoadStorage = note) -> Any:
        return unpickle(source.map, storage)

    _, _, platform = pickled(), pickled(), pickled()
    if platform["little_endian"] is not True:
        raise FormatError(BIG_ENDIAN)
    start_of_object = source.map.tell()
    pickled()  # the sizes of the storages, which tell where each begins
    keys = pickled()
    position = source.map.tell()
    storages: dict[str, Tensor] = {}
    for key in keys:
        dtype, count = sizes[key]
        if source.number(position, 8) != count:
            raise FormatError(f"has a storage {key[:MAX_NAME]} of another length than its tensors {DAMAGED}")
        storages[key] = source.tensor(dtype, position + 8, count)
        position += 8 + count * dtype.itemsize
    source.map.seek(start_of_object)
    return pickled(lambda key, dtype, count: storages[key])


def read_safetensors(source: Source) -> dict[str, Tensor]:
    """Length of the header (8 bytes), JSON header {name: dtype, shape, data_offsets}, data without gaps."""
    start = 8 + source.number(0, 8)
    if start > min(source.size, 8 + MAX_HEADER):
        raise FormatError(f"looks like safetensors, but claims a header of {start - 8} bytes in a file of "
                          f"{source.size}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise FormatError("is a safetensors file whose header names one key twice")
        return entries

    header = json.loads(source.map[8:start].decode(), object_pairs_hook=unique)
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
        if begin != position or end - begin != count * dtype.itemsize or start + end > source.size:
            raise FormatError(f"{label} lies at bytes {begin} to {end}, which does not fit its shape "
                              f"{shape}, its neighbours or the file")
        tensors[name] = source.tensor(dtype, start + begin, count).view(shape)
        position = end
    if rest := source.size - start - position:
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
