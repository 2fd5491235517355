"""Measures UCDR-Adapter and what it must be shown beside, on real images in several domains.

    python -m ucdr_ref.bench.real --data DIR --weights FILE --out results/

DIR holds `<domain>/<class>/<image>` for photo, sketch, quickdraw, clipart and icon, and `splits.json` (class
names under seen, val_unseen and unseen). The weights may be an image tower alone: class anchors are image
prototypes (D13). Each row holds one query domain out; the gallery is photo.

Rows without training come first (`frozen`); features stay in --out. Then the trainings: each is an ordinary
`python train.py ...` in its own folder below --out; finished ones are not run again, a stopped one goes on.
--trainings N runs the first N of the plan alone; the JSON in --out has those that are finished.

--subset cpu: the five domains named, bfloat16, one epoch of each phase, the last kept; `paper` for every
held-out domain, then two seeds more and the other variants for sketch.
"""
import argparse
import os
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from ..cli import read_json, run_command
from ..config import Config, add_arguments, resolve
from .frozen import Row, encode_all, frozen_rows, numbers_of
from .record import origin, spread, train, write_results

DOMAINS = ("sketch", "quickdraw", "clipart", "icon")
VARIANTS: dict[str, list[str]] = {
    "paper": [], "no inversion": ["--stroke-domains", "none"],
    "released": ["--variant", "released", "--selection", "test"], "no mask": ["--mask", "none"],
    "feature token 1": ["--feature-token", "1"], "phase 1 only": ["--target-epochs", "0"]}
SETTINGS = {
    "cpu": ["--domains", "photo", *DOMAINS, "--precision", "bf16", "--selection", "last",
            "--source-batch", "20", "--source-lr", "2e-3", "--target-batch", "16", "--target-lr", "2e-4",
            "--target-epochs", "1"]}
GALLERIES = ("unseen", "mixed")


@dataclass(frozen=True)
class Job:
    held_out: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.held_out} {self.variant} {self.seed}".lower())


PLAN = [*(Job(domain, "paper", 0) for domain in DOMAINS), *(Job("sketch", "paper", seed) for seed in (1, 2)),
        *(Job("sketch", variant, 0) for variant in VARIANTS if variant != "paper")]  # the most wanted first


def shared_flags(held_out: str, data: Path, weights: Path) -> list[str]:
    """Flags that every row of a held-out domain shares."""
    seen = "quickdraw" if held_out == "sketch" else "sketch"
    return ["--dataset", "folder", "--data-root", str(data), "--class-split", str(data / "splits.json"),
            "--weights", str(weights), "--held-out", held_out, "--gallery", "photo", "--seen", seen,
            "--class-features", "prototypes"]


def adapter_rows(folder: Path) -> list[Row]:
    """What a finished run wrote of its adapter."""
    results = read_json(folder / "results.json")
    rows = [row for row in results["rows"] if row["method"].startswith("ucdr-adapter")]
    config = results["config"]
    return numbers_of(rows, held_out=config["held_out"], seed=config["seed"],
                      precision=config["precision"])


# Tables


def title_of(row: Row) -> str:
    """A row's name in the tables: method, another variant than the paper's, no inversion, centring."""
    parts = [row["method"].replace("ucdr-adapter", "UCDR-Adapter").replace("zero-shot, closed", "closed")]
    parts += [row["variant"]] if row.get("variant", "paper") != "paper" else []
    parts += ["no inversion"] if row.get("inversion") == "none" else []
    return ", ".join([*parts, "centred (transductive)"] if row["transductive"] else parts)


def table(rows: list[Row], *galleries: str, metric: str = "mAP@all") -> str:
    """Markdown, %: a row a method, a column a held-out domain and their mean, a number for each gallery."""
    first = f"{metric}, {' / '.join(galleries)} gallery; mean ± sample deviation (n seeds)"
    lines = [f"| {first} | " + " | ".join([*DOMAINS, "mean"]) + " |", "|---" * (len(DOMAINS) + 2) + "|"]
    for title in dict.fromkeys(map(title_of, rows)):
        mine = [row for row in rows if title_of(row) == title]
        cells: list[list[str]] = [[] for _ in (*DOMAINS, "mean")]
        for gallery in galleries:
            values = [[row[gallery][metric] for row in mine if row["held_out"] == domain]
                      for domain in DOMAINS]
            for cell, of_domain in zip(cells, values):
                cell += [spread(of_domain, show_n=gallery == galleries[-1])] if of_domain else ["-"]
            mean = statistics.mean(map(statistics.mean, values)) if all(values) else None
            cells[-1].append("-" if mean is None else f"{mean:.1f}")
        shown = ("-" if cell[0] == "-" else " / ".join(cell) for cell in cells)
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def both(rows: list[Row]) -> str:
    """`table` with the unseen and the mixed gallery in one cell."""
    return table(rows, *GALLERIES)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--data", "--weights", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--subset", choices=SETTINGS, default="cpu")
    parser.add_argument("--trainings", type=int, default=len(PLAN), metavar="N", help="of the plan")
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}cores")
    parser.add_argument("--workers", type=int, default=1, help="as in train.py")
    args = parser.parse_args(argv)
    data, weights, out = (path.resolve() for path in (args.data, args.weights, args.out))
    out.mkdir(parents=True, exist_ok=True)
    settings = [*SETTINGS[args.subset], "--workers", str(args.workers)]

    def config_of(domain: str) -> Config:
        flags = argparse.ArgumentParser()
        add_arguments(flags)
        words = [*shared_flags(domain, data, weights), *settings, "--selection", "validation"]
        return resolve(vars(flags.parse_args(words)))

    features = encode_all(data, weights, out, config_of(DOMAINS[0]))
    frozen = [{**row, "inversion": inversion} for domain in DOMAINS for inversion in ("strokes", "none")
              for row in frozen_rows(config_of(domain), features[inversion])]
    trained: list[Row] = []
    for done in range(args.trainings + 1):
        trained = [{**row, "variant": job.variant} for job in PLAN
                   if (out / job.name / "results.json").exists() for row in adapter_rows(out / job.name)]
        line = f"{parser.prog} --data DIR --weights FILE --out OUT --subset {args.subset}"
        write_results(out / f"real-{args.machine}.json", {
            **origin(line, args.machine), "subset": args.subset, "frozen": frozen, "trained": trained,
            "settings": " ".join(SETTINGS[args.subset])})
        if done < args.trainings:
            job = PLAN[done]
            flags = [*shared_flags(job.held_out, data, weights), *settings, *VARIANTS[job.variant]]
            train(out / job.name, ["--seed", str(job.seed), *flags])
    for gallery in GALLERIES:
        print(table([*frozen, *trained], gallery), end="\n\n")


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
