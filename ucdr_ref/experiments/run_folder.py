"""Run folders: what a run was made of, written before it starts, checked when it is resumed or evaluated."""
from __future__ import annotations

import gzip
import json
import os
import platform
import sys
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from torch import Tensor

from .. import __version__
from ..clip.weights import check_file, one_line
from ..config import Config, differences, from_dict, to_json
from ..machine.files import in_place, make_folder, write_atomic, write_text_atomic
from ..machine.processes import is_main
from ..training.journal import Misfit
from .trees import Listing

LISTING = "files.json.gz"
MAX_LISTING = 1 << 28  # bytes of it, unpacked; DomainNet's 600,000 names take a tenth
# Fields that may change when a run is resumed: what lies behind a path is compared by its digest.
MAY_DIFFER = ("data_root", "class_split", "weights", "source", "target", "graph", "unseen", "bad_images")
ADVICE = "name another --run, or delete that folder"


def versions(device: torch.device | None = None) -> dict[str, str]:
    """What computes: packages, machine, and the run's GPU (None: the one that a run would take by itself)."""
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {"ucdr_ref": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name(device) if gpu else "none",
            "threads": str(torch.get_num_threads())}


def default_run(method: str, fast: bool) -> Path:
    """Where a training without --run goes: runs/demo, runs/fast, runs/sre-demo or runs/sre-fast."""
    return Path("runs", ("sre-" if method == "sre-clip" else "") + ("fast" if fast else "demo"))


def newest_run() -> Path:
    """The default run that was finished last, named on stderr; FileNotFoundError where there is none."""
    runs = [default_run(method, fast) for method in ("ucdr-adapter", "sre-clip") for fast in (False, True)]
    finished = [run for run in runs if (run / "results.json").exists() and (run / "best.pt").exists()]
    if not finished:
        raise FileNotFoundError(f"no --run was given, and none of {', '.join(map(str, runs))} holds a "
                                "finished run here; train first: python train.py")
    newest = max(finished, key=lambda run: (run / "best.pt").stat().st_mtime)
    if is_main():
        print(f"{newest} (the newest of the default runs; --run names another)", file=sys.stderr)
    return newest


def open_run(folder: Path, config: Config, about: dict[str, Any],
             listing: Listing) -> AbstractContextManager[object]:
    """Makes the run folder, or checks that it is of this config, and writes config.json, run.json, listing.

    Returns a context in which no other process can open the run. Data and weights may have moved, and
    --bad-images may change. Raises ValueError for another run (naming the fields), another kind of folder, or
    one in which another process trains.
    """
    check_entries(folder)
    path, record = folder / "config.json", folder / "run.json"
    if path.exists():
        if different := differences(config, read_config(path), also=MAY_DIFFER):
            raise ValueError(f"{folder} holds a run of another config ({'; '.join(different)}); {ADVICE}")
        before = read_json(record) if record.exists() else about
        if before.get("weights_sha256") != about.get("weights_sha256"):
            raise ValueError(f"{folder} was started with other weights than there are now; {ADVICE}")
        if before.get("files") != about.get("files"):
            raise ValueError(f"{folder} was started with other image files or class graph than there are now"
                             f"{first_changed(folder, listing)}; {ADVICE}")
    elif folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):
        # A hidden name is what a killed write leaves.
        raise ValueError(f"{folder} exists and is no run folder (it has no config.json); name another --run")
    make_folder(folder)
    held = lock(folder)
    write_text_atomic(path, to_json(config))  # first: it makes this a run folder, whatever happens next
    write_text_atomic(record, json.dumps({"command": sys.argv, **about}, indent=2) + "\n")
    packed = gzip.compress(json.dumps(listing).encode(), compresslevel=6, mtime=0)
    write_atomic(folder / LISTING, lambda file: file.write(packed))
    return held


def lock(folder: Path) -> AbstractContextManager[object]:
    """Holds the run folder for this process, until the context or the process ends, however it does."""
    if os.name != "posix" or not is_main():
        return nullcontext()
    import fcntl  # not on Windows
    try:
        file = open(folder / ".lock", "a+b", opener=in_place)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}; wait until it ends, or name another "
                         "--run") from None
    except OSError:  # a read-only folder, which writing reports, or a file system without locks
        return nullcontext()
    return file


def check_entries(folder: Path) -> None:
    """ValueError for a link or special file in a folder that a run writes into; itself it may be a link."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
            kind = "a link" if entry.is_symlink() else "a special file"
            raise ValueError(f"{entry.path} is {kind}, and a run writes into files of its own "
                             "alone; replace it by a copy, or name another --run")


# Files of a run folder, which may be broken or someone else's: ValueError in one sentence


@contextmanager
def explained(path: Path, what: str, advice: str = ADVICE) -> Iterator[None]:
    try:
        yield
    except Misfit:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path} {what} ({one_line(error)}); {advice}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} {what} ({type(error).__name__}: {one_line(error)}); {advice}") from error


def checkpoint(path: Path) -> AbstractContextManager[None]:
    return explained(path, "is no checkpoint of a run of this version", "train again")


def read_config(path: Path) -> Config:
    """A run's config.json."""
    values = read_json(path)
    with explained(path, "is not a config of this version"):
        config = from_dict(values)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    with explained(path, "is not readable as JSON"):
        values = json.loads(check_file(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    return values


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, but for a last line that was not finished."""
    with explained(path, "does not hold one JSON object a line", "name another --run"):
        text = check_file(path).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is something else")
    return lines


def remembered(folder: Path) -> Listing:
    """The images that the run was started with; {} where an earlier version wrote the folder."""
    path = folder / LISTING
    if not path.exists():
        return {}
    with explained(path, "is not the list of images that a run writes", "remove it"):
        with gzip.open(check_file(path)) as file:
            content = file.read(MAX_LISTING + 1)
        found = json.loads(content) if len(content) <= MAX_LISTING else None
        if not (isinstance(found, dict) and all(map(are_names, found.values()))):
            raise ValueError("no lists of names, or too large")
    return found


def are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def first_changed(folder: Path, listing: Listing) -> str:
    """Part of a sentence: images of the run's start that are gone, and what can be done, or that are new."""
    before = remembered(folder)
    gone, new = ([name for part, names in ours.items() for name in {*names}.difference(theirs.get(part, ()))]
                 for ours, theirs in ((before, listing), (listing, before)))
    if gone:
        return (f" ({len(gone)} are gone, the first is {min(gone)}: bring them back, or count "
                "what was only removed as unreadable with --bad-images skip)")
    return f" ({len(new)} are new, the first is {min(new)})" if before and new else ""


def recorded_files(folder: Path) -> dict[str, Any]:
    """The digests of file lists in a run's run.json."""
    path = folder / "run.json"
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{path} lacks the digests of the run's file lists; name another --run")
    return files


# Checkpoints


def check_state(state: dict[str, Any]) -> None:
    """What every checkpoint of a run holds, whatever its task. Raises KeyError, TypeError or ValueError."""
    for key in ("class_names", "domain_names"):
        if not are_names(state[key]):
            raise TypeError(f"{key} is no list of names")
    if not isinstance(state["weights_sha256"], str):
        raise TypeError("weights_sha256 is no text")
    for name, value in [*state["method"].items(), *state.get("form", {}).items()]:
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise TypeError("the weights are not tensors by name")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds values that are not finite")


def check_sizes(path: Path, weights: dict[str, Tensor], sizes: dict[str, list[int]]) -> None:
    """Raises Misfit for a weight of other first dimensions, before a method of that size is made."""
    for name, here in sizes.items():
        there = list(weights[name].shape)[:len(here)]
        if there != here:
            raise Misfit(path, name, there, here)
