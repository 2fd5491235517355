"""Files that are written whole or not at all, and checkpoints read back without executing anything."""
from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..clip.weights import check_file, one_line
from .processes import is_main

STALE_SECONDS = 3600  # a temporary file untouched for this long was left by a killed process


class WriteError(OSError, ValueError):
    """A file could not be written; the message names it, and what stood there before is intact."""


@contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Around writes: makes of a full disk, a read-only folder, ... a WriteError that names `what`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"could not write {what} ({error.strerror or error}); {advice}") from error


def digest_of(content: Any) -> str:
    """sha256 of what JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict of a file that `save_atomic` wrote: tensors on the CPU, numbers, text, lists, tuples, dicts.

    Nothing in it is executed. Raises FileNotFoundError, or ValueError when it is broken or another file.
    """
    file = check_file(path)
    try:
        state = torch.load(file, "cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise ValueError(f"holds a {type(state).__name__}, not a dict")
    except Exception as error:  # whatever a broken file makes a parser do is a fact about the file
        raise ValueError(f"{file} is damaged or another file ({one_line(error)}); expected a checkpoint that "
                         "this package wrote: use another one, or remove it to start again") from error
    return state


def make_folder(path: Path) -> None:
    """With all above it; ValueError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: no folder can be made there ({error.strerror}); "
                         "name another one") from None


def save_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """torch.save; `path` is the old file or the whole new one, even after a power cut. Raises WriteError."""
    def fill(file: BinaryIO) -> None:
        content = io.BytesIO()  # PyTorch's zip writer would hide what a full disk answers
        torch.save(obj, content)
        file.write(content.getbuffer())

    write_atomic(path, fill)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """`text` as UTF-8 under `path`, whole or not at all. Raises WriteError as `save_atomic` does."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_atomic(path: str | os.PathLike[str], fill: Callable[[BinaryIO], object]) -> None:
    """A temporary file beside `path`, filled, flushed to the disk and renamed; by the main process alone."""
    if not is_main():
        return
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with writing(str(target), "what stood there before is untouched: free space or choose another folder"):
        for old in target.parent.glob(f".{escape(target.name)}.*.tmp"):
            with suppress(FileNotFoundError):  # another process was faster
                if time.time() - old.lstat().st_mtime > STALE_SECONDS:
                    old.unlink()
        temporary.unlink(missing_ok=True)  # of a killed process of this number, or a link that someone left
        try:
            with open(temporary, "xb") as file:  # a new file: no link is followed
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                with suppress(OSError):  # some network file systems know no fsync of a folder
                    os.fsync(folder)
            finally:
                os.close(folder)


def in_place(path: str, flags: int) -> int:
    """Opener, for `open`, of a file that is changed where it stands: follows no link and waits for no FIFO.

    Raises ValueError for a special file, and for one that has a second name: it is not the run's alone.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file with this one name; put a copy of it in "
                         "its place")
    return descriptor
