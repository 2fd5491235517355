"""Train, find again and evaluate a run folder, whatever its method.

The folder holds config.json, run.json (command, versions, digests of weights and image lists), log.jsonl,
last.pt, best.pt and, once the run is finished, results.json. The same command goes on where it stopped.
"""
import json
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
from ..cli import as_value_error, load_state, read_json, write_text_atomic
from ..clip.weights import file_digest, load_clip
from ..config import FIELDS, PATHS, Config, differences, from_dict, locate_weights
from ..distributed import barrier, derive_seed, is_main, pick_device, set_precision
from ..training import Run, check_config, load_own_state
from ..training import train as train_phases
from . import classification, report, retrieval


def train(config: Config, folder: Path, cache: Path, dry_run: bool = False,
          given: Collection[str] = tuple(FIELDS)) -> None:
    """Trains in the run folder, from where it stands, and evaluates; a dry run prints what it would do.

    given: fields that the user chose; some others follow from the size of an own folder. Raises ValueError or
    OSError where something does not fit, KeyboardInterrupt after a signal.
    """
    device, sre = pick_device(config.device), config.method == "sre-clip"
    set_precision(config.precision)
    if not sre and (config.graph or config.source or config.target):
        raise ValueError(f"--graph, --source, --target: only for --method sre-clip, not {config.method}")
    clip = load_clip(config.weights).to(device)
    torch.manual_seed(derive_seed(config.seed, "initial values"))
    data: Any
    if sre:
        config, data = classification.load_data(config)
        method = classification.build_method(config, clip, data.classes())
        lines = classification.describe(config, data, method)
    else:
        config, data = retrieval.load_data(config, given)
        method = retrieval.new_method(config, clip, data)
        lines = retrieval.describe(config, data, method)
    chosen = {name: value for name, value in asdict(config).items() if value != FIELDS[name].default}
    print(f"config   {json.dumps(chosen)} (all else at its default)", *lines, sep="\n")
    if dry_run:
        return
    weights = file_digest(config.weights)
    with open_run(folder, config, weights, data.digests(), device) if is_main() else nullcontext():
        if (folder / "results.json").exists():
            print("finished already; evaluating")
        else:
            if sre:  # no tower runs in its loop, whose arithmetic stays float32; nothing stops it early
                precision, patience = "fp32", config.sre_iterations
                phases, validate, learned = classification.training(config, data, method, folder, cache)
            else:
                precision, patience = config.precision, config.patience
                phases, validate, learned = retrieval.training(config, data, method)
            extra = {"config": asdict(config), "weights_sha256": weights, **learned}
            run = Run(folder, config.seed, precision, device, extra, patience)
            train_phases(method, phases, validate, run)
        evaluate(folder, asdict(config), cache, finished=True)  # best.pt may have other paths


def restore(folder: str | Path, overrides: Mapping[str, Any], device: torch.device,
            force: bool = False) -> tuple[Config, Any, dict[str, Any]]:
    """The config of a run, its best method, ready to encode images, and all that best.pt holds.

    overrides: other paths of weights and data, and machine fields. Raises ValueError or OSError without such
    a model, and, unless `force`, for other weights than the run's.
    """
    path, advice = Path(folder, "best.pt"), f"train first: python train.py --run {folder}"
    if path.exists() or path.with_name("results.json").exists():  # the same command alone would only evaluate
        advice = f"delete results.json and last.pt in {folder}, then run the command in its run.json"
    elif path.with_name("run.json").exists():  # stopped before its first best epoch
        advice = "run the command in its run.json, which goes on"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no best.pt; {advice}")
    state = load_state(path, advice)
    with as_value_error(path, "is no whole checkpoint", advice):
        trained = from_dict(state["config"])
    check_config(from_dict(read_json(path.with_name("config.json"))), trained, path)
    config = from_dict({**state["config"], **overrides})
    config = replace(config, weights=locate_weights(config.weights))
    if file_digest(config.weights) != state["weights_sha256"] and not force:
        raise ValueError(f"{config.weights} is not the file that {folder} was trained with (its sha256 "
                         "differs); give that file as --weights, or accept this one with --force")
    build = classification.build_method if config.method == "sre-clip" else retrieval.build_method
    method: Any = build(config, load_clip(config.weights).to(device), state)
    # Without the text template, which encodes no image.
    own = {name: value for name, value in state["method"].items() if name != "template.ctx"}
    load_own_state(method, own, path)
    return config, method.eval(), state


def evaluate(folder: Path, overrides: Mapping[str, Any], cache: Path, force: bool = False,
             finished: bool = False) -> None:
    """Writes the results of a run into its folder, then prints its table.

    Other images or weights than the run's, and a training that has not finished, are refused, or, with
    `force`, named in table and results.json, in the folder `forced` of the run. finished: it has just ended.
    """
    barrier()  # until the main process has written best.pt and the log
    device = pick_device(overrides.get("device", "auto"))
    config, method, state = restore(folder, overrides, device, force)
    set_precision(config.precision)
    sre, weights = config.method == "sre-clip", file_digest(config.weights)
    data: Any = classification.test_data(config, state) if sre else retrieval.load_data(config)[1]
    remarks = other_inputs(folder, weights, data.digests())
    if not finished and (folder / "last.pt").exists() and not (folder / "results.json").exists():
        remarks.append("the training has not finished")
    if remarks and not force:
        raise ValueError(f"{folder}: {'; '.join(remarks)}; --force evaluates all the same, and says so")
    out = folder / "forced" if remarks else folder
    out.mkdir(exist_ok=True)
    if sre:
        rows = classification.evaluate(config, data, method, folder, cache)
        lines, write = report.classification_table(rows), report.write_classification
    else:
        rows = retrieval.evaluate(config, data, method)
        lines, write = report.retrieval_table(rows), report.write_retrieval
    if "strength" in state:
        lines.append(f"closed form: lambda = {state['strength']:g}")
    text = "\n".join([*lines, *remarks])
    write(rows, out, {
        "run": str(folder), "config": asdict(config), "weights_sha256": weights, "versions": versions(device),
        "remarks": remarks, "strength": state.get("strength"), "table": text})
    print(f"{text}\n{out}: report.html, results.json, per_class.csv and a picture")


# Run folders


def open_run(folder: Path, config: Config, weights: str, digests: Mapping[str, tuple[int, str]],
             device: torch.device) -> AbstractContextManager[object]:
    """Makes the run folder, or checks that it is of this config, these weights and images, wherever they lie.

    Returns a context in which no other process can train there; ValueError for another or a busy folder.
    """
    path, record, different = folder / "config.json", folder / "run.json", list[str]()
    if path.exists():
        different += differences(config, from_dict(read_json(path)), PATHS)
    elif any(folder.glob("[!.]*")):  # .x: a killed write's
        raise ValueError(f"{folder} is no run folder (it has no config.json); name another --run")
    if record.exists():
        different += other_inputs(folder, weights, digests)
    if different:
        raise ValueError(f"{folder} holds another run ({'; '.join(different)}); name another --run")
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_run(folder)
    # first: it makes this a run folder, whatever happens next
    write_text_atomic(path, json.dumps(asdict(config), indent=2) + "\n")
    about = {"command": sys.argv, "weights_sha256": weights, "files": digests, "versions": versions(device)}
    write_text_atomic(record, json.dumps(about, indent=2) + "\n")
    return lock


def lock_run(folder: Path) -> AbstractContextManager[object]:
    """Holds the run folder for this process until the context or the process ends, however it does."""
    if sys.platform == "win32":
        return nullcontext()
    import fcntl
    file = open(folder / ".lock", "ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}; wait, or name another --run") from None
    return file


def other_inputs(folder: Path, weights: str, digests: Mapping[str, tuple[int, str]]) -> list[str]:
    """What of weights (a digest) and image lists {name: (length, digest)} is not the run's."""
    path = folder / "run.json"
    record = read_json(path)
    with as_value_error(path, "does not say what the run was made with", "name another --run"):
        found = ["other weights than the run's"] * (record["weights_sha256"] != weights)
        for name, now in digests.items():
            count, digest = record["files"][name]
            if now != (count, digest):
                found.append(f"other images than the run's ({name}: {now[0]} now, {count} at the start)")
    return found


def versions(device: torch.device) -> dict[str, str]:
    """What computes: packages, machine, GPU."""
    return {"ucdr_ref": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__,
            "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none"}
