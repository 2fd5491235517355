"""A gallery folder encoded once, later only what is new or changed in it, and only by one and the same model.

An entry is a folder `<first 16 digits of the index's digest>-<random>/` below the cache folder, with
`features.npy` and `files.json`, which lists each image's path, size and times. It is built under another
name, renamed when complete, never changed, and renamed again and removed once a newer one holds all of it. So
a reader sees a whole entry or none, and processes that index one gallery at once leave, at worst, two equal
entries until the next change. Entries of other folders and models stay until they are deleted by hand.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..clip.weights import check_file, one_line
from ..machine.files import STALE_SECONDS, WriteError, digest_of, write_atomic, writing
from .listing import File, list_images

BLOCK = 1 << 24  # bytes read at once
SAY_SECONDS = 10  # between two lines about how far the encoding is
ENTRY_NAME = re.compile("[0-9a-f]{16}-[a-z0-9_]{8}")
TEMPORARY_NAME = re.compile(rf"\.{ENTRY_NAME.pattern}\.tmp")

Batches = Iterable[tuple[Tensor, Tensor]]  # (indices [b], features [b, e])
EncodePaths = Callable[[list[str]], Batches]


@dataclass(frozen=True)
class Index:
    """Row i of `features` [g, e] (float32, memory-mapped) is of `paths[i]`, relative to `folder`, sorted."""

    folder: str
    paths: list[str]
    features: np.ndarray
    skipped: list[str]  # unreadable images, left out
    cached: bool  # as it stood in the cache
    encoded: int  # images encoded now

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.paths[i])

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Writes the vectors to `path` (.npy, float32 [g, e]) and returns the `.paths.txt` written beside it.

        Its line i is the relative path of row i, its bytes unchanged but for backslash, newline and carriage
        return, written as two characters as in C. Raises ValueError for another ending, WriteError.
        """
        target = Path(path)
        if target.suffix != ".npy":
            raise ValueError(f"{target}: vectors are exported as .npy; give a name with that ending")
        names = target.with_suffix(".paths.txt")
        escapes = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})
        write_atomic(target, lambda file: np.save(file, self.features, allow_pickle=False))
        lines = (os.fsencode(path.translate(escapes)) + b"\n" for path in self.paths)
        write_atomic(names, lambda file: file.writelines(lines))
        return names


@dataclass(frozen=True)
class Entry:
    """A folder of the cache; row i of `features` belongs to `files[i]`."""

    folder: Path
    files: list[File]
    skipped: list[File]
    features: np.ndarray


def build_index(folder: str | os.PathLike[str], encode_paths: EncodePaths, key: str,
                cache_dir: str | os.PathLike[str], bad: str = "error",
                say: Callable[[str], None] | None = None, without: Collection[str] = ()) -> Index:
    """The index of all images below `folder`: from the cache as far as it goes, the rest encoded now.

    encode_paths(absolute paths) yields (indices into them [b], features [b, e]) in any order; an index that
    never comes is an image that it could not read: an error, once the others are cached, or with bad="skip"
    left out and not tried again before it changes. `key` identifies model and preprocessing. without: folders
    in it that are passed over. Features are reused only for the same folder, path, size, times and `key`.
    What stops the encoding, such as KeyboardInterrupt, leaves in the cache what was encoded before. `say`
    gets lines about broken entries and about how far it is (default: stderr). Raises FileNotFoundError for a
    missing folder, ValueError for one without images, an unreadable image or features that are not finite,
    WriteError for a blocked cache.
    """
    if bad not in ("error", "skip"):
        raise ValueError(f'bad must be "error" or "skip"; got {bad!r}')
    say = say or (lambda line: print(line, file=sys.stderr))
    root, cache = os.path.realpath(folder), Path(cache_dir)
    files = [file for file in list_images(root) if file[0].split(os.sep)[0] not in without]
    digest = digest_of([2, root, key, *without])
    entries = sound_entries(cache, digest, say)
    entry = next((old for old in entries if sorted(old.files + old.skipped) == files), None)
    cached, encoded = entry is not None, 0
    if entry is None:
        entry, encoded = renew(cache, digest, root, files, entries, encode_paths, say)
    if bad == "error" and entry.skipped:
        raise unreadable(entry.skipped, len(files))
    paths, skipped = ([name for name, *_ in part] for part in (entry.files, entry.skipped))
    return Index(root, paths, entry.features, skipped, cached, encoded)


def sound_entries(cache: Path, digest: str, say: Callable[[str], None]) -> list[Entry]:
    """The entries of an index; broken ones are removed with a notice, since none is ever repaired."""
    entries = []
    for folder in own_folders(cache, f"{digest[:16]}-*", ENTRY_NAME):
        try:
            entries.append(read_entry(folder, digest))
        except Exception as error:  # whatever is wrong with an entry, it can be built anew
            if not folder.exists():  # another process has just put a newer one in its place
                return sound_entries(cache, digest, say)
            say(f"{folder}: broken index ({one_line(error)}), removed; the images are encoded again")
            discard(folder)
    return entries


def own_folders(cache: Path, pattern: str, name: re.Pattern[str]) -> list[Path]:
    """Folders that this module made; what else a user keeps there, and links, are left alone."""
    return sorted(folder for folder in cache.glob(pattern)
                  if name.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink())


def read_entry(folder: Path, digest: str) -> Entry:
    """Raises an exception of any kind unless the entry is whole."""
    content = json.loads(check_file(folder / "files.json").read_text(encoding="ascii"))
    crc = content.pop("crc32")
    files, skipped = ([(name, *state) for name, *state in content[part]] for part in ("files", "skipped"))
    path = check_file(folder / "features.npy")
    features = np.load(path, mmap_mode="r", allow_pickle=False)
    # In this order: the file is read to its end only where its size is right.
    if not (content["index"] == digest and files and features.dtype == "<f4"
            and features.shape == (len(files), content["width"])
            and path.stat().st_size == features.offset + features.nbytes and crc == checksum(content, path)):
        raise ValueError("index, type, shape, size or checksum is another one")
    return Entry(folder, files, skipped, features)


def renew(cache: Path, digest: str, root: str, files: list[File], entries: list[Entry],
          encode_paths: EncodePaths, say: Callable[[str], None]) -> tuple[Entry, int]:
    """A new entry with what the old ones hold of `files` and the rest, encoded now; and the rest's number."""
    rows: dict[File, np.ndarray | None] = {}  # the features of each image; None for one that cannot be read
    for old in entries:
        rows = {**dict.fromkeys(old.skipped), **rows, **dict(zip(old.files, np.asarray(old.features)))}
    new = [file for file in files if file not in rows]
    done: list[File] = []  # in the order of their rows in the file `new`
    width = entries[0].features.shape[1] if entries else 0
    stop: BaseException | None = None  # what ended the encoding early
    with filling(cache):
        cache.mkdir(parents=True, exist_ok=True)
        sweep(cache)
        temporary = Path(tempfile.mkdtemp(prefix=f".{digest[:16]}-", suffix=".tmp", dir=cache))
    try:
        # Plain writes: on a full disk they raise, where one to a map would kill the process.
        with filling(cache), open(temporary / "new", "wb") as store:
            try:
                batches = encode_paths([os.path.join(root, name) for name, *_ in new]) if new else []
                for part, features in encoded_rows(batches, new, say):
                    assert width in (0, features.shape[1]), f"features of width {width}, {features.shape[1]}"
                    width = features.shape[1]
                    with filling(cache):
                        store.write(features.tobytes())
                    done += part
            except WriteError:
                raise
            except BaseException as error:
                stop = error
        if stop is None:
            rows |= dict.fromkeys(new)  # what never came cannot be read
        elif not done:
            raise stop
        if done:
            rows |= zip(done, np.asarray(np.memmap(store.name, "<f4", "r", shape=(len(done), width))))
        entry = write_entry(temporary, digest, {file: rows[file] for file in files if file in rows})
        if stop:
            raise stop
        for old in entries:
            discard(old.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return entry, len(done)


def encoded_rows(batches: Batches, new: list[File],
                 say: Callable[[str], None]) -> Iterator[tuple[list[File], np.ndarray]]:
    """The files of each batch and their features, float32 [b, e]; says how far it is."""
    done, start = 0, time.monotonic()
    last = start
    for indices, features in batches:
        part = [new[int(i)] for i in indices]
        if not part:
            continue
        rows = features.detach().to("cpu").float().numpy().astype("<f4", copy=False)
        assert rows.ndim == 2 and len(rows) == len(part), f"features {rows.shape} for {len(part)} images"
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            name = part[int(finite.argmin())][0]
            raise ValueError(f"{name}: its features are not finite; check the weights and the precision")
        yield part, rows
        done, now = done + len(part), time.monotonic()
        if now - last >= SAY_SECONDS:
            last, rate = now, done / (now - start)
            left = int((len(new) - done) / rate)
            say(f"{done}/{len(new)} images encoded, {rate:.0f} images/s, {left // 60}m{left % 60:02d}s left")


def write_entry(temporary: Path, digest: str, rows: dict[File, np.ndarray | None]) -> Entry:
    """Writes an entry inside `temporary`, then moves it to where it is looked for."""
    cache, folder = temporary.parent, temporary / "entry"
    kept = {file: row for file, row in rows.items() if row is not None}
    skipped = [file for file in rows if file not in kept]
    if not kept:
        raise unreadable(skipped, len(rows))
    width, path = len(next(iter(kept.values()))), folder / "features.npy"
    with filling(cache):
        folder.mkdir()
        with open(path, "wb") as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": (len(kept), width)}
            np.lib.format.write_array_header_1_0(file, about)
            file.writelines(row.tobytes() for row in kept.values())
            file.flush()
            os.fsync(file.fileno())
        content = {"index": digest, "width": width, "files": list(kept), "skipped": skipped}
        content["crc32"] = checksum(content, path)
        write_atomic(folder / "files.json", lambda file: file.write(json.dumps(content).encode("ascii")))
        features = np.load(path, mmap_mode="r")  # before a newer entry may replace this one
        final = cache / temporary.name[1:-len(".tmp")]
        os.rename(folder, final)
    return Entry(final, list(kept), skipped, features)


def checksum(content: dict[str, Any], path: Path) -> int:
    """Of what an entry's files.json says and of the bytes of its features."""
    crc = zlib.crc32(json.dumps(content).encode())
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def discard(folder: Path) -> None:
    """Removes an entry such that nobody meets half of it."""
    hidden = folder.with_name(f".{folder.name}.tmp")
    with suppress(OSError):  # another process was faster, or the cache is read-only
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(cache: Path) -> None:
    """Removes what killed processes left half-written, known by the names that `mkdtemp` gives."""
    for folder in own_folders(cache, ".*.tmp", TEMPORARY_NAME):
        with suppress(OSError):  # its owner is removing it
            touched = max(file.stat().st_mtime for file in (folder, *folder.rglob("*")))
            if time.time() - touched > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def filling(cache: Path) -> AbstractContextManager[None]:
    return writing(f"the index in {cache}", "free space or choose another folder for it")


def unreadable(skipped: list[File], count: int) -> ValueError:
    return ValueError(f"{len(skipped)} of {count} images could not be read, the first is "
                      f"{skipped[0][0]}; remove them, or leave them out with --bad-images skip")
