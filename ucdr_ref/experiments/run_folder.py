"""Run folders: what a run was made of, written before it starts, and the way back from a folder to a method."""
from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from torch import Tensor

from .. import __version__
from ..clip.load import load_clip
from ..clip.model import CLIP
from ..clip.tensorfile import file_digest, regular_file, show, tidy
from ..clip.zero_shot import ZeroShot
from ..config import Config, differences, from_dict, to_json
from ..machine.files import load_state, write_text_atomic
from ..machine.processes import is_main
from ..sre.adapter import SRECLIP
from ..sre.graph import normalised_adjacency, parse_graph
from ..training.loop import Encoder, Misfit, load_own_state
from ..ucdr.adapter import UCDRAdapter


def versions() -> dict[str, str]:
    return {"ucdr_ref": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "threads": str(torch.get_num_threads())}


def open_run(folder: Path, config: Config, about: dict[str, Any]) -> AbstractContextManager[object]:
    """Makes the run folder, or checks that it belongs to this very config, and writes config.json and run.json.

    Returns a context in which no other process can open the run.
    Raises ValueError that lists the fields in which an existing run differs, names a folder that holds something else, or
    one in which another process trains.
    """
    path = folder / "config.json"
    if path.exists():
        found = read_config(path)
        different = differences(config, found)
        if different:
            raise ValueError(f"{folder} holds a run of another config ({'; '.join(different)}); name another --run, or delete "
                             "that folder to start anew")
        before = read_json(folder / "run.json") if (folder / "run.json").exists() else about
        for key in ("weights_sha256", "files"):
            if before.get(key) != about.get(key):
                what = "weights" if key == "weights_sha256" else "image files or class graph"
                raise ValueError(f"{folder} was started with other {what} than there are now; name another --run, or delete that "
                                 "folder to start anew")
    elif folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):  # a killed write leaves a hidden name
        raise ValueError(f"{folder} exists and is no run folder (it has no config.json); name another --run")
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    write_text_atomic(path, to_json(config))  # first: it makes this a run folder, whatever happens next
    write_text_atomic(folder / "run.json", json.dumps({"command": sys.argv, "versions": versions(), **about}, indent=2) + "\n")
    return held


def lock(folder: Path) -> AbstractContextManager[object]:
    """Holds the run folder for this process, until the context or the process ends, however it does."""
    if os.name != "posix" or not is_main():
        return nullcontext()
    import fcntl  # not on Windows
    try:
        file = open(folder / ".lock", "w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}; wait until it ends, or name another --run") from None
    except OSError:  # a read-only folder, which writing reports, or a file system without locks
        return nullcontext()
    return file


def read_config(path: Path) -> Config:
    """A run's config.json; ValueError in one sentence."""
    values = read_json(path)
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{show(path)}: not a config of this version ({tidy(error)}); name another --run, or delete that "
                         "folder") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a run folder holds; ValueError in one sentence."""
    try:
        values = json.loads(regular_file(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{show(path)}: not readable as JSON ({tidy(error)}); name another --run, or delete that "
                         "folder") from None
    return values


def describe(config: Config, class_names: list[str], domain_names: list[str], weights_sha256: str) -> dict[str, Any]:
    """What goes with a method's weights into every checkpoint."""
    return {"config": asdict(config), "class_names": class_names, "domain_names": domain_names, "weights_sha256": weights_sha256,
            "version": __version__}


def restore(folder: Path, overrides: dict[str, Any], device: torch.device) -> tuple[Config, Encoder, dict[str, Any]]:
    """The config, the best method and the checkpoint's other contents of a run folder, ready to encode images.

    `overrides` may give other `weights`, `data_root`, `target` and machine fields. No text tower is needed: what text there was
    in training is in the trained weights. Raises FileNotFoundError or ValueError when the folder holds no finished run, or
    the weights are not those of the run.
    """
    path = folder / "best.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; train first: python train.py --run {folder}")
    state = load_state(path)
    try:
        config = from_dict({**state["config"], **overrides})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no config of this version ({tidy(error)}); train again") from error
    with sound(path):
        check_state(config, state, path)
    try:
        digest = file_digest(config.weights)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {folder} needs the CLIP weights it was trained with: give them as --weights") from error
    if digest != state["weights_sha256"] and "weights" not in overrides:
        raise ValueError(f"{config.weights} is not the file that {folder} was trained with (its sha256 differs); give that file "
                         "as --weights")
    clip = load_clip(config.weights, config.heads or None).to(device)
    if config.compile:
        clip.visual.transformer.compile()
    with sound(path):
        return config, rebuild(config, clip, state, path, device), state


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """Turns whatever a checkpoint of unsound content leads to into one sentence."""
    try:
        yield
    except Misfit:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of a run ({type(error).__name__}: {tidy(error)}); train again") from error


def check_state(config: Config, state: dict[str, Any], path: Path) -> None:
    """What must hold before a method is built from a checkpoint: types, and sizes that are those of the file's own tensors.

    Raises ValueError, KeyError or TypeError.
    """
    names = [*state["class_names"], *state["domain_names"]]
    weights = state["method"]
    if not (all(isinstance(name, str) for name in names) and isinstance(state["weights_sha256"], str)
            and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items())):
        raise TypeError("names, digest or weights are something else")
    p, (c, s) = config.prompt_length, (len(state[key]) for key in ("class_names", "domain_names"))
    sizes: dict[str, list[int]] = {}
    if config.method == "ucdr-adapter":
        sizes = {"domain_prompts": [s, p], "class_prompts": [c, p], "queues.rows": [c + 1, config.queue_size]}
    elif config.method == "sre-clip":
        extra = config.sre_batch - 1 if config.bank_ring == "released" else 0
        if not isinstance(state["baseline"], str) or state["anchors"].shape[:1] != (c,):
            raise TypeError("the baseline is something else")
        sizes = {"bank.store": [config.sre_bank + extra, config.sre_hidden], "class_vectors": [len(state["graph"]["ids"])]}
    for name, here in sizes.items():
        there = list(weights[name].shape)[:len(here)]
        if there != here:
            raise Misfit(path, name, there, here)


def rebuild(config: Config, clip: CLIP, state: dict[str, Any], path: Path, device: torch.device) -> Encoder:
    """The method of a checkpoint, ready to encode."""
    if config.method == "zero-shot":
        return ZeroShot(clip, config.evaluation_features == "normalized")
    if config.method == "sre-clip":
        graph = parse_graph(state["graph"])
        adjacency = normalised_adjacency(graph.edges, len(graph.ids))
        vectors = state["method"]["class_vectors"]
        sre = SRECLIP(clip, state["class_names"], vectors, adjacency, state["unseen_ids"], config).to(device)
        load_own_state(sre, state["method"], path)
        return sre.eval()
    anchors = torch.zeros(len(state["class_names"]), clip.embed_dim, device=device)
    method = UCDRAdapter(clip, state["class_names"], state["domain_names"], config, anchors).to(device)
    load_own_state(method, {name: value for name, value in state["method"].items() if name != "template.ctx"}, path)
    return method.eval()
