"""A gallery folder encoded once, with a cache that is used only for the very images and model it was made from.

An entry is a folder `<cache_dir>/<first 16 digits of the fingerprint>-<random>/` with `features.npy` and `files.json`.
It is built under another name and renamed when complete, its name is never used twice, and nothing in it changes
afterwards. So a reader sees a whole entry or none, and processes that index one gallery at once leave, at worst, two
equal entries. Entries of other states of a gallery stay until they are deleted by hand.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from ..clip.tensorfile import regular_file, show, tidy
from ..machine.files import STALE_SECONDS, WriteError, write_atomic
from ..metrics import search
from .batches import ENDINGS

HEADER_BYTES = 128  # of a .npy file that holds a float32 matrix of any size
BLOCK = 1 << 24  # bytes read at once

Batches = Iterable[tuple[Tensor, Tensor]]  # (indices [b], features [b, e])
EncodePaths = Callable[[list[str]], Batches]


@dataclass(frozen=True)
class Index:
    """Row i of `features` [g, e] (float32, memory-mapped) belongs to `paths[i]`, relative to `folder`, sorted."""

    folder: str
    paths: list[str]
    features: np.ndarray
    skipped: list[str]  # unreadable images, left out
    cached: bool  # taken from the cache

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.paths[i])

    def search(self, query: Tensor, k: int, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """query [q, e] -> (Euclidean distances [q, k], rows [q, k]), exact, nearest first; see `metrics.search`."""
        return search(query, self.features, k, chunk)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Writes the vectors to `path` (.npy, float32 [g, e]) and beside it `<path without .npy>.paths.txt`, returned.

        Line i of the text is the relative path of row i, its bytes unchanged except that backslash, newline and
        carriage return are written as two characters, as in C. Raises ValueError for another ending, WriteError when a
        file cannot be written.
        """
        target = Path(path)
        if target.suffix != ".npy":
            raise ValueError(f"{show(target)}: vectors are exported as .npy; give a name with that ending")
        names = target.with_suffix(".paths.txt")
        escapes = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})
        write_atomic(target, lambda file: np.save(file, self.features, allow_pickle=False))
        write_atomic(names, lambda file: file.writelines(os.fsencode(p.translate(escapes)) + b"\n" for p in self.paths))
        return names


def build_index(folder: str | os.PathLike[str], encode_paths: EncodePaths, key: str,
                cache_dir: str | os.PathLike[str], bad: str = "error",
                say: Callable[[str], None] | None = None) -> Index:
    """The index of all images below `folder`, from the cache, or encoded now and put there.

    encode_paths(absolute paths) yields (indices into them [b], features [b, e]) in any order; an index that never comes
    is an image that it could not read: an error, once the others are cached, or left out with bad="skip". `key`
    identifies model and preprocessing. An entry is used only if the folder, the relative paths, sizes, times of
    modification and change, and `key` are the same and its checksum holds. `say` gets a one-line notice about a broken
    entry (default: stderr).
    Raises FileNotFoundError for a missing folder; ValueError for one without images, an unreadable image, or features
    that are not finite; WriteError when the cache cannot be written.
    """
    if bad not in ("error", "skip"):
        raise ValueError(f'bad must be "error" or "skip"; got {bad!r}')
    say = say or (lambda line: print(line, file=sys.stderr))
    root, cache = os.path.realpath(folder), Path(cache_dir)
    files = list_images(root)
    names = [name for name, *_ in files]
    fingerprint = hashlib.sha256(json.dumps([1, root, key, files]).encode()).hexdigest()
    index = find(cache, fingerprint, root, names, say)
    if index is None:
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
            sweep(cache)
            temporary = Path(tempfile.mkdtemp(prefix=f".{fingerprint[:16]}-", suffix=".tmp", dir=cache))
        try:
            batches = encode_paths([os.path.join(root, name) for name in names])
            entry = fill(temporary, names, batches, fingerprint)
            index = find(cache, fingerprint, root, names, say)  # another process may have been faster
            if index is None:
                final = cache / temporary.name[1:-len(".tmp")]
                with writing(cache):
                    os.rename(temporary, final)
                features = map_features(final / "features.npy")
                index = Index(root, entry["paths"], features, entry["skipped"], cached=False)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if index.skipped and bad == "error":
        raise unreadable(index.skipped, len(names))
    return index


def list_images(root: str) -> list[tuple[str, int, int, int]]:
    """(relative path, size, time of modification, time of change in ns) of each image below `root`, sorted by path.

    An image is a regular file, or a link to one, with one of ENDINGS. Links to folders are not followed; other kinds of
    file and hidden names are passed over. Raises FileNotFoundError, or ValueError when there is none.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{show(Path(root))}: no such folder; give a folder of images")
    found = []
    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if os.path.splitext(name)[1].lower() not in ENDINGS or name.startswith("."):
                continue
            path = os.path.join(parent, name)
            with suppress(OSError):  # a dangling link, a loop of links, or removed a moment ago
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    times = status.st_mtime_ns, status.st_ctime_ns
                    found.append((os.path.relpath(path, root), status.st_size, *times))
    if not found:
        raise ValueError(f"{show(Path(root))}: no images below this folder; expected names such as x.jpg or x.png")
    return sorted(found)


def find(cache: Path, fingerprint: str, root: str, names: list[str], say: Callable[[str], None]) -> Index | None:
    """The first sound entry of this fingerprint; broken ones are removed with a notice, since none is ever repaired."""
    for folder in sorted(cache.glob(f"{fingerprint[:16]}-*")):
        try:
            entry = json.loads(regular_file(folder / "files.json").read_text(encoding="ascii"))
            paths, skipped = entry["paths"], entry["skipped"]
            rest = set(skipped)
            if entry["fingerprint"] != fingerprint or paths != [name for name in names if name not in rest] \
                    or len(paths) + len(skipped) != len(names):
                raise ValueError("it lists other files")
            if entry["crc32"] != checksum(regular_file(folder / "features.npy")):
                raise ValueError("the checksum differs")
            features = map_features(folder / "features.npy")
            if features.dtype != np.float32 or features.ndim != 2 or len(features) != len(paths):
                raise ValueError(f"it holds {features.dtype} {list(features.shape)} for {len(paths)} images")
            return Index(root, paths, features, skipped, cached=True)
        except Exception as error:  # whatever is wrong with an entry, it can be built anew
            say(f"{show(folder)}: broken index ({tidy(error)}), removed; the images are encoded again")
            shutil.rmtree(folder, ignore_errors=True)
    return None


def fill(folder: Path, names: list[str], batches: Batches, fingerprint: str) -> dict[str, Any]:
    """Writes features as they come, row i for image i, then closes the gaps; returns what files.json holds.

    Plain writes, mapped only for reading: on a full disk they raise; a write through a map would kill the process.
    """
    kept, width = np.zeros(len(names), dtype=bool), 0
    with opened(folder / "features.npy") as file:
        for indices, features in batches:
            if len(indices) == 0:
                continue
            rows = features.detach().to("cpu").float().numpy().astype("<f4", copy=False)
            width = width or rows.shape[1]
            assert rows.shape == (len(indices), width), f"features {rows.shape} for {len(indices)} images of {width}"
            for i, row in zip(map(int, indices), rows, strict=True):
                if not np.isfinite(row).all():
                    raise ValueError(f"{show(Path(names[i]))}: its features are not finite; check the weights and the "
                                     "precision")
                with writing(folder.parent):
                    file.seek(HEADER_BYTES + i * width * 4)
                    file.write(row.tobytes())
                kept[i] = True
        paths, skipped = ([name for name, keep in zip(names, kept) if keep == wanted] for wanted in (True, False))
        if not paths:
            raise unreadable(skipped, len(names))
        with writing(folder.parent):
            close_gaps(file, np.flatnonzero(kept).tolist(), width)
            file.flush()
            os.fsync(file.fileno())
    entry = {"fingerprint": fingerprint, "crc32": checksum(folder / "features.npy"), "paths": paths, "skipped": skipped}
    write_atomic(folder / "files.json", lambda file: file.write(json.dumps(entry).encode("ascii")))
    return entry


def close_gaps(file: BinaryIO, rows: Sequence[int], width: int) -> None:
    """Moves `rows` to the front, cuts the rest, and writes the header, without which the file is none."""
    for new, old in enumerate(rows):
        if new != old:
            file.seek(HEADER_BYTES + old * width * 4)
            row = file.read(width * 4)
            file.seek(HEADER_BYTES + new * width * 4)
            file.write(row)
    file.truncate(HEADER_BYTES + len(rows) * width * 4)
    header = io.BytesIO()
    content = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), width)}
    np.lib.format.write_array_header_1_0(header, content)
    assert header.tell() == HEADER_BYTES, f"numpy wrote a header of {header.tell()} bytes, {HEADER_BYTES} expected"
    file.seek(0)
    file.write(header.getvalue())


def map_features(path: Path) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="r")  # never unpickles: object arrays are refused


def checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def sweep(cache: Path) -> None:
    """Removes what killed processes left half-written."""
    for folder in cache.glob(".*.tmp"):
        with suppress(OSError):  # its owner is removing it
            if time.time() - max(file.stat().st_mtime for file in (folder, *folder.glob("*"))) > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    with writing(path.parent.parent):
        file = open(path, "w+b")
    try:
        yield file
    finally:
        with writing(path.parent.parent):  # closing flushes, so it fails once more on a full disk
            file.close()


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"could not write the index in {show(cache)} ({error.strerror or error}); free space or "
                         "choose another folder for it") from error


def unreadable(skipped: list[str], count: int) -> ValueError:
    return ValueError(f"{len(skipped)} of {count} images could not be read, the first is {show(Path(skipped[0]))}; "
                      "remove them, or leave them out with --bad-images skip")


def refuse(error: OSError) -> None:
    raise ValueError(f"{show(Path(error.filename))}: this folder cannot be listed ({error.strerror})") from error
