"""Measures SRE-CLIP, its ablations and the ridge regression beside it on real animals in several domains.

    python -m ucdr_ref.bench.animals --data DIR --weights FILE --out results/

DIR holds `<domain>/<class>/<image>` of AwA2's classes for sketch, quickdraw, clipart (sources) and photo
(target), and AwA2's attribute tables, which give the class vectors: so the weights may be an image tower
alone. Every run is an ordinary `python train.py ...` below --out, finished ones are not run again. Accuracies
are averaged over images. The ridge, which has no spread, runs for seed 0 alone.
"""
import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..cli import read_json, run_command, write_text_atomic
from ..data.folders import folder_key
from ..experiments.classification import SHIPPED
from ..sre.graph import load_graph, with_ancestors
from .drawn import NO_TARGET
from .frozen import STROKES
from .record import origin, spread, train, write_results
from .ridge import compare

SOURCES = (*STROKES, "clipart")
VARIANTS: dict[str, list[str]] = {
    "SRE-CLIP": [], "SRE-CLIP, no inversion": ["--stroke-domains", "none"],
    "no structure": ["--sre-structure", "0"], "no retention": ["--sre-retention", "0"],
    "no target losses": NO_TARGET.split(),
    "half the iterations": ["--sre-iterations", "1500"], "true share": ["--sre-kappa", "0.24"]}
WITH_RIDGE = ("SRE-CLIP", "SRE-CLIP, no inversion")
KEYS = ("zsl", "unseen", "seen", "h")
SEEDS = (0, 1, 2)


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


def read(folder: Path, cache: Path, ridge: bool) -> dict[str, Any]:
    """A finished run's accuracies in %, by method, with `ridge` also its."""
    found = compare(folder, cache)
    if ridge:
        found |= compare(folder, cache, centered=True)
    found |= {row["method"]: row["instance"] for row in read_json(folder / "results.json")["rows"]}
    return {method: {key: None if values[key] is None else round(100 * values[key], 2) for key in KEYS}
            for method, values in found.items() if ridge or not method.startswith("ridge")}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, %: each method of each variant, mean ± sample deviation over n seeds; baselines once."""
    lines, shown = ["| | n | ZSL | unseen | seen | H |", "|---" * 6 + "|"], set()
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        for method in mine[0]["numbers"]:
            title = f"{variant}: {method}"
            if method == "prototypes":
                kinds = [kind for kind in ("no inversion", "centred") if kind in variant]
                title = ", ".join(["nearest prototype", *kinds])
            if title in shown:
                continue
            shown.add(title)
            of_method = [run["numbers"][method] for run in mine if method in run["numbers"]]
            columns = [[numbers[key] for numbers in of_method] for key in KEYS]
            cells = " | ".join("-" if None in column else spread(column) for column in columns)
            lines.append(f"| {title} | {len(of_method)} | {cells} |")
    return "\n".join(lines)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.animals", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--data", "--weights", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}cores")
    parser.add_argument("--workers", type=int, default=1, help="as in train.py")
    args = parser.parse_args(argv)
    data, weights, out = (path.resolve() for path in (args.data, args.weights, args.out))
    out.mkdir(parents=True, exist_ok=True)
    vectors, cache = write_attributes(data, out / "attributes.txt"), out / "cache"
    base = ["--preset", "i2awa", "--source", *(str(data / name) for name in SOURCES),
            "--target", str(data / "photo"), "--class-vectors", vectors, "--weights", str(weights),
            "--precision", "bf16", "--stroke-domains", *STROKES, "--cache", str(cache),
            "--workers", str(args.workers)]
    runs = []
    for seed in SEEDS:
        for variant, switches in VARIANTS.items():
            folder = out / re.sub(r"[^a-z0-9]+", "-", f"animals {variant} {seed}".lower())
            train(folder, ["--seed", str(seed), *base, *switches])
            ridge = seed == 0 and variant in WITH_RIDGE
            runs.append({"variant": variant, "seed": seed, "numbers": read(folder, cache, ridge)})
    write_results(out / f"animals-{args.machine}.json", {
        **origin(f"{parser.prog} --data DIR --weights FILE --out OUT", args.machine), "runs": runs})
    print(table(runs))


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
