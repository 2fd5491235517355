"""Measures UCDR-Adapter and what it must be shown beside, on real images in several domains.

    python -m ucdr_ref.bench.real --data DIR --weights FILE --out results/

DIR holds `<domain>/<class>/<image>` for photo, sketch, quickdraw, clipart and icon, and `splits.json` (lists
of class names under seen, val_unseen and unseen). The weights may be an image tower alone: class anchors are
image prototypes (D13). Each row holds one query domain out; the gallery is photo. Queries and the unseen
gallery are of the unseen classes; the mixed gallery adds photos of the seen ones.

Rows without training (`frozen`) come first: each image passes the tower once, its features stay in --out.
Then the trainings: each is an ordinary `python train.py ...` in its own folder below --out; finished ones are
not run again, a stopped one goes on, and --variants, --held-out and --seeds take a piece of the whole;
`--variants` with nothing behind it trains nothing. The JSON in --out keeps the rows that a call does not
measure.

--subset all, the default on a GPU: four held-out domains, all variants, three seeds, the five domains above
(clipart, the smallest, decides how long an epoch is), the best epoch by validation mAP, and everything below
--out in a folder `all`, apart from the other subset's. --subset cpu, the
default elsewhere: `paper` for all four domains, seeds 1 to 4 and the other variants for sketch, bfloat16,
all domains of DIR, of which a thin one makes short epochs: with 79 images in it one epoch of 19 batches of 20
in phase 1, eight in phase 2 (152 steps); the last is kept.

--check-open-clip DOMAIN computes zero-shot mAP@all of that query domain twice in float32, here and by
open_clip_torch's tower and a plain loop.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..clip.weights import load_clip
from ..config import Config, add_arguments, resolve
from ..experiments.run_folder import versions
from ..machine.command import command, place
from ..machine.files import make_folder, write_text_atomic
from ..machine.processes import pick_device
from . import frozen
from .record import as_called, read_results, write_results

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("sketch", "quickdraw", "clipart", "icon")
STROKES = ("sketch", "quickdraw")
VARIANTS: dict[str, list[str]] = {
    "paper": [], "released": ["--variant", "released", "--selection", "test"], "no mask": ["--mask", "none"],
    "feature token 1": ["--feature-token", "1"], "phase 1 only": ["--target-epochs", "0"],
    "no inversion": ["--stroke-domains", "none"]}
SETTINGS = {
    "cpu": ["--precision", "bf16", "--eval-batch", "16", "--selection", "last", "--source-batch", "20",
            "--source-lr", "2e-3", "--target-batch", "20", "--target-lr", "2e-4", "--target-epochs", "8"],
    "all": ["--domains", "photo", *DOMAINS, "--source-batch", "64", "--source-epochs", "3",
            "--source-lr", "1e-3", "--target-batch", "48"],
}
GALLERIES = ("unseen", "mixed")


@dataclass(frozen=True)
class Job:
    held_out: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.held_out} {self.variant} {self.seed}".lower())


def plan(subset: str) -> list[Job]:
    """Every training of a subset. all: everything with three seeds; cpu: seed 0, `paper` everywhere and the
    rest on sketch, then `paper` on sketch with four seeds more, since single seeds lie two points apart.
    """
    everything = [Job(domain, variant, 0) for variant in VARIANTS for domain in DOMAINS]
    if subset == "all":
        return [replace(job, seed=seed) for seed in (0, 1, 2) for job in everything]
    first = [job for job in everything if job.variant == "paper" or job.held_out == "sketch"]
    return first + [Job("sketch", "paper", seed) for seed in (1, 2, 3, 4)]


def shared_flags(held_out: str, data: Path, weights: Path) -> list[str]:
    """Flags that every row of a held-out domain shares."""
    seen = "quickdraw" if held_out == "sketch" else "sketch"
    return ["--dataset", "folder", "--data-root", str(data), "--class-split", str(data / "splits.json"),
            "--weights", str(weights), "--held-out", held_out, "--gallery", "photo", "--seen", seen,
            "--class-features", "prototypes"]


def train(flags: list[str], workers: int, machine: str) -> None:
    """One run, unless it is finished; seconds.json gets what `spent` reads, and the command."""
    folder = Path(flags[flags.index("--run") + 1])
    if (folder / "results.json").exists():
        return
    before = spent(folder)["seconds"] if (folder / "config.json").exists() else [0.0, 0.0]
    line = [sys.executable, str(ROOT / "train.py"), *flags, "--workers", str(workers)]
    start = clocks()
    process = subprocess.Popen(line, cwd=ROOT)  # subprocess.run would kill it 0.25 s after Ctrl-C
    try:
        status = process.wait()
    except KeyboardInterrupt as stop:
        if str(stop) == "SIGTERM":  # unlike Ctrl-C it came here alone
            process.terminate()
        process.wait()  # until it is saved
        raise
    finally:
        if (folder / "config.json").exists():
            seconds = [None if old is None else old + (end - begin)
                       for old, end, begin in zip(before, clocks(), start)]
            found = {"seconds": seconds, "date": time.strftime("%Y-%m-%d"), "machine": machine,
                     "precision": json.loads((folder / "config.json").read_text())["precision"]}
            write_text_atomic(folder / "seconds.json", json.dumps({**found, "command": line}) + "\n")
    if status:
        raise ValueError(f"stopped at {folder.name}; the same command goes on from there")


def clocks() -> tuple[float, float]:
    """Seconds, and CPU-seconds of the processes that were started here and are over."""
    times = os.times()
    return time.monotonic(), times.children_user + times.children_system


def spent(folder: Path) -> dict[str, Any]:
    """A run's seconds and CPU-seconds of all attempts, None where nobody counted; and when, where and in what
    precision, unless it is of the version that wrote two numbers alone.
    """
    path = folder / "seconds.json"
    found = json.loads(path.read_text()) if path.exists() else [None, None]
    return {"seconds": found} if isinstance(found, list) else {
        name: value for name, value in found.items() if name != "command"}  # which holds paths


def merged(new: list[dict[str, Any]], old: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any],
           order: list[Any]) -> list[dict[str, Any]]:
    """The new rows and the old ones whose key no new row has, in the order of the keys."""
    fresh = [key(row) for row in new]
    rows = [*new, *(row for row in old if key(row) not in fresh)]
    return sorted(rows, key=lambda row: order.index(key(row)) if key(row) in order else len(order))


def job_of(row: dict[str, Any]) -> Job:
    return Job(row["held_out"], row["variant"], row["seed"])


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, or the one value there is."""
    mean = f"{round(statistics.mean(values), 1) + 0.0:.1f}"  # + 0.0: no "-0.0"
    return mean if len(values) == 1 else f"{mean} ± {statistics.pstdev(values):.1f}"


def title_of(row: dict[str, Any]) -> str:
    """A row's name in the tables: method, another variant than the paper's, no inversion, centring."""
    parts = [row["method"].replace("ucdr-adapter", "UCDR-Adapter")]
    parts += [row["variant"]] if row.get("variant", "paper") != "paper" else []
    parts += ["no inversion"] if row.get("inversion") == "none" else []
    return ", ".join([*parts, "centred (transductive)"] if row["transductive"] else parts)


def table(rows: list[dict[str, Any]], gallery: str, metric: str = "mAP@all") -> str:
    """Markdown, points of 100 (± over seeds): a row a method, a column a held-out domain and their mean."""
    lines = ["| | " + " | ".join([*DOMAINS, "mean"]) + " |", "|---" * (len(DOMAINS) + 2) + "|"]
    for title in dict.fromkeys(map(title_of, rows)):
        mine = [row for row in rows if title_of(row) == title]
        of = {domain: [row[gallery][metric] for row in mine if row["held_out"] == domain]
              for domain in DOMAINS}
        cells = [spread(values) if values else "-" for values in of.values()]
        whole = all(of.values())
        mean = f"{statistics.mean(statistics.mean(values) for values in of.values()):.1f}" if whole else "-"
        lines.append(f"| {title} | " + " | ".join([*cells, mean]) + " |")
    return "\n".join(lines)


def open_clip_score(data: Path, weights: Path, domain: str) -> float:
    """mAP@all in points, queries of `domain`, gallery photo, unseen classes: open_clip_torch in float32."""
    from open_clip.transform import image_transform
    from open_clip.transformer import QuickGELU, VisionTransformer

    ours = load_clip(weights)
    width = ours.vision_width
    layers = len(ours.visual.transformer.resblocks)
    peer = VisionTransformer(ours.image_size, ours.patch, width, layers, width // 64, 4.0,
                             output_dim=ours.embed_dim, act_layer=QuickGELU).eval()
    peer.load_state_dict(ours.visual.state_dict())
    transform = image_transform(ours.image_size, is_train=False)
    classes = json.loads((data / "splits.json").read_text())["unseen"]

    def features(folder: str) -> tuple[torch.Tensor, list[str]]:
        rows, labels = [], []
        for path in sorted(path for name in classes for path in (data / folder / name).iterdir()):
            image = Image.open(path).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            image = ImageOps.invert(image) if folder in STROKES else image
            with torch.inference_mode():
                rows.append(F.normalize(peer(transform(image)[None])[0], dim=0))
            labels.append(path.parent.name)
        return torch.stack(rows), labels

    (queries, wanted), (gallery, labels) = features(domain), features("photo")
    precisions = []
    for query, label in zip(queries, wanted, strict=True):
        order = torch.linalg.vector_norm(gallery - query, dim=1).argsort().tolist()
        ranks = [rank for rank, i in enumerate(order, 1) if labels[i] == label]
        precisions.append(statistics.mean(hits / rank for hits, rank in enumerate(ranks, 1)))
    return 100 * statistics.mean(precisions)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """The flags, and the command as the JSON has it."""
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    for flag in ("--data", "--weights", "--out"):
        parser.add_argument(flag, type=place, required=True)
    parser.add_argument("--subset", choices=SETTINGS, default="all" if gpu else "cpu")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS),
                        help="train these alone")
    parser.add_argument("--held-out", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--closed-form", nargs="*", choices=DOMAINS, default=list(DOMAINS),
                        help="held-out domains whose `paper`, seed 0, gets the closed form of its features")
    parser.add_argument("--precision", choices=("fp32", "bf16"),
                        help="arithmetic of the towers, where a subset's own is slow (bfloat16 on a CPU "
                             "without AMX)")
    parser.add_argument("--check-open-clip", choices=DOMAINS, metavar="DOMAIN")
    name = torch.cuda.get_device_name() if gpu else f"cpu-{os.cpu_count()}cores"
    parser.add_argument("--machine", default=name)
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 1) - 1),
                        help="as in train.py")
    args = parser.parse_args(argv)
    return args, as_called(parser, args, f"--data DIR --weights FILE --out OUT --subset {args.subset}",
                           "precision", "variants", "held_out", "seeds", "closed_form")


def run(argv: list[str] | None) -> None:
    args, line = parse(argv)
    data, weights, out = (path.resolve() for path in (args.data, args.weights, args.out))
    out = out / "all" if args.subset == "all" else out
    make_folder(out)
    machine = re.sub(r"[^a-z0-9]+", "-", args.machine.lower())
    path, device = out / f"real-{machine}.json", pick_device("auto")
    found = read_results(path)
    settings = [*SETTINGS[args.subset], *(["--precision", args.precision] if args.precision else [])]

    def write(**parts: Any) -> None:
        found.update(command=line, machine=machine, versions=versions(),
                     date=time.strftime("%Y-%m-%d"), subset=args.subset,
                     settings=" ".join(settings), **parts)
        write_results(path, found)

    def config_of(domain: str, *more: str) -> Config:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        flags = [*shared_flags(domain, data, weights), *settings, *more]
        return resolve(vars(parser.parse_args([*flags, "--workers", str(args.workers)])))

    rows = []
    for domain in args.held_out:
        for inversion in ("strokes", "none"):
            more = ["--stroke-domains", "none"] if inversion == "none" else []
            config = config_of(domain, *more)
            rows += [{**row, "inversion": inversion, "precision": config.precision}
                     for row in frozen.frozen_rows(config, weights, out, device)]
    write(frozen=merged(rows, found.get("frozen", []), lambda row: row["held_out"], list(DOMAINS)))
    jobs = plan(args.subset)
    chosen = [job for job in jobs if job.variant in args.variants and job.held_out in args.held_out
              and job.seed in args.seeds]
    for job in chosen:
        flags = [*shared_flags(job.held_out, data, weights), *settings, *VARIANTS[job.variant]]
        train(["--run", str(out / job.name), "--seed", str(job.seed), *flags], args.workers, args.machine)
    rows, old = [], found.get("trained", [])
    known = {job_of(row) for row in old}
    for job in jobs:
        form = job == Job(job.held_out, "paper", 0) and job.held_out in args.closed_form
        if (out / job.name / "results.json").exists() and (form or job in chosen or job not in known):
            rows += [{**row, "variant": job.variant, **spent(out / job.name)}
                     for row in frozen.adapter_rows(out / job.name, device, form)]
    write(trained=merged(rows, old, job_of, jobs))
    for gallery in GALLERIES:
        lines = table([*found["frozen"], *found["trained"]], gallery)
        print(f"\n{gallery} gallery, mAP@all\n{lines}")
    if args.check_open_clip:
        config = config_of(args.check_open_clip, "--precision", "fp32")
        [row] = [row for row in frozen.frozen_rows(config, weights, out, device, form=False)
                 if not row["transductive"]]
        peer = open_clip_score(data, weights, args.check_open_clip)
        numbers = {"ucdr_ref": row["unseen"]["mAP@all"], "open_clip": round(peer, 3)}
        write(open_clip={**found.get("open_clip", {}), args.check_open_clip: numbers})
        print(f"\nzero-shot mAP@all, {args.check_open_clip}, float32: {numbers}")
        if abs(numbers["ucdr_ref"] - numbers["open_clip"]) > 0.2:
            raise ValueError("they differ by more than 0.2 points")


def main(argv: list[str] | None = None) -> int:
    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
