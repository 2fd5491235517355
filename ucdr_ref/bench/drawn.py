"""Trains the demonstration over seeds, query domains and switches, and prints the tables of docs/results.md
and docs/ledger.md.

    python -m ucdr_ref.bench.drawn --part main --json docs/drawn.json

Every run is an ordinary `python train.py ...` in its own folder below --runs, named after its flags; finished
ones are not run again, a stopped one goes on, and parts share runs. Numbers are in %.
"""
import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..cli import read_json, run_command, write_text_atomic
from .centring import QUERY_CLASSES, centred
from .record import ROOT, origin, read_results, spread, train, write_results
from .ridge import compare

DOMAINS = ("sketch", "quickdraw", "painting", "infograph", "clipart")
SRE, FORM = "--method sre-clip", "--method closed-form"
LEDGER_D = {
    "D1": "--mask none", "D2": "--feature-token 1", "D3": "--evaluation-features raw",
    "D4": "--train-normalization imagenet", "D5": "--selection test", "D6": "--query-feature patch",
    "D7": "--ud-gallery trained", "D8": "--triplet-distance plain", "D9": "--momentum-start random",
    "D10": "--train-classes train+val --selection last", "D12": "--queue-push before",
    "D13": "--class-features plain", "D14": "--stroke-domains none", "D15": "--balance released",
    "D16": "--prompt-length 4", "D17": "--triplet-mean paired", "all": "--variant released"}
# The drawn default's class vectors are of the classes alone (S4), and a fifth of its classes are unseen (S5).
LEDGER_S = {
    "S1": "--structure-pairs diagonal", "S2": "--test-attention batch", "S3": "--retention-scale scaled",
    "S4": "--class-vectors clip", "S5": "--sre-kappa 0.2", "S6": "--sre-report best-test",
    "S7": "--bank-ring released", "S8": "--structure-classes 30", "all": "--variant released"}
# Entries of data, order, selection and averaging, and both ledgers as a whole.
PROTOCOL = ("D5", "D7", "D10", "D15", "D16", "D17", "S2", "S6", "all")
# D15 where it shows: some domains keep fewer of the drawings.
SHARES = {"real": 1.0, "quickdraw": 0.8, "painting": 0.6, "infograph": 0.4, "clipart": 0.2, "sketch": 1.0}
UNEQUAL = ("--dataset folder --data-root data/toy-unequal --class-split data/toy-unequal.json "
           "--weights weights/demo-clip.pt --context-vectors 4 --source-batch 50 --source-epochs 1 "
           "--source-lr 0.001 --target-batch 50 --target-epochs 2 --target-lr 0.01 --micro-batch 50")
QUERIES = {f"query {domain}": "" if domain == "sketch" else f"--held-out {domain}" for domain in DOMAINS}
NO_TARGET = "--sre-entropy 0 --sre-diversity 0 --sre-bias 0"


def ledger(paper: str, entries: dict[str, str], protocol: bool) -> dict[str, str]:
    """Runs of the paper's column and of each entry's released one: those of PROTOCOL, or all others."""
    return {"paper": paper, **{tag: f"{paper} {flags}" for tag, flags in entries.items()
                               if (tag in PROTOCOL) == protocol}}


PARTS: dict[str, dict[str, str]] = {  # part: {row: flags}
    "main": QUERIES,
    "baselines": {**{name: f"{flags} {FORM}" for name, flags in QUERIES.items()},
                  "query sketch, raw features (D18)": f"{FORM} --evaluation-features raw"},
    "ablation": {"full": "", "no mask": "--mask none", "no text template": "--class-features plain",
                 "no triplet": "--triplet-pairs 0", "phase 1 only": "--target-epochs 0"},
    "ledger": ledger("", LEDGER_D, False), "protocol": ledger("", LEDGER_D, True),
    "unequal": {"paper": UNEQUAL, "D15": f"{UNEQUAL} --balance released"},
    "precision": {"fp32": "", "bf16": "--precision bf16"},
    "sre": {"full": SRE, "no structure": f"{SRE} --sre-structure 0",
            "no retention": f"{SRE} --sre-retention 0", "no target losses": f"{SRE} {NO_TARGET}"},
    "sre-baselines": {f"kappa {kappa}": f"{SRE} --sre-kappa {kappa}" for kappa in ("0.3", "0.2")},
    "sre-ledger": ledger(SRE, LEDGER_S, False), "sre-protocol": ledger(SRE, LEDGER_S, True),
    "centring": {"zero-shot, centred": ""}}
Numbers = dict[str, float]
Column = tuple[str, Callable[[Numbers, Numbers], float]]  # of a row's numbers and the first row's


def thin_out() -> None:
    """data/toy-unequal: links to the first images of each class of data/toy, a share per domain."""
    from ..demo.drawing import SPLIT, write_dataset
    drawn, links = write_dataset(ROOT / "data" / "toy"), ROOT / "data" / "toy-unequal"
    for domain, share in SHARES.items():
        for folder in sorted((drawn / domain).iterdir()):
            images = sorted(folder.iterdir())
            (links / domain / folder.name).mkdir(parents=True, exist_ok=True)
            for image in images[:max(1, round(share * len(images)))]:
                link = links / domain / folder.name / image.name
                if not link.exists():
                    link.symlink_to(image)
    split = {part: list(SPLIT[part]) for part in ("train", "val", "test")}
    write_text_atomic(links.with_suffix(".json"), json.dumps(split))


def measured(name: str, seed: int, flags: list[str], runs: Path) -> dict[str, Any]:
    """One training, and the numbers of its results.json."""
    label = re.sub(r"[^a-z0-9.]+", "-", " ".join(flags).lower()).strip("-") or "default"
    folder, numbers = runs / f"{label}-{seed}", Numbers()
    train(folder, ["--seed", str(seed), "--workers", "1", *flags])
    if "sre-clip" in flags:
        found = compare(folder, ROOT / "runs" / "cache")
        numbers = {f"{metric} {title}": 100 * value for title, accuracies in found.items()
                   for metric, value in accuracies.items()}
    numbers |= read(read_json(folder / "results.json")["rows"])
    return {"name": name, "seed": seed, "flags": flags, "numbers": numbers}


def read(rows: list[dict[str, Any]]) -> Numbers:
    """The rows of either method's results.json -> {"what method": %}."""
    numbers: Numbers = {}
    for row in rows:
        if "protocol" in row:
            numbers[f"{row['protocol']} {row['gallery_name']} {row['method']}"] = 100 * row["mAP@200"]
        else:
            numbers |= {f"{metric} {row['method']}": 100 * value for metric, value in row["instance"].items()}
    return numbers


# Tables


def table(results: list[dict[str, Any]], names: list[str], columns: list[Column]) -> str:
    """Markdown: a row a name, each cell the mean ± sample deviation of a column over the n seeds."""
    of = {name: {result["seed"]: result["numbers"] for result in results if result["name"] == name}
          for name in names}
    n = ", ".join(map(str, sorted({len(seeds) for seeds in of.values()})))
    lines = [f"| n = {n} | " + " | ".join(title for title, _ in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name in names:
        values = [[column(found, of[names[0]][seed]) for seed, found in of[name].items()]
                  for _, column in columns]
        lines.append(f"| {name} | " + " | ".join(map(spread, values)) + " |")
    return "\n".join(lines)


def value(title: str, key: str, minus: str = "") -> Column:
    return title, lambda numbers, _: numbers[key] - (numbers[minus] if minus else 0)


def change(title: str, key: str) -> Column:
    """The difference that a switch makes, seed by seed."""
    return title, lambda numbers, first: reported(numbers, key) - reported(first, key)


def reported(numbers: Numbers, key: str) -> float:
    """What an SRE-CLIP run reports: under S6 each metric's maximum over evaluations on the test images."""
    return numbers.get(key.replace("sre-clip", "best-test"), numbers[key])


def metric(title: str) -> Column:
    return title, lambda numbers, _: reported(numbers, f"{title.lower()} sre-clip")


UNSEEN, MIXED, UD = "UCDR unseen ", "UCDR mixed ", "UdCDR seen "
OURS, CLIP, CENTRED = "ucdr-adapter", "zero-shot", ", centred"  # transductive
BESIDE_CLIP = [column for where, key in (("unseen", UNSEEN), ("mixed", MIXED)) for column in (
    value(f"{where}: CLIP", key + CLIP), value(f"{where}: adapted", key + OURS),
    value("difference", key + OURS, key + CLIP))]
BASELINES = [value(f"{gallery}: {title}{shift}", f"UCDR {gallery} {method}{shift}")
             for gallery in ("unseen", "mixed")
             for title, method in (("CLIP", CLIP), ("closed form", "closed-form")) for shift in ("", CENTRED)]
EFFECTS = [column for title, key in (("unseen", UNSEEN), ("mixed", MIXED), ("U^dCDR", UD))
           for column in (value(title, key + OURS), change("effect", key + OURS))]
SRE_METRICS = [metric("ZSL"), metric("unseen"), metric("seen"), metric("H")]
SRE_BASELINES = [value(f"{name}: {title}", key.format(method))
                 for name, method in (("CLIP", "zero-shot"), ("SRE-CLIP", "sre-clip"), ("ridge", "ridge"))
                 for title, key in (("ZSL", "zsl {}"), ("H", "h {}"), ("H calibrated", "h {}, calibrated"))]
SRE_EFFECTS = [*SRE_METRICS, change("effect on H", "h sre-clip")]
COLUMNS: dict[str, list[Column]] = {
    "main": [*BESIDE_CLIP, value("unseen: adapted, centred", UNSEEN + OURS + CENTRED)],
    "baselines": BASELINES, "ablation": BESIDE_CLIP, "precision": EFFECTS,
    "ledger": EFFECTS, "protocol": EFFECTS, "unequal": EFFECTS,
    "sre": [*SRE_METRICS, value("H of CLIP", "h zero-shot"),
            value("difference", "h sre-clip", "h zero-shot")],
    "sre-baselines": SRE_BASELINES, "sre-ledger": SRE_EFFECTS, "sre-protocol": SRE_EFFECTS,
    "centring": [value(title, title) for title in ("as it is", *map(str, QUERY_CLASSES), "other classes",
                                                   "other classes, of quickdraw")]}


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.drawn", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="main")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of the part; the JSON keeps the others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write numbers, machine, versions")
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}cores")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                        help="trainings at once, one thread each")
    args = parser.parse_args(argv)
    document = read_results(args.json) if args.json else {}  # a broken one is an error now, not after hours
    names = args.only or list(PARTS[args.part])
    os.environ["OMP_NUM_THREADS"] = "1"  # of each training
    if args.part == "unequal":
        thin_out()
    pool, results = ThreadPoolExecutor(args.jobs), list[dict[str, Any]]()
    try:
        if args.part == "centring":
            results = centred(args.seeds)
        jobs = [pool.submit(measured, name, seed, PARTS[args.part][name].split(), args.runs)
                for seed in args.seeds for name in names if args.part != "centring"]
        for job in jobs:
            results.append(job.result())
            print(f"{len(results)}/{len(jobs)} {results[-1]['name']}", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C nothing new starts
    about = origin(f"{parser.prog} --part {args.part} --json FILE", args.machine)
    part: dict[str, Any] = {**about, "runs": results}
    if args.only and args.part in document:
        old = document[args.part]
        kept = [result for result in old["runs"] if result["name"] not in names]
        part = {**old, "runs": [*kept, *({**result, **about} for result in results)]}
        names = list(PARTS[args.part])
    print(table(part["runs"], names, COLUMNS[args.part]))
    if args.json:
        write_results(args.json, document | {args.part: part})


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
