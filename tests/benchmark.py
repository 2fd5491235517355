"""Trains the demonstration over seeds, query domains and switches, and prints the tables of the README.

    python -m tests.benchmark --part main --seeds 0 1 2 3 4 --json docs/benchmark.json

Every run is an ordinary `python train.py ...` in its own folder below --runs; finished ones are not run again, so it can be
stopped and started at will. Means and standard deviations are over seeds, in points of 100.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ucdr_ref.runs import versions

ROOT = Path(__file__).resolve().parent.parent
ABLATION = {"full": [], "no mask": ["--mask", "none"], "no text template": ["--class-features", "plain"],
            "no triplet": ["--triplet-pairs", "0"], "phase 1 only": ["--target-epochs", "0"]}
LEDGER = {"D1": ["--mask", "none"], "D2": ["--feature-token", "1"], "D3": ["--evaluation-features", "raw"],
          "D4": ["--train-normalization", "imagenet"], "D5": ["--selection", "test"], "D6": ["--query-feature", "patch"],
          "D8": ["--triplet-distance", "plain"], "D9": ["--momentum-start", "random"],
          "D10": ["--train-classes", "train+val", "--selection", "last"], "D12": ["--queue-push", "before"],
          "D13": ["--class-features", "plain"], "D14": ["--stroke-domains", "none"], "D15": ["--balance", "released"],
          "all": ["--variant", "released"]}
PARTS = {
    "main": {f"query {domain}": ["--held-out", domain] for domain in ("sketch", "quickdraw", "painting", "infograph", "clipart")},
    "ablation": ABLATION,
    "ledger": LEDGER,
}


def run(name: str, seed: int, flags: list[str], folder: Path) -> dict:
    """One training, its results.json and the seconds it took."""
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    done = out / "seconds.json"
    if not done.exists():
        start = time.monotonic()
        command = [sys.executable, str(ROOT / "train.py"), "--run", str(out), "--seed", str(seed), "--workers", "1", *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stderr[-2000:]}")
        done.write_text(json.dumps(time.monotonic() - start))
    rows = json.loads((out / "results.json").read_text())["rows"]
    numbers = {f"{row['protocol']} {row['gallery_name']} {row['method']}": 100 * row["mAP@200"] for row in rows}
    return {"name": name, "seed": seed, "flags": flags, "seconds": round(json.loads(done.read_text()), 1), "mAP@200": numbers}


def table(results: list[dict], names: list[str]) -> str:
    """Markdown: zero-shot, adapted and their difference on unseen and mixed gallery, mean ± standard deviation over seeds."""
    def mean(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"

    lines = ["| | unseen: CLIP | unseen: adapted | difference | mixed: CLIP | mixed: adapted | difference |", "|---" * 7 + "|"]
    for name in names:
        runs = [result["mAP@200"] for result in results if result["name"] == name]
        cells = []
        for gallery in ("unseen", "mixed"):
            before, after = ([numbers[f"UCDR {gallery} {method}"] for numbers in runs]
                             for method in ("zero-shot", "ucdr-adapter"))
            cells += [mean(before), mean(after), mean([b - a for a, b in zip(before, after)])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="main")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--json", type=Path, help="write the numbers, with machine and versions, into this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once, one thread each")
    args = parser.parse_args()
    variants = PARTS[args.part]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, name, seed, flags, args.runs / args.part)
                for seed in args.seeds for name, flags in variants.items()]
        results = []
        for job in jobs:
            results.append(job.result())
            print(f"{len(results)}/{len(jobs)} {results[-1]['name']} seed {results[-1]['seed']}: {results[-1]['seconds']} s",
                  file=sys.stderr, flush=True)
    print(table(results, list(variants)))
    if args.json:
        found = json.loads(args.json.read_text()) if args.json.exists() else {}
        found[args.part] = {"versions": versions(), "date": time.strftime("%Y-%m-%d"), "runs": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
