"""Train, find again and evaluate a run folder, whatever its method.

The folder holds config.json, run.json (command, versions, digests of weights and image lists), log.jsonl,
last.pt, best.pt and the results. The same command goes on where it stopped.
"""
from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision

from .. import __version__
from ..cli import as_value_error, load_state, read_json, save_atomic, write_text_atomic
from ..clip.weights import file_digest, load_clip
from ..config import (
    FIELDS,
    MACHINE,
    PATHS,
    Config,
    changes,
    differences,
    flag_of,
    from_dict,
    locate_weights,
    to_json,
)
from ..distributed import barrier, derive_seed, is_main, main_first, pick_device, set_precision
from ..training import Run, check_config, own_state
from ..training import train as train_phases
from . import classification, report, retrieval

CACHE = Path("runs", "cache")  # encoded images of all runs
Digests = Mapping[str, tuple[int, str]]  # of each list of images: how many, and the digest of their names


def is_classification(config: Config) -> bool:
    """Whether the run is SRE-CLIP's; ValueError for its folders with another method."""
    given = [flag_of(name) for name in ("graph", "source", "target") if getattr(config, name)]
    if given and config.method != "sre-clip":
        raise ValueError(f"{', '.join(given)}: only for --method sre-clip, and this is {config.method}")
    return config.method == "sre-clip"


def train(config: Config, folder: Path, cache: Path = CACHE, dry_run: bool = False,
          given: Collection[str] = tuple(FIELDS)) -> None:
    """Trains in the run folder, from where it stands, and evaluates; a dry run prints what it would do.

    given: fields that the user chose; of the others some follow from the size of an own folder. Raises
    FileNotFoundError or ValueError when data, weights or folder do not fit, KeyboardInterrupt after a signal.
    """
    device = pick_device(config.device)
    set_precision(config.precision)
    data: Any
    method: Any
    if is_classification(config):
        config, data = classification.load_data(config)
    else:
        config, data = retrieval.load_data(config, given)
    clip = load_clip(config.weights).to(device)
    torch.manual_seed(derive_seed(config.seed, "initial values"))
    if is_classification(config):
        method = classification.build_method(config, clip, data.graph, data.unseen)
        lines = classification.describe(config, data, method)
    else:
        method = retrieval.new_method(config, clip, data, device)
        lines = retrieval.describe(config, data, method)
    print(f"config   {json.dumps(changes(config))} (all else at its default)", *lines, sep="\n")
    if dry_run:
        return
    weights = file_digest(config.weights)
    extra = {"config": asdict(config), "weights_sha256": weights, "version": __version__}
    with main_first():
        lock = open_run(folder, config, weights, data.digests(), device)
    with lock:
        if is_finished(folder):
            print("finished already; evaluating")
        elif is_classification(config):
            phases, validate, learned = classification.training(config, data, method, folder, cache)
            # No tower runs in this loop, so its arithmetic stays float32; nothing stops it early.
            run = Run(folder, config.seed, "fp32", device, {**extra, **learned}, config.sre_iterations)
            train_phases(method, phases, validate, run)
        else:
            method, phases, validate, learned = retrieval.training(config, data, method)
            run = Run(folder, config.seed, config.precision, device, {**extra, **learned}, config.patience)
            if phases:
                train_phases(method, phases, validate, run)
            else:
                save_atomic({"method": own_state(method), **run.extra}, folder / "best.pt")
        # With the fields of now, not those in best.pt, which may be of before the data moved.
        now = {name: getattr(config, name) for name in (*MACHINE, *PATHS)}
        evaluate(folder, now, folder, cache, finished=True)


def restore(folder: str | Path, overrides: Mapping[str, Any], device: torch.device,
            force: bool = False) -> tuple[Config, Any, dict[str, Any]]:
    """The config of a run, its best method, ready to encode images, and all that best.pt holds.

    overrides: other paths of weights and data, and machine fields. The weights need no text tower: what text
    there was in training is in the checkpoint. Raises FileNotFoundError or ValueError when the folder holds
    no model, or one of another config, or, unless `force`, the weights are not the run's.
    """
    folder = Path(folder)
    path = folder / "best.pt"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no best.pt; {way_out(folder)}")
    from_dict(overrides)  # what does not fit here is no fault of the checkpoint
    with as_value_error(path, "is no whole checkpoint of a run", way_out(folder)):
        state = load_state(path)
        from_dict(state["config"])
        if not all(value.isfinite().all() for value in state["method"].values()):
            raise ValueError("it holds numbers that are not finite")
    if (folder / "config.json").exists():
        check_config(from_dict(read_json(folder / "config.json")), from_dict(state["config"]), path)
    config = from_dict({**state["config"], **overrides})
    config = replace(config, weights=locate_weights(config.weights))
    if file_digest(config.weights) != state["weights_sha256"] and not force:
        raise ValueError(f"{config.weights} is not the file that {folder} was trained with (its sha256 "
                         "differs); give that file as --weights, or accept this one with --force")
    build = classification.restore_method if is_classification(config) else retrieval.restore_method
    return config, build(config, load_clip(config.weights).to(device), state, path), state


def evaluate(folder: Path, overrides: Mapping[str, Any], out: Path | None = None, cache: Path = CACHE,
             force: bool = False, finished: bool = False) -> None:
    """Writes the results of a run into `out` (the run folder), then prints its table.

    Other images or weights than the run's are refused, or, with `force`, named in table and results.json,
    which then go into a folder of their own. finished: the training has just ended.
    """
    barrier()  # until the main process has written best.pt and the log
    device = pick_device(overrides.get("device", "auto"))
    config, method, state = restore(folder, overrides, device, force)
    set_precision(config.precision)
    data: Any = (classification.test_data(config, state) if is_classification(config)
                 else retrieval.load_data(config)[1])
    weights, digests = file_digest(config.weights), data.digests()
    remarks = ["made with other weights than the run's own"] * (weights != state["weights_sha256"])
    if changed := changed_lists(folder, digests):
        if not force:
            raise ValueError(f"these are not the images of {folder} ({changed}); give the run's own "
                             "--data-root, --target or --class-split, or accept others with --force")
        remarks.append(f"made with other images than the run's own ({changed})")
    out = out or (folder / "forced" if remarks else folder)
    if out != folder and (out / "config.json").exists():
        raise ValueError(f"--out {out} is the folder of another run; name one for these results")
    out.mkdir(parents=True, exist_ok=True)
    finished = finished or is_finished(folder) or not (folder / "last.pt").exists()
    if not finished:
        remarks.append("of the best epoch so far: the training has not finished")
    if is_classification(config):
        rows = classification.evaluate(config, data, method, state, folder, cache)
        lines, write = report.classification_table(rows, config), report.write_classification
    else:
        rows = retrieval.evaluate(config, data, method)
        lines, write = report.retrieval_table(rows, config), report.write_retrieval
    if "strength" in state:
        lines.append(f"closed form: lambda = {state['strength']:g}")
    text = "\n".join([*lines, *remarks])
    write(rows, out, {
        "run": str(folder), "config": asdict(config), "weights_sha256": weights, "files": digests,
        "versions": versions(device), "remarks": remarks, "finished": finished,
        "strength": state.get("strength"), "table": text})
    print(f"{text}\n{out}: report.html, results.json, per_class.csv and a picture")


def compare(*folders: Path) -> None:
    """Prints the tables of evaluated runs, and the fields in which they differ from the first."""
    found = [read_json(folder / "results.json") for folder in folders]
    for folder, results in zip(folders, found):
        print(f"{folder}\n{results['table']}\n")
    first, *others = (from_dict(results["config"]) for results in found)
    for folder, config in zip(folders[1:], others):
        print(f"{folders[0]} -> {folder}: {'; '.join(differences(config, first)) or 'the same fields'}")


# Run folders


def open_run(folder: Path, config: Config, weights: str, digests: Digests,
             device: torch.device) -> AbstractContextManager[object]:
    """Makes the run folder, or checks that it is of this config, these weights and images.

    Returns a context in which no other process can train there. Data and weights may have moved. Raises
    ValueError for another run (saying what differs), another kind of folder, or one that is in use.
    """
    path, record, different = folder / "config.json", folder / "run.json", list[str]()
    if path.exists():
        with as_value_error(path, "is no config of this version", "name another --run, or delete it"):
            different += differences(config, from_dict(read_json(path)), PATHS)
    elif folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):  # .x: a killed write's
        raise ValueError(f"{folder} exists and is no run folder (it has no config.json); name another --run")
    if record.exists():
        different += ["other weights"] * (read_json(record).get("weights_sha256") != weights)
        different += filter(None, [changed_lists(folder, digests)])
    if different:
        raise ValueError(f"{folder} holds another run ({'; '.join(different)}); name another --run, or "
                         "delete that folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_run(folder)
    write_text_atomic(path, to_json(config))  # first: it makes this a run folder, whatever happens next
    about = {"command": sys.argv, "weights_sha256": weights, "files": digests, "versions": versions(device)}
    write_text_atomic(record, json.dumps(about, indent=2) + "\n")
    return lock


def lock_run(folder: Path) -> AbstractContextManager[object]:
    """Holds the run folder for this process, until the context or the process ends, however it does."""
    if os.name != "posix" or not is_main():
        return nullcontext()
    import fcntl  # not on Windows
    try:
        file = open(folder / ".lock", "ab")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}; wait until it ends, or name another "
                         "--run") from None
    except OSError:  # a read-only folder, which writing reports, or a file system without locks
        return nullcontext()
    return file


def is_finished(folder: Path) -> bool:
    """Whether the run was trained to its end and evaluated."""
    path = folder / "results.json"
    return path.exists() and bool(read_json(path).get("finished"))


def way_out(folder: Path) -> str:
    """What to do where best.pt is missing or of no use."""
    if not (folder / "config.json").exists():
        return f"train first: python train.py --run {folder}"
    if is_finished(folder):  # the same command alone would only evaluate
        return f"to train again, delete results.json and last.pt in {folder} and run the command in run.json"
    return "go on with the command in its run.json"


def changed_lists(folder: Path, digests: Digests) -> str:
    """The lists of images that are not the run's, with their lengths now and then; empty where all are."""
    record = folder / "run.json"
    with as_value_error(record, "lacks the digests of the run's images", "name another --run"):
        before = {name: (count, digest) for name, (count, digest) in read_json(record)["files"].items()}
        return ", ".join(f"{name}: {now[0]} files now, {before[name][0]} at the start"
                         for name, now in digests.items() if now != before[name])


def versions(device: torch.device) -> dict[str, str]:
    """What computes: packages, machine, GPU."""
    return {"ucdr_ref": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
            "threads": str(torch.get_num_threads())}


def default_run(method: str, fast: bool) -> Path:
    """Where a training without --run goes: runs/demo, runs/fast, runs/sre-demo or runs/sre-fast."""
    return Path("runs", ("sre-" if method == "sre-clip" else "") + ("fast" if fast else "demo"))


def newest_run() -> Path:
    """The run below runs/ that was evaluated last, named on stderr; FileNotFoundError where there is none."""
    runs = [path.parent for path in Path("runs").glob("*/results.json") if path.with_name("best.pt").exists()]
    if not runs:
        raise FileNotFoundError("no --run was given, and no folder in runs/ holds a finished run; train "
                                "first: python train.py")
    newest = max(runs, key=lambda run: (run / "results.json").stat().st_mtime)
    if is_main():
        print(f"{newest} (the newest run; --run names another)", file=sys.stderr)
    return newest
