"""Measures SRE-CLIP, its ablations and the ridge regression beside it on real animals in several domains.

    python -m ucdr_ref.bench.animals --data DIR --weights FILE --out results/

DIR holds `<domain>/<class>/<image>` of AwA2's classes for sketch, quickdraw, clipart (sources) and photo
(target), and AwA2's attribute tables, which give the class vectors: so the weights may be an image tower
alone. Every run is an ordinary `python train.py ...` below --out, finished ones are not run again. Accuracies
are averaged over images. The ridge, which has no spread, runs for seed 0 alone.
"""
from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..cli import make_folder, run_command, write_text_atomic
from ..data.folders import folder_key
from ..experiments.classification import SHIPPED
from ..sre.graph import load_graph, with_ancestors
from .drawn import NO_TARGET
from .real import STROKES, spent, train
from .record import SPREAD, about, add_training_flags, markdown, parser_of, slug, spread, write_results
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
    """A finished run's accuracies in per cent, by method (with `ridge` also its), and what it took."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    found = {row["method"]: row["instance"] for row in rows}
    if rows:
        found |= compare(folder, folder.parent / "cache")
    if ridge:
        found |= compare(folder, folder.parent / "cache", centered=True)
    numbers = {method: {key: None if values[key] is None else round(100 * values[key], 2) for key in KEYS}
               for method, values in found.items() if ridge or not method.startswith("ridge")}
    return {**spent(folder), "numbers": numbers}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method of each variant, spread over seeds; the baseline once."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        mine = [other for other in runs if other["variant"] == run["variant"]]
        for method in run["numbers"]:
            title = f"{run['variant']}: {method}"
            if method == "prototypes":
                ways = (way for way in ("no inversion", "centred") if way in run["variant"])
                title = ", ".join(["nearest prototype", *ways])
            if title not in rows:
                values = [other["numbers"][method] for other in mine if method in other["numbers"]]
                cells = [spread([value[key] for value in values if value[key] is not None]) for key in KEYS]
                rows[title] = [title, str(len(values)), *cells]
    return markdown(["", "n", "ZSL", "unseen", "seen", "H"], list(rows.values()))


def run(argv: list[str] | None) -> None:
    parser = parser_of("ucdr_ref.bench.animals", __doc__)
    add_training_flags(parser)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=list(SEEDS))
    args = parser.parse_args(argv)
    data, weights, out = (path.resolve() for path in (args.data, args.weights, args.out))
    make_folder(out)
    vectors = write_attributes(data, out / "attributes.txt")
    base = ["--preset", "i2awa", "--source", *(str(data / name) for name in SOURCES),
            "--target", str(data / "photo"), "--class-vectors", vectors, "--weights", str(weights),
            "--precision", "bf16", "--stroke-domains", *STROKES, "--cache", str(out / "cache")]
    runs = []
    for seed, variant in product(SEEDS, VARIANTS):
        folder = out / slug(f"animals {variant} {seed}")
        if variant in args.variants and seed in args.seeds:
            flags = ["--run", str(folder), *base, "--seed", str(seed), *VARIANTS[variant]]
            train(flags, args.workers, args.machine)
        if (folder / "results.json").exists():
            ridge = seed == 0 and variant in WITH_RIDGE
            runs.append({"variant": variant, "seed": seed, **read(folder, ridge)})
    write_results(out / f"animals-{slug(args.machine)}.json", {
        **about(parser, args, "--data DIR --weights FILE --out OUT", "variants", "seeds"), "runs": runs})
    print(f"{SPREAD}\n{table(runs)}")


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
