"""What lies below a folder, links to folders followed, in a stable order."""
from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from .batches import ENDINGS

File = tuple[str, int, int, int]  # path below the folder, size, time of modification, time of change in ns


class Folder(NamedTuple):
    """Sorted paths of what a folder holds, hidden names passed over."""

    images: list[str]
    others: list[str]
    folders: list[str]
    above: tuple[str, ...]  # the real folders that it lies in, and its own


def opened(path: str, above: tuple[str, ...] = ()) -> Folder:
    """ValueError for a folder that cannot be listed, or a link back to one of the folders `above`."""
    shown, real = path, os.path.realpath(path)
    if real in above:
        raise ValueError(f"{shown}: this link leads back to a folder, {real}, in which it lies; "
                         "remove it")
    folder = Folder([], [], [], (*above, real))
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{shown}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # A link may lead nowhere, or to itself.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            folder.folders.append(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
            folder.images.append(entry.path)
        else:
            folder.others.append(entry.path)
    return folder


def walk(path: str, above: tuple[str, ...] = ()) -> Iterator[Folder]:
    """A folder, and then all below it. Raises as `opened`."""
    ahead = [(path, above)]
    while ahead:
        folder = opened(*ahead.pop())
        yield folder
        ahead += [(inner, folder.above) for inner in folder.folders]


def list_images(root: str) -> list[File]:
    """Each regular file below `root` with one of ENDINGS, sorted by path; hidden names are passed over.

    Links are followed. Raises FileNotFoundError for a missing folder, ValueError for one without images or
    that cannot be listed, and for a link to a folder that it lies in.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder; give a folder of images")
    found = []
    for path in (path for folder in walk(root) for path in folder.images):
        try:
            status = os.stat(path)
        except OSError:  # a dangling link, a loop of links, or removed a moment ago
            continue
        if stat.S_ISREG(status.st_mode):
            name = os.path.relpath(path, root)
            found.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    if not found:
        raise ValueError(f"{root}: no images below this folder, such as x.jpg")
    return sorted(found)
