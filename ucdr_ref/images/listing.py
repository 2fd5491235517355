"""The images below a folder, links to folders followed, in a stable order."""
from __future__ import annotations

import os
import stat
from pathlib import Path

from ..clip.tensorfile import show
from .batches import ENDINGS

File = tuple[str, int, int, int]  # path below the folder, size, time of modification, time of change in ns


def list_images(root: str) -> list[File]:
    """Each regular file below `root` with one of ENDINGS, sorted by path; hidden names are passed over.

    Links are followed. Raises FileNotFoundError for a missing folder, ValueError for one without images or
    that cannot be listed, and for a link to a folder that it lies in.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{show(Path(root))}: no such folder; give a folder of images")
    found = []
    # Folders to be listed, each with what `stat` says of it and of those it lies in.
    ahead: list[tuple[str, tuple[os.stat_result, ...]]] = [(root, (os.stat(root),))]
    while ahead:
        folder, parents = ahead.pop()
        try:
            with os.scandir(folder) as listed:
                entries = list(listed)
        except OSError as error:
            raise ValueError(f"{show(Path(folder))}: cannot be listed ({error.strerror})") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError:  # a dangling link, a loop of links, or removed a moment ago
                continue
            if stat.S_ISDIR(status.st_mode):
                if any(os.path.samestat(status, parent) for parent in parents):
                    raise ValueError(f"{show(Path(entry.path))} leads back to a folder it lies in; remove it")
                ahead.append((entry.path, (*parents, status)))
            elif stat.S_ISREG(status.st_mode) and os.path.splitext(entry.name)[1].lower() in ENDINGS:
                name = os.path.relpath(entry.path, root)
                found.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    if not found:
        raise ValueError(f"{show(Path(root))}: no images below this folder, such as x.jpg")
    return sorted(found)
