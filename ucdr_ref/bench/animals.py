"""Measures SRE-CLIP, its ablations and the ridge regression beside it on real animals in several domains.

    python -m ucdr_ref.bench.animals --data DIR --weights FILE --out results/

DIR holds `<domain>/<class>/<image>` of AwA2's classes for sketch, quickdraw, clipart (sources) and photo
(target), and AwA2's attribute tables, which give the class vectors: so the weights may be an image tower
alone. Every run is an ordinary `python train.py ...` below --out, finished ones are not run again. Accuracies
are averaged over images. The ridge, which has no spread, runs for seed 0 alone.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..experiments.class_folders import SHIPPED
from ..experiments.datasets import folder_key
from ..experiments.run_folder import versions
from ..machine.command import command, place
from ..machine.files import make_folder, write_text_atomic
from ..sre.graph import load_graph, with_ancestors
from .drawn import NO_TARGET
from .real import STROKES, spent, spread, train
from .record import as_called, write_results
from .ridge import compare

SOURCES = (*STROKES, "clipart")
VARIANTS: dict[str, list[str]] = {
    "SRE-CLIP": [], "SRE-CLIP, no inversion": ["--stroke-domains", "none"],
    "no structure": ["--sre-structure", "0"], "no retention": ["--sre-retention", "0"],
    "no target losses": NO_TARGET,
    "half the iterations": ["--sre-iterations", "1500"], "true share": ["--sre-kappa", "0.24"]}
WITH_RIDGE = ("SRE-CLIP", "SRE-CLIP, no inversion")
KEYS = ("zsl", "unseen", "seen", "h")
SEEDS = (0, 1, 2)


def plan() -> list[tuple[str, int]]:
    """Every run: (variant, seed)."""
    return [(variant, seed) for seed in SEEDS for variant in VARIANTS]


def write_attributes(data: Path, path: Path) -> str:
    """Class vectors for `--class-vectors`: continuous attributes, an ancestor's the mean of its classes'."""
    graph = load_graph(SHIPPED / "awa2.json")
    names = [folder_key(line.split()[1]) for line in (data / "classes.txt").read_text().splitlines()]
    table = np.loadtxt(data / "predicate-matrix-continuous.txt", ndmin=2)
    matrix = torch.from_numpy(table).clamp(min=0)  # -1: not known
    rows = matrix[[names.index(folder_key(name)) for name in graph.names[:graph.classes]]]
    vectors = with_ancestors(F.normalize(rows, dim=1), graph)
    lines = (" ".join([node, *(f"{value:.5f}" for value in row)])
             for node, row in zip(graph.ids, vectors.tolist(), strict=True))
    write_text_atomic(path, "\n".join(lines) + "\n")
    return str(path)


def read(folder: Path, ridge: bool) -> dict[str, Any]:
    """A finished run's accuracies in points of 100, by method (with `ridge` also its), and what it took."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    found = {row["method"]: row["instance"] for row in rows}
    if rows:
        found |= compare(folder)
    if ridge:
        found |= compare(folder, center=True)
    numbers = {method: {key: None if values[key] is None else round(100 * values[key], 2) for key in KEYS}
               for method, values in found.items() if ridge or not method.startswith("ridge")}
    return {**spent(folder), "numbers": numbers}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method of each variant, mean ± deviation over seeds; baselines once."""
    lines, shown = ["| | seeds | ZSL | unseen | seen | H |", "|---|---|---|---|---|---|"], set()
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        for method in mine[0]["numbers"]:
            title = f"{variant}: {method}"
            if method == "prototypes":
                title = "nearest prototype" + (", no inversion" if "no inversion" in variant else
                                               ", centred" if "centred" in variant else "")
            if title in shown:
                continue
            shown.add(title)
            with_it = [run for run in mine if method in run["numbers"]]
            values = [[run["numbers"][method][key] for run in with_it] for key in KEYS]
            cells = " | ".join("-" if None in column else spread(column) for column in values)
            lines.append(f"| {title} | {len(with_it)} | {cells} |")
    return "\n".join(lines)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.animals", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--data", "--weights", "--out"):
        parser.add_argument(flag, type=place, required=True)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}cores")
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 1) - 1),
                        help="as in train.py")
    args = parser.parse_args(argv)
    data, weights, out = (path.resolve() for path in (args.data, args.weights, args.out))
    make_folder(out)
    machine = re.sub(r"[^a-z0-9]+", "-", args.machine.lower())
    vectors = write_attributes(data, out / "attributes.txt")
    base = ["--preset", "i2awa", "--source", *(str(data / name) for name in SOURCES),
            "--target", str(data / "photo"), "--class-vectors", vectors, "--weights", str(weights),
            "--precision", "bf16", "--eval-batch", "16", "--stroke-domains", *STROKES]
    runs = []
    for variant, seed in plan():
        folder = out / re.sub(r"[^a-z0-9]+", "-", f"animals {variant} {seed}".lower())
        if variant in args.variants and seed in args.seeds:
            flags = ["--run", str(folder), *base, "--seed", str(seed), *VARIANTS[variant]]
            train(flags, args.workers, args.machine)
        if (folder / "results.json").exists():
            ridge = seed == 0 and variant in WITH_RIDGE
            runs.append({"variant": variant, "seed": seed, **read(folder, ridge)})
    line = as_called(parser, args, "--data DIR --weights FILE --out OUT", "variants", "seeds")
    write_results(out / f"animals-{machine}.json", {
        "machine": machine, "versions": versions(), "date": time.strftime("%Y-%m-%d"), "command": line,
        "runs": runs})
    print(table(runs))


def main(argv: list[str] | None = None) -> int:
    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
