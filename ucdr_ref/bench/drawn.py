"""Trains the demonstration over seeds, query domains and switches, and prints the tables of docs/results.md
and docs/ledger.md.

    python -m ucdr_ref.bench.drawn --part main --seeds 0 1 2 3 4 --json docs/drawn.json

Every run is an ordinary `python train.py ...` in its own folder below --runs, named after its flags; finished
ones are not run again, so it can be stopped and started at will, and parts share runs. Per cent.
"""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..cli import folder_path, run_command, write_text_atomic
from ..config import PRESETS
from ..experiments.experiment import CACHE
from .record import SPREAD, about, markdown, parser_of, read_results, result_file, slug, spread, write_results
from .ridge import compare

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("sketch", "quickdraw", "painting", "infograph", "clipart")
SRE = ["--method", "sre-clip"]
LEDGER_D = {
    "D1": ["--mask", "none"], "D2": ["--feature-token", "1"], "D3": ["--evaluation-features", "raw"],
    "D4": ["--train-normalization", "imagenet"], "D5": ["--selection", "test"],
    "D6": ["--query-feature", "patch"], "D7": ["--ud-gallery", "trained"],
    "D8": ["--triplet-distance", "plain"], "D9": ["--momentum-start", "random"],
    "D10": ["--train-classes", "train+val", "--selection", "last"], "D12": ["--queue-push", "before"],
    "D13": ["--class-features", "plain"], "D14": ["--stroke-domains", "none"],
    "D15": ["--balance", "released"], "D16": ["--prompt-length", "4"], "D17": ["--triplet-mean", "paired"],
    "all": ["--variant", "released"]}
# The drawn default's class vectors are of the classes alone (S4), and a fifth of its classes are unseen (S5).
LEDGER_S = {
    "S1": ["--structure-pairs", "diagonal"], "S2": ["--test-attention", "batch"],
    "S3": ["--retention-scale", "scaled"], "S4": ["--class-vectors", "clip"], "S5": ["--sre-kappa", "0.2"],
    "S6": ["--sre-report", "best-test"], "S7": ["--bank-ring", "released"],
    "S8": ["--structure-classes", "30"], "all": ["--variant", "released"]}
# Entries of data, order, selection and averaging, and both ledgers as a whole; the others are of the model.
PROTOCOL = ("D5", "D7", "D10", "D15", "D16", "D17", "S2", "S6", "all")
# D15 where it shows: the same drawings, of which some domains keep fewer (`thinned`).
SHARES = {"real": 1.0, "quickdraw": 0.8, "painting": 0.6, "infograph": 0.4, "clipart": 0.2, "sketch": 1.0}
SHAPED = ("context_vectors", "source_batch", "source_lr", "target_epochs", "target_lr", "micro_batch")
UNEQUAL = ["--dataset", "folder", "--data-root", "data/toy-unequal", "--class-split", "data/toy-unequal.json",
           "--weights", "weights/demo-clip.pt",
           *(text for name in SHAPED for text in (f"--{name.replace('_', '-')}", str(PRESETS["toy"][name])))]
QUERIES = {f"query {domain}": [] if domain == "sketch" else ["--held-out", domain] for domain in DOMAINS}
FORM = ["--method", "closed-form"]
NO_TARGET = ["--sre-entropy", "0", "--sre-diversity", "0", "--sre-bias", "0"]
PARTS: dict[str, dict[str, list[str]]] = {
    "main": QUERIES,
    "baselines": {**{name: [*flags, *FORM] for name, flags in QUERIES.items()},
                  "query sketch, raw features (D18)": [*FORM, "--evaluation-features", "raw"]},
    "ablation": {"full": [], "no mask": ["--mask", "none"], "no text template": ["--class-features", "plain"],
                 "no triplet": ["--triplet-pairs", "0"], "phase 1 only": ["--target-epochs", "0"]},
    "ledger": {"paper": [], **{tag: flags for tag, flags in LEDGER_D.items() if tag not in PROTOCOL}},
    "protocol": {"paper": [], **{tag: LEDGER_D[tag] for tag in PROTOCOL if tag in LEDGER_D}},
    "unequal": {"paper": UNEQUAL, "D15": [*UNEQUAL, *LEDGER_D["D15"]]},
    "precision": {"fp32": [], "bf16": ["--precision", "bf16"]},
    "sre": {"full": SRE, "no structure": [*SRE, "--sre-structure", "0"],
            "no retention": [*SRE, "--sre-retention", "0"],
            "no target losses": [*SRE, *NO_TARGET]},
    "sre-baselines": {f"kappa {kappa}": [*SRE, "--sre-kappa", kappa] for kappa in ("0.3", "0.2")},
    "sre-ledger": {"paper": SRE, **{tag: [*SRE, *flags] for tag, flags in LEDGER_S.items()
                                    if tag not in PROTOCOL}},
    "sre-protocol": {"paper": SRE, **{tag: [*SRE, *LEDGER_S[tag]] for tag in PROTOCOL if tag in LEDGER_S}},
}
Numbers = dict[str, float | None]  # None: not defined, as an accuracy without classes is
Column = tuple[str, Callable[[Numbers, Numbers], float | None]]


def thinned() -> None:
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


def train(name: str, seed: int, flags: list[str], runs: Path) -> dict:
    """One training, the numbers of its results.json and the seconds it took."""
    out = runs / f"{slug(' '.join(flags)) or 'default'}-{seed}"
    done = out / "seconds.json"
    if not done.exists():
        start = time.monotonic()
        line = [sys.executable, str(ROOT / "train.py"), "--run", str(out), "--seed", str(seed),
                "--workers", "1", *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)
        if result.returncode:
            reason = (result.stderr.strip() or "it said nothing").splitlines()[-1]
            raise ValueError(f"{shlex.join(line)} ended with {result.returncode} ({reason}); run it alone")
        write_text_atomic(done, json.dumps(time.monotonic() - start))
    results = json.loads((out / "results.json").read_text())
    numbers = read(results["rows"])
    if "closed-form" in flags:
        numbers["lambda"] = results["strength"]
    if "sre-clip" in flags:
        numbers |= {f"{metric} {title}": 100 * value for title, found in compare(out, ROOT / CACHE).items()
                    for metric, value in found.items()}
    return {"name": name, "seed": seed, "flags": flags, "seconds": round(json.loads(done.read_text()), 1),
            "numbers": numbers}


def read(rows: list[dict]) -> Numbers:
    """The rows of either method's results.json -> {"what method": per cent}."""
    numbers: Numbers = {}
    for row in rows:
        if "protocol" in row:
            numbers[f"{row['protocol']} {row['gallery_name']} {row['method']}"] = 100 * row["mAP@200"]
        else:
            numbers |= {f"{metric} {row['method']}": None if value is None else 100 * value
                        for metric, value in row["instance"].items()}
    return numbers


def table(results: list[dict], names: list[str], columns: list[Column]) -> str:
    """Markdown: a row a name; a cell is the `spread` over seeds of its column's function
    of the name's numbers and the first name's.
    """
    of = {name: {result["seed"]: result["numbers"] for result in results if result["name"] == name}
          for name in names}
    rows = []
    for name in names:
        values = [[column(found, of[names[0]][seed]) for seed, found in of[name].items()]
                  for _, column in columns]
        cells = ["-" if None in cell else spread([v for v in cell if v is not None]) for cell in values]
        rows.append([name, *cells])
    return markdown(["", *(title for title, _ in columns)], rows)


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def value(title: str, key: str, minus: str = "") -> Column:
    return title, lambda numbers, _: difference(numbers[key], numbers[minus]) if minus else numbers[key]


def change(key: str) -> Column:
    """The difference that a switch makes, seed by seed."""
    return "effect", lambda numbers, first: difference(numbers[key], first[key])


def reported(numbers: Numbers, metric: str) -> float | None:
    """What an SRE-CLIP run reports: under S6 each metric's maximum over evaluations on the test images."""
    return numbers.get(f"{metric} best-test", numbers[f"{metric} sre-clip"])


def metric(title: str, key: str) -> Column:
    return title, lambda numbers, _: reported(numbers, key)


UNSEEN, MIXED, UD = "UCDR unseen ", "UCDR mixed ", "UdCDR seen "
OURS, CLIP = "ucdr-adapter", "zero-shot"
BESIDE_CLIP = [value("unseen: CLIP", UNSEEN + CLIP), value("unseen: adapted", UNSEEN + OURS),
               value("difference", UNSEEN + OURS, UNSEEN + CLIP), value("mixed: CLIP", MIXED + CLIP),
               value("mixed: adapted", MIXED + OURS), value("difference", MIXED + OURS, MIXED + CLIP)]
CENTRED = ", centred"  # transductive
WITH_CENTRED = [*BESIDE_CLIP, value("unseen: adapted, centred", UNSEEN + OURS + CENTRED)]
BASELINES = [value(f"{gallery}: {title}{shift}", f"UCDR {gallery} {method}{shift}")
             for gallery in ("unseen", "mixed")
             for title, method in (("CLIP", CLIP), ("closed form", "closed-form")) for shift in ("", CENTRED)]
EFFECTS = [value("unseen", UNSEEN + OURS), change(UNSEEN + OURS), value("mixed", MIXED + OURS),
           change(MIXED + OURS), value("U^dCDR", UD + OURS), change(UD + OURS)]
SRE_METRICS = [metric("ZSL", "zsl"), metric("unseen", "unseen"), metric("seen", "seen"), metric("H", "h")]
SRE_BESIDE_CLIP = [*SRE_METRICS, value("H of CLIP", "h zero-shot"),
                   value("difference", "h sre-clip", "h zero-shot")]
SRE_BASELINES = [value(f"{name}: {title}", key.format(method))
                 for name, method in (("CLIP", "zero-shot"), ("SRE-CLIP", "sre-clip"), ("ridge", "ridge"))
                 for title, key in (("ZSL", "zsl {}"), ("H", "h {}"), ("H calibrated", "h {}, calibrated"))]
SRE_EFFECTS = [*SRE_METRICS, ("effect on H", lambda numbers, first: difference(reported(numbers, "h"),
                                                                               reported(first, "h")))]
COLUMNS: dict[str, list[Column]] = {
    "main": WITH_CENTRED, "baselines": BASELINES, "ablation": BESIDE_CLIP, "precision": EFFECTS,
    "ledger": EFFECTS, "protocol": EFFECTS, "unequal": EFFECTS,
    "sre": SRE_BESIDE_CLIP, "sre-baselines": SRE_BASELINES,
    "sre-ledger": SRE_EFFECTS, "sre-protocol": SRE_EFFECTS}


def run(argv: list[str] | None) -> None:
    parser = parser_of("ucdr_ref.bench.drawn", __doc__)
    parser.add_argument("--part", choices=PARTS, default="main")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=folder_path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--json", type=result_file, metavar="FILE",
                        help="write the numbers, machine and versions into this file")
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}cores")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                        help="trainings at once, one thread each")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; expected at least 1")
    if args.json:
        read_results(args.json)  # a broken one is told now, not after hours
    variants = PARTS[args.part]
    if args.part == "unequal":
        thinned()
    pool = ThreadPoolExecutor(args.jobs)
    try:
        jobs = [pool.submit(train, name, seed, flags, args.runs) for seed in args.seeds
                for name, flags in variants.items()]
        results = []
        for job in jobs:
            results.append(job.result())
            last = results[-1]
            print(f"{len(results)}/{len(jobs)} {last['name']} seed {last['seed']}: {last['seconds']} s",
                  file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C nothing new starts
    print(f"{SPREAD}; n = {len(args.seeds)}\n{table(results, list(variants), COLUMNS[args.part])}")
    if args.json:
        made = about(parser, args, f"--part {args.part}", "seeds")
        made["command"] += " --json FILE"
        write_results(args.json, read_results(args.json) | {args.part: {**made, "runs": results}})


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
