"""Measures UCDR-Adapter and what it must be shown beside, on real images in five domains, on a CPU.

    python -m ucdr_ref.bench.real --data DIR --weights FILE --out results/

DIR holds `<domain>/<class>/<image>` for photo, sketch, quickdraw, clipart and icon, and `splits.json` (lists
of class names under seen, val_unseen, unseen); its other domains are not used. The weights may be an image
tower alone: class anchors are image prototypes (D13). Each row holds one query domain out; the gallery is
photo. Queries and the unseen gallery are of the unseen classes; the mixed gallery adds photos of the seen
ones.

Rows without training (`frozen`) come first: each image passes the tower once, its features stay in --out.
Then the trainings, an ordinary `python train.py ...` each in its own folder below --out: finished ones are
not run again, a stopped one goes on; --variants, --held-out and --seeds take a piece of the whole,
`--variants` with nothing behind it none. The JSON in --out has all that is finished there.
"""
from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cli import make_folder, run_command, write_text_atomic
from ..config import Config, add_arguments, resolve
from . import frozen
from .record import SPREAD, about, add_training_flags, markdown, parser_of, slug, spread, write_results

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("sketch", "quickdraw", "clipart", "icon")
STROKES = ("sketch", "quickdraw")
VARIANTS: dict[str, list[str]] = {
    "paper": [], "no inversion": ["--stroke-domains", "none"],
    "released": ["--variant", "released", "--selection", "test"], "no mask": ["--mask", "none"],
    "feature token 1": ["--feature-token", "1"], "phase 1 only": ["--target-epochs", "0"]}
SETTINGS = ["--selection", "last", "--source-batch", "20", "--source-lr", "2e-3",
            "--target-batch", "16", "--target-lr", "2e-4", "--target-epochs", "1"]
GALLERIES = ("unseen", "mixed")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    held_out: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return slug(f"{self.held_out} {self.variant} {self.seed}")


def plan() -> list[Job]:
    """Every training, in the order in which they run."""
    return [*(Job("sketch", "paper", seed) for seed in (0, 1, 2)),
            *(Job(domain, "paper", 0) for domain in DOMAINS if domain != "sketch"),
            *(Job("sketch", variant, 0) for variant in VARIANTS if variant != "paper")]


def shared_flags(held_out: str, data: Path, weights: Path) -> list[str]:
    """Flags that every row of a held-out domain shares."""
    seen = "quickdraw" if held_out == "sketch" else "sketch"
    return ["--dataset", "folder", "--data-root", str(data), "--class-split", str(data / "splits.json"),
            "--weights", str(weights), "--domains", "photo", *DOMAINS, "--held-out", held_out,
            "--gallery", "photo", "--seen", seen, "--class-features", "prototypes"]


def train(flags: list[str], workers: int, machine: str) -> None:
    """One run, unless it is finished; seconds.json gets what `spent` reads."""
    folder = Path(flags[flags.index("--run") + 1])
    if (folder / "results.json").exists():
        return
    before = spent(folder)["seconds"] if (folder / "config.json").exists() else [0.0, 0.0]
    line = [sys.executable, str(ROOT / "train.py"), *flags, "--workers", str(workers)]
    start = clocks()
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True)  # Ctrl-C comes here alone
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()  # until it is saved
        raise
    finally:
        if (folder / "config.json").exists():
            seconds = [old + (end - begin) for old, end, begin in zip(before, clocks(), start)]
            found = {"seconds": seconds, "date": time.strftime("%Y-%m-%d"), "machine": machine,
                     "precision": json.loads((folder / "config.json").read_text())["precision"]}
            write_text_atomic(folder / "seconds.json", json.dumps(found) + "\n")
    if status:
        raise ValueError(f"stopped at {folder.name}; the same command goes on from there")


def clocks() -> tuple[float, float]:
    """Seconds, and CPU-seconds of the processes that were started here and are over."""
    times = os.times()
    return time.monotonic(), times.children_user + times.children_system


def spent(folder: Path) -> Row:
    """A run's seconds and CPU-seconds of all attempts that ended; when, where and in what precision."""
    path = folder / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else {"seconds": [0.0, 0.0]}


def title_of(row: Row) -> str:
    """A row's name in the tables: method, another variant than the paper's, no inversion, centring."""
    parts = [row["method"].replace("ucdr-adapter", "UCDR-Adapter")]
    parts += [row["variant"]] if row.get("variant", "paper") != "paper" else []
    parts += ["no inversion"] if row.get("inversion") == "none" else []
    return ", ".join([*parts, "centred (transductive)"] if row["transductive"] else parts)


def table(rows: list[Row], gallery: str, metric: str = "mAP@all") -> str:
    """Markdown, per cent: a row a method, a column a held-out domain and their mean; ± over seeds."""
    rows_of = {title: [row for row in rows if title_of(row) == title] for title in map(title_of, rows)}
    lines = []
    for title, mine in rows_of.items():
        of = [[row[gallery][metric] for row in mine if row["held_out"] == domain] for domain in DOMAINS]
        cells = [f"{spread(values)} (n = {len(values)})" if len(values) > 1 else spread(values)
                 for values in of]
        mean = f"{statistics.mean(map(statistics.mean, of)):.1f}" if all(of) else "-"
        lines.append([title, *cells, mean])
    return markdown(["", *DOMAINS, "mean"], lines)


def run(argv: list[str] | None) -> None:
    parser = parser_of("ucdr_ref.bench.real", __doc__)
    add_training_flags(parser)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS),
                        help="train these alone")
    parser.add_argument("--held-out", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16",
                        help="of the towers; bfloat16 is slow on a CPU without AMX (default: %(default)s)")
    args = parser.parse_args(argv)
    data, weights, out = (path.resolve() for path in (args.data, args.weights, args.out))
    make_folder(out)
    device, settings = torch.device("cpu"), [*SETTINGS, "--precision", args.precision, "--device", "cpu"]
    made = about(parser, args, "--data DIR --weights FILE --out OUT", "precision", "variants", "held_out",
                 "seeds")
    made["settings"] = shlex.join(settings)
    still: list[Row] = []
    for domain in DOMAINS:
        for inversion, more in (("strokes", []), ("none", ["--stroke-domains", "none"])):
            config = config_of([*shared_flags(domain, data, weights), *settings, *more,
                                "--workers", str(args.workers)])
            still += [{**row, "inversion": inversion, "precision": config.precision}
                      for row in frozen.frozen_rows(config, out, device)]
    trained: list[Row] = []
    for job in plan():
        folder = out / job.name
        if job.variant in args.variants and job.held_out in args.held_out and job.seed in args.seeds:
            flags = [*shared_flags(job.held_out, data, weights), *settings, *VARIANTS[job.variant]]
            train(["--run", str(folder), "--seed", str(job.seed), *flags], args.workers, args.machine)
        if (folder / "results.json").exists():
            form = job.variant == "paper" and job.seed == 0
            trained += [{**row, "variant": job.variant, **spent(folder)}
                        for row in frozen.adapter_rows(folder, out, device, form)]
        write_results(out / f"real-{slug(args.machine)}.json", {**made, "frozen": still, "trained": trained})
    for gallery in GALLERIES:
        print(f"\n{gallery} gallery, mAP@all, {SPREAD}\n{table([*still, *trained], gallery)}")


def config_of(flags: list[str]) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(vars(parser.parse_args(flags)))


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
