"""Every experiment: built from a config, trained, found again in its run folder, evaluated.

A task is a module: `retrieval` for UCDR, `classification` for domain-adaptive zero-shot classification. A
third one is a module with the same functions, which `task_of` chooses:

    prepare(config, before) -> config, data     scans the images of a training (all are in data.listing)
    build(config, data, clip, device) -> Experiment
    check(config, state, path)                  raises where rebuild could not take the checkpoint
    rebuild(config, clip, state, path, device) -> the method of a checkpoint
    tested(config, state, before) -> data       what a run is evaluated on, with digests()
    evaluate(config, data, method, state, folder, device, with_closed_form) -> rows
    table(rows, config) -> text;  write_results(rows, folder, about);  page(rows, log_lines, about) -> HTML
"""
from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..clip.model import CLIP
from ..clip.weights import file_digest, load_clip
from ..config import Config, changes, from_dict, located
from ..machine.files import load_state, make_folder, save_atomic, write_text_atomic
from ..machine.options import MACHINE
from ..machine.processes import fold, main_first, pick_device, wait
from ..training.journal import own_state
from ..training.loop import train as train_phases
from . import classification, retrieval
from .contract import Method
from .page import log_lines
from .report import plain
from .run_folder import (
    MAY_DIFFER,
    check_entries,
    check_state,
    checkpoint,
    first_changed,
    open_run,
    recorded_files,
    remembered,
    versions,
)


def task_of(config: Config) -> Any:
    """The module of a config's task; ValueError for flags of the other task."""
    given = [f"--{name}" for name in ("graph", "source", "target") if getattr(config, name)]
    if config.method == "sre-clip":
        return classification
    if given:
        raise ValueError(f"{', '.join(given)}: only for --method sre-clip, and this is {config.method}; "
                         f"leave out {' and '.join(given)}")
    return retrieval


def load_tower(config: Config, verify: bool, device: torch.device) -> CLIP:
    """CLIP of the config's weights on the device, its vision blocks compiled where --compile asks for it."""
    clip = load_clip(config.weights, config.heads or None).to(device)
    if config.compile:
        clip.visual.transformer.compile()
    return clip


def train(config: Config, folder: Path, verify: bool = True, dry_run: bool = False) -> None:
    """Trains in the run folder, from where it stands, and evaluates; a dry run prints what it would do.

    verify: weights named as OpenAI's must have the published digest. Raises FileNotFoundError or ValueError
    when data, weights or folder do not fit, Stopped after SIGINT or SIGTERM.
    """
    device, task = pick_device(config.device), task_of(config)
    config, data = task.prepare(config, remembered(folder) if config.bad_images == "skip" else {})
    clip = load_tower(config, verify, device)
    torch.manual_seed(fold(config.seed, "initial values"))
    experiment = task.build(config, data, clip, device)
    print(f"config   {json.dumps(changes(config))} (all else at its default)")
    print(experiment.summary)
    for phase in experiment.method.PHASES:
        count = sum(parameter.numel() for parameter in experiment.method.trainable(phase).values())
        print(f"phase {phase}: {count:,} trainable parameters")
    if dry_run:
        return
    weights = file_digest(config.weights)
    made_of = {"weights_sha256": weights, "files": data.digests(), "versions": versions(device)}
    with main_first():
        held = open_run(folder, config, made_of, data.listing)
    with held:
        about = {"config": asdict(config), "weights_sha256": weights, "version": __version__}
        feeds, validate, run = experiment.start(folder, about)
        if experiment.method.PHASES:
            train_phases(experiment.method, feeds, validate, run)
        else:
            save_atomic({"method": own_state(experiment.method), **run.extra}, folder / "best.pt")
        wait()  # until the main process has written best.pt
        experiment.finish(folder)
        # Not those in best.pt, which may be of before the data moved.
        now = {name: getattr(config, name) for name in (*MACHINE, *MAY_DIFFER)}
        evaluate(folder, now, folder, verify=verify)


def restore(folder: str | Path, overrides: dict[str, Any], device: torch.device, verify: bool = True,
            other_weights: bool = False) -> tuple[Config, Method, dict[str, Any]]:
    """The config of a run folder, its best method, ready to encode images, and the checkpoint's content.

    overrides: other paths of weights and data, and machine fields. The weights need no text tower: what text
    there was in training is in the checkpoint. Raises FileNotFoundError or ValueError when the folder holds
    no finished run, or the weights' digest is not the run's, unless `other_weights`.
    """
    folder = Path(folder)  # text will do
    check_entries(folder)
    path = folder / "best.pt"
    if not path.exists():
        advice = f"train first: python train.py --run {folder}"
        if (folder / "config.json").exists():
            advice = "go on with the command in its run.json"
        raise FileNotFoundError(f"{folder} holds no best.pt of a run; {advice}")
    from_dict(overrides)  # what does not fit here is no fault of the checkpoint
    state = load_state(path)
    with checkpoint(path):
        config = from_dict({**state["config"], **overrides})
        check_state(state)
    config = replace(config, weights=located(config.weights))
    try:
        digest = file_digest(config.weights)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {folder} needs the CLIP weights it was trained with: give them as "
                         "--weights") from error
    if digest != state["weights_sha256"] and not other_weights:
        raise ValueError(f"{config.weights} is not the file that {folder} was trained with (its sha256 "
                         "differs); give that file as --weights, or accept this one with --other-weights")
    task = task_of(config)
    with checkpoint(path):
        task.check(config, state, path)
    clip = load_tower(config, verify, device)
    return config, task.rebuild(config, clip, state, path, device), state


def evaluate(folder: Path, overrides: dict[str, Any], out: Path | None = None, other_data: bool = False,
             other_weights: bool = False, verify: bool = True, with_closed_form: bool = False) -> None:
    """Writes the results of a run into `out` (the run folder), then prints its table.

    Raises ValueError when image lists or weights are not the run's, unless `other_data` or `other_weights`
    is given: then table and results.json say so, and they go into a folder of their own. So do those of a
    run whose training can go on.
    """
    wait()  # until the main process has written best.pt and the log
    device = pick_device(overrides.get("device", "auto"))
    config, method, state = restore(folder, overrides, device, verify, other_weights)
    task, weights, log = task_of(config), file_digest(config.weights), log_lines(folder)
    data = task.tested(config, state, remembered(folder) if config.bad_images == "skip" else {})
    digests, before = data.digests(), recorded_files(folder)
    changed = [name for name, digest in digests.items() if digest and before.get(name) != digest]
    if changed and not other_data:
        raise ValueError(f"the image lists are not those that {folder} was trained with "
                         f"({', '.join(changed)}){first_changed(folder, data.listing)}; give the run's own "
                         "--data-root, --target or --class-split, or accept others with --other-data")
    differs = {"weights": weights != state["weights_sha256"], "data": bool(changed)}
    other = [what for what in differs if differs[what]]
    unfinished = out != folder and (folder / "last.pt").exists() and not (folder / "results.json").exists()
    out = out or folder.joinpath(*(f"other-{what}" for what in other), *["unfinished"] * unfinished)
    if out != folder and (out / "config.json").exists():
        raise ValueError(f"--out {out} is the folder of another run; name one for these results")
    make_folder(out)
    rows = task.evaluate(config, data, method, state, folder, device, with_closed_form)
    about = {"run": str(folder), "config": asdict(config), "versions": versions(device), "other": other,
             "unfinished": unfinished, "weights_sha256": weights, "files": digests}
    task.write_results(rows, out, about)
    text = "\n".join([task.table(rows, config),
                      *(f"          other {what} than the run's own" for what in other),
                      *["          the best epoch so far: the training has not finished"] * unfinished])
    page = task.page(rows, log, {**about, "defaults": asdict(Config()), "table": text})
    write_text_atomic(out / "report.html", page)
    print(text)
    print(f"{plain(out)}: report.html, results.json, CSV tables and a picture")
