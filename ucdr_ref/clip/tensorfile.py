"""Tensor files read without executing anything: TorchScript archives, `torch.save` files (both layouts) and
safetensors.

Every size that a file claims is checked against the file before memory is taken: storages lie inside the
file, tensors inside their storage, and all of them together are bounded by the file's size.
"""
from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .unpickle import MAX_NAME, MAX_RANK, FormatError, Instance, LoadStorage, Pickle, is_size

# the pickled number with which torch.save began before 1.6
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64,
               "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NOT_WEIGHTS = {b"\x89PNG": "is a PNG image", b"\xff\xd8\xff": "is a JPEG image",
               b"\x1f\x8b": "is a gzip archive",
               b"version https://git-lfs": "is a Git LFS pointer, not the file itself", b"<": "is a web page or XML",
               b"\x80": "is a pickle that torch.save did not write", b"{": "is JSON text"}
MAX_HEADER = 10_000_000  # bytes of a safetensors header; CLIP's are below 100,000
MAX_NODES, MAX_DEPTH = 100_000, 64  # attributes and nesting of a TorchScript module


class Source:
    """A regular file mapped privately, so that tensors are views of its pages and are copied once, by their
    user.
    """

    def __init__(self, file: io.BufferedReader, copy: bool) -> None:
        self.file, self.copy = file, copy
        self.size = file.seek(0, io.SEEK_END)
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.taken = 0

    def tensor(self, dtype: torch.dtype, start: int, count: int) -> Tensor:
        """`count` little-endian elements from byte `start` as a vector."""
        length = count * dtype.itemsize
        self.taken += length
        if count < 0 or start < 0 or start + length > self.size or self.taken > self.size:
            raise FormatError(f"claims more tensor data than its {self.size} bytes hold (truncated or "
                              f"damaged)")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if not self.copy and start % dtype.itemsize == 0:
            return torch.frombuffer(self.map, dtype=dtype, count=count, offset=start)
        own = torch.empty(count, dtype=dtype)
        self.file.seek(start)
        if self.file.readinto(own.view(torch.uint8).numpy().data) != length:
            raise FormatError("became shorter while it was read")
        return own


def read_any(path: Path, *, copy: bool = False, checksums: bool = True) -> Any:
    """What a tensor file holds: usually a dict; for a TorchScript archive the dict of its tensors by
    attribute path.

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
            unknown = f"is of an unknown kind (its first bytes are {head[:8].hex(' ')})" if head else "is empty"
            raise FormatError(next((text for start, text in NOT_WEIGHTS.items() if head.startswith(start)),
                                   unknown))
        try:
            return reader(Source(file, copy), checksums)
        except FormatError:
            raise
        except Exception as error:  # whatever a broken file makes a parser do is a fact about the file
            raise FormatError(f"is truncated or damaged ({type(error).__name__}: {error})") from error


def read_zip(source: Source, checksums: bool) -> Any:
    """`PREFIX/data.pkl` and `PREFIX/data/KEY` of a torch.save or TorchScript archive; members are stored
    uncompressed.
    """
    with zipfile.ZipFile(source.file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise FormatError("is a zip archive that holds two members of one name")
    roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise FormatError("is a zip archive, but not one that PyTorch wrote (it holds no data.pkl)")
    prefix = roots[0].removesuffix("data.pkl")

    def locate(name: str) -> tuple[int, int]:
        """First byte and length of a member."""
        if (member := members.get(prefix + name)) is None:
            raise FormatError(f"is a zip archive that lacks its member {name[:MAX_NAME]} (truncated or "
                              f"damaged)")
        local = source.map[member.header_offset:member.header_offset + 30]
        start = member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size != member.compress_size:
            raise FormatError(f"is a zip archive with the compressed member {name}; PyTorch stores members "
                              f"as they are")
        if local[:4] != b"PK\x03\x04" or start + member.file_size > source.size:
            raise FormatError(f"is a zip archive whose member {name} does not lie inside it (truncated or "
                              f"damaged)")
        if checksums:
            with memoryview(source.map) as view, view[start:start + member.file_size] as content:
                if zlib.crc32(content) != member.CRC:
                    raise FormatError(f"is damaged: the content of its member {name} does not match the "
                                      f"stored checksum")
        return start, member.file_size

    if prefix + "byteorder" in members:
        start, length = locate("byteorder")
        if source.map[start:start + length] != b"little":
            raise FormatError("was written on a big-endian machine; save it again on a little-endian one")
    cache: dict[tuple[str, torch.dtype], Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if (key, dtype) not in cache:
            start, length = locate("data/" + key)
            if count * dtype.itemsize > length:
                raise FormatError(f"claims {count} elements of {dtype} in its member data/{key}, which holds "
                                  f"{length} bytes")
            cache[key, dtype] = source.tensor(dtype, start, count)
        return cache[key, dtype]

    start, length = locate("data.pkl")
    root = Pickle(storage).read(io.BytesIO(source.map[start:start + length]))
    return tensors_below(root) if isinstance(root, Instance) else root


def tensors_below(root: Instance) -> dict[str, Tensor]:
    """{attribute path: tensor} of a TorchScript module and its submodules."""
    found: dict[str, Tensor] = {}
    todo: list[tuple[str, int, Instance]] = [("", 0, root)]
    nodes = 0
    while todo:
        prefix, depth, module = todo.pop()
        nodes += 1 + len(module.attributes)
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise FormatError("is a TorchScript archive whose modules nest too deeply")
        for name, value in module.attributes.items():
            if isinstance(value,
                          (Tensor, Instance)) and not (isinstance(name, str) and len(name) <= MAX_NAME):
                raise FormatError("is a TorchScript archive with a malformed attribute name")
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, Instance):
                todo.append((f"{prefix}{name}.", depth + 1, value))
    return found


def read_legacy(source: Source, checksums: bool) -> Any:
    """torch.save before 1.6: four pickles (magic number, version, platform, object), the storage keys, then
    each storage.
    """
    del checksums  # this layout has none
    sizes: dict[str, tuple[torch.dtype, int]] = {}

    def note(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if sizes.setdefault(key, (dtype, count)) != (dtype, count):
            raise FormatError(f"describes its storage {key[:MAX_NAME]} twice, differently")
        return torch.empty(count, dtype=dtype, device="meta")

    def pickled(storage: LoadStorage = note) -> Any:
        return Pickle(storage).read(source.map)  # type: ignore[arg-type]

    _, _, platform = pickled(), pickled(), pickled()
    if platform["little_endian"] is not True:
        raise FormatError("was written on a big-endian machine; save it again on a little-endian one")
    start_of_object = source.map.tell()
    pickled()  # the sizes of the storages, which tell where each begins
    keys = pickled()
    position = source.map.tell()
    storages: dict[str, Tensor] = {}
    for key in keys:
        dtype, count = sizes[key]
        if int.from_bytes(source.map[position:position + 8], "little", signed=True) != count:
            raise FormatError(f"has a storage {key[:MAX_NAME]} of another length than its tensors expect "
                              f"(truncated or damaged)")
        storages[key] = source.tensor(dtype, position + 8, count)
        position += 8 + count * dtype.itemsize
    source.map.seek(start_of_object)
    return pickled(lambda key, dtype, count: storages[key])


def read_safetensors(source: Source, checksums: bool) -> dict[str, Tensor]:
    """8 bytes of header length, a JSON header {name: dtype, shape, data_offsets}, then the data without
    gaps.
    """
    del checksums  # this format has none
    length = int.from_bytes(source.map[:8], "little")
    if length > min(source.size - 8, MAX_HEADER):
        raise FormatError(f"looks like safetensors, but claims a header of {length} bytes in a file of "
                          f"{source.size}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise FormatError("is a safetensors file whose header names one key twice")
        return entries

    header = json.loads(source.map[8:8 + length].decode(), object_pairs_hook=unique)
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape, dtype = entry["shape"], SAFETENSORS.get(entry["dtype"])
        label = f"is a safetensors file whose tensor {name[:MAX_NAME]}"
        if dtype is None:
            raise FormatError(f"{label} has the unknown dtype {str(entry['dtype'])[:20]}; known are "
                              f"{', '.join(SAFETENSORS)}")
        if not (isinstance(shape, list) and len(shape) <= MAX_RANK
                and all(map(is_size, [*shape, begin, end]))):
            raise FormatError(f"{label} has a malformed shape or negative offsets")
        if begin != position or end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > source.size:
            raise FormatError(f"{label} lies at bytes {begin} to {end}, which does not fit its shape "
                              f"{shape}, "
                              f"its neighbours or the file")
        tensors[name] = source.tensor(dtype, 8 + length + begin, math.prod(shape)).view(shape)
        position = end
    if 8 + length + position != source.size:
        raise FormatError(f"is a safetensors file with {source.size - 8 - length - position} bytes that "
                          f"belong to no tensor")
    return tensors


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, in hexadecimal. Raises FileNotFoundError or ValueError as `load_clip`
    does.
    """
    digest = hashlib.sha256()
    file = regular_file(path)
    try:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{show(file)} cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def regular_file(path: str | os.PathLike[str], advice: str = "") -> Path:
    """`path` if a regular file is there; opening a FIFO would wait for ever."""
    file = Path(path)
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{show(file)} does not exist{advice}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{show(file)} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    # The kernel's own files say that they are regular, and some of them never end.
    if not stat.S_ISREG(mode) or os.path.realpath(file).startswith(("/proc/", "/sys/")):
        raise ValueError(f"{show(file)} is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}{advice}")
    return file


def show(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else ascii(text)


def tidy(error: BaseException) -> str:
    """The message on one line, without control characters that a hostile file may have put there, and of
    bounded length.
    """
    text = "".join(c if c.isprintable() else " " for c in (str(error) or type(error).__name__)[:1500])
    return text if len(text) < 1500 else text + "..."
