"""Measures both methods on real images in several domains, with real CLIP weights, and prints the README's tables.

    python -m ucdr_ref.bench.real --data DIR --weights FILE --out results/

DIR holds `<domain>/<class>/<image>` for photo, sketch, quickdraw, clipart and icon, and `splits.json` (lists of class names
under seen, val_unseen and unseen). The weights may be an image tower alone: class anchors are image prototypes (D13). Each row
holds one query domain out; the gallery is photo. Queries and the unseen gallery are of the unseen classes; the mixed gallery adds
photos of the seen ones. Every run is an ordinary `python train.py ...` in its own folder below --out: finished ones are not run
again, a stopped one goes on, and --variants, --held-out and --seeds take a piece of the whole.

--subset all, the default on a GPU: four held-out domains, all variants, three seeds. The five domains above, so that clipart, the
smallest, decides how long an epoch is; the best epoch by validation mAP.
--subset cpu, the default elsewhere: zero-shot CLIP for all four domains, with and without stroke inversion, `paper` for the two
stroke domains, and, when --variants names them, the other variants for sketch. Seed 0, bfloat16. It takes all domains of DIR:
a thin one makes short epochs. Lengths are meant for one with 79 training images: one epoch of 19 batches of 20 in phase 1,
eight in phase 2 (152 steps); the last is kept, which spares eight validations.

--animals DIR adds SRE-CLIP (sources sketch, quickdraw, clipart; target photo; class vectors from the attribute matrix).
--check-open-clip DOMAIN computes zero-shot mAP@all of that query domain twice in float32, here and by open_clip_torch's tower and
a plain loop.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..clip.load import load_clip
from ..experiments.class_folders import SHIPPED, folder_key
from ..experiments.run_folder import versions
from ..sre.class_vectors import means_of_classes
from ..sre.graph import load_graph

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("sketch", "quickdraw", "clipart", "icon")
STROKES = ("sketch", "quickdraw")
ZERO_SHOT, RAW_STROKES = "zero-shot", "zero-shot, no inversion"
VARIANTS: dict[str, list[str]] = {ZERO_SHOT: ["--method", "zero-shot"], RAW_STROKES: ["--method", "zero-shot", "--stroke-domains", "none"],
            "phase 1 only": ["--target-epochs", "0"], "paper": [], "released": ["--variant", "released", "--selection", "test"],
            "no mask": ["--mask", "none"], "feature token 1": ["--feature-token", "1"]}  # the paper's token is 0
SETTINGS = {
    "cpu": ["--precision", "bf16", "--eval-batch", "16", "--selection", "last", "--source-batch", "20", "--source-lr", "2e-3",
            "--target-batch", "20", "--target-lr", "2e-4", "--target-epochs", "8"],
    "all": ["--domains", "photo", *DOMAINS, "--source-batch", "64", "--source-epochs", "3", "--source-lr", "1e-3",
            "--target-batch", "48"],
}
ANIMALS = {"SRE-CLIP": ["--stroke-domains", *STROKES], "SRE-CLIP, no inversion": ["--stroke-domains", "none"]}
METRICS = ("mAP@200", "mAP@all", "Prec@100")


@dataclass(frozen=True)
class Job:
    held_out: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.held_out} {self.variant} {self.seed}".lower())


def plan(subset: str) -> list[Job]:
    """Every run of a subset. Where neither queries nor gallery are strokes, inversion changes nothing: no second run."""
    jobs = []
    for seed in (0, 1, 2) if subset == "all" else (0,):
        for variant in VARIANTS:
            domains: tuple[str, ...] = STROKES if variant == RAW_STROKES else DOMAINS
            if subset == "cpu" and not variant.startswith(ZERO_SHOT):
                domains = STROKES if variant == "paper" else ("sketch",)
            jobs += [Job(domain, variant, seed) for domain in domains]
    return jobs


def command(job: Job, subset: str, data: Path, weights: Path, folder: Path) -> list[str]:
    """The training's flags; a variant's own come last, so that they win over the subset's."""
    base = ["--run", str(folder / job.name), "--dataset", "folder", "--data-root", str(data), "--class-split",
             str(data / "splits.json"), "--weights", str(weights), "--held-out", job.held_out, "--gallery", "photo", "--seen",
             "quickdraw" if job.held_out == "sketch" else "sketch", "--class-features", "prototypes", "--seed", str(job.seed)]
    return [*base, *SETTINGS[subset], *VARIANTS[job.variant]]


def train(flags: list[str], workers: int) -> None:
    """One run, unless it is finished. Its seconds, of all attempts together, go into seconds.json."""
    folder = Path(flags[flags.index("--run") + 1])
    spent = folder / "seconds.json"
    if (folder / "results.json").exists():
        return
    start = time.monotonic()
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, "--workers", str(workers)], cwd=ROOT)
    if folder.is_dir():
        spent.write_text(json.dumps(before + time.monotonic() - start))
    if result.returncode:
        raise SystemExit(f"stopped at {folder.name}; the same command goes on from there")


def read(job: Job, folder: Path) -> dict[str, Any] | None:
    """The numbers of a finished run, in points of 100; None when it is not finished."""
    path = folder / job.name
    if not (path / "results.json").exists():
        return None
    rows = json.loads((path / "results.json").read_text())["rows"]
    found: dict[str, Any] = {"held_out": job.held_out, "variant": job.variant, "seed": job.seed,
                             "flags": " ".join(VARIANTS[job.variant]),
                             "seconds": round(json.loads((path / "seconds.json").read_text()))}
    method = ZERO_SHOT if job.variant.startswith(ZERO_SHOT) else "ucdr-adapter"
    for row in rows:
        if row["protocol"] == "UCDR" and row["method"] == method:
            found[row["gallery_name"]] = {"queries": row["queries"], "gallery": row["gallery"], "k": row["k_used"],
                                          **{metric: round(100 * row[metric], 3) for metric in METRICS}}
    return found


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation, or the one value there is."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.pstdev(values):.1f}"


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, a row per held-out domain and variant; `gain` is in mAP@all, unseen gallery, against zero-shot, seed by seed."""
    header = [f"{gallery} {metric}" for gallery in ("unseen", "mixed") for metric in METRICS]
    lines = ["| held out | variant | seeds | " + " | ".join(header) + " | gain |", "|---" * (len(header) + 4) + "|"]
    for domain in DOMAINS:
        base = {run["seed"]: run for run in runs if (run["held_out"], run["variant"]) == (domain, ZERO_SHOT)}
        for variant in VARIANTS:
            mine = [run for run in runs if (run["held_out"], run["variant"]) == (domain, variant)]
            if not mine:
                continue
            cells = [spread([run[gallery][metric] for run in mine]) for gallery in ("unseen", "mixed") for metric in METRICS]
            gains = [run["unseen"]["mAP@all"] - base[run["seed"]]["unseen"]["mAP@all"] for run in mine if run["seed"] in base]
            gain = "" if variant == ZERO_SHOT or not gains else spread(gains, "+")
            lines.append(f"| {domain} | {variant} | {len(mine)} | " + " | ".join(cells) + f" | {gain} |")
    return "\n".join(lines)


def link_sources(data: Path, out: Path) -> list[str]:
    """Folders of links to the source images of the seen classes, for SRE-CLIP refuses labelled images of unseen ones."""
    unseen = set(json.loads((data / "splits.json").read_text())["unseen"])
    for path in sorted(path for domain in (*STROKES, "clipart") for path in (data / domain).glob("*/*")):
        link = out / path.relative_to(data)
        if path.parent.name not in unseen and not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return [str(out / domain) for domain in (*STROKES, "clipart")]


def write_attributes(data: Path, path: Path) -> str:
    """Class vectors for `--class-vectors`: a class's continuous attributes; an ancestor's are the mean over its classes."""
    graph = load_graph(SHIPPED / "awa2.json")
    names = [folder_key(line.split()[1]) for line in (data / "classes.txt").read_text().splitlines()]
    matrix = torch.from_numpy(np.loadtxt(data / "predicate-matrix-continuous.txt", ndmin=2)).clamp(min=0)  # -1: not known
    rows = matrix[[names.index(folder_key(name)) for name in graph.names[:graph.classes]]]
    vectors = means_of_classes(F.normalize(rows, dim=1), graph)
    lines = (" ".join([node, *(f"{value:.5f}" for value in row)]) for node, row in zip(graph.ids, vectors.tolist(), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def animals(data: Path, weights: Path, out: Path, seeds: list[int], workers: int, start: bool) -> list[dict[str, Any]]:
    """SRE-CLIP's finished runs, started before when `start`: accuracies over images in points of 100, with the baseline's."""
    found = []
    for seed in seeds:
        for variant, flags in ANIMALS.items():
            folder = out / Job("animals", variant, seed).name
            if start:
                train(["--run", str(folder), "--preset", "i2awa", "--source", *link_sources(data, out / "animals"), "--target",
                       str(data / "photo"), "--class-vectors", write_attributes(data, out / "animals" / "attributes.txt"),
                       "--weights", str(weights), "--precision", "bf16", "--eval-batch", "16", "--seed", str(seed), *flags],
                      workers)
            if (folder / "results.json").exists():
                rows = json.loads((folder / "results.json").read_text())["rows"]
                numbers = {row["method"]: {key: None if value is None else round(100 * value, 2)
                                           for key, value in row["instance"].items()} for row in rows}
                seconds = round(json.loads((folder / "seconds.json").read_text()))
                found.append({"variant": variant, "seed": seed, "seconds": seconds, **numbers})
    return found


def animals_table(runs: list[dict[str, Any]]) -> str:
    lines = ["| | seeds | ZSL | unseen | seen | H |", "|---|---|---|---|---|---|"]
    for variant in ANIMALS:
        mine = [run for run in runs if run["variant"] == variant]
        for method in ("prototypes", "sre-clip") if mine else ():
            values = [[run[method][key] for run in mine] for key in ("zsl", "unseen", "seen", "h")]
            title = variant if method == "sre-clip" else variant.replace("SRE-CLIP", "nearest prototype")
            cells = " | ".join("-" if None in column else spread(column) for column in values)
            lines.append(f"| {title} | {len(mine)} | {cells} |")
    return "\n".join(lines)


def open_clip_score(data: Path, weights: Path, domain: str) -> float:
    """mAP@all in points, queries of `domain`, gallery photo, unseen classes: open_clip_torch's tower and transform, float32."""
    from open_clip.transform import image_transform
    from open_clip.transformer import QuickGELU, VisionTransformer

    ours = load_clip(weights)
    width = ours.vision_width
    peer = VisionTransformer(ours.image_size, ours.patch, width, len(ours.visual.transformer.blocks()), width // 64, 4.0,
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    for flag in ("--data", "--weights", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--animals", type=Path, help="animal photographs and drawings with AwA2's attribute tables")
    parser.add_argument("--subset", choices=SETTINGS, default="all" if gpu else "cpu")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="run these alone; nothing after the flag: run none")
    parser.add_argument("--held-out", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2] if gpu else [0])
    parser.add_argument("--check-open-clip", choices=DOMAINS, metavar="DOMAIN")
    parser.add_argument("--machine", default=(torch.cuda.get_device_name() if gpu else f"cpu-{os.cpu_count()}cores"))
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 1) - 1), help="as in train.py")
    args = parser.parse_args(argv)
    data, weights, out = (path.resolve() for path in (args.data, args.weights, args.out))
    out.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^a-z0-9]+", "-", args.machine.lower())
    path = out / f"evidence-{machine}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    wanted = args.variants
    if wanted is None:
        wanted = list(VARIANTS) if args.subset == "all" else [ZERO_SHOT, RAW_STROKES, "paper"]

    def write(start_animals: bool = False) -> None:
        runs = [run for job in plan(args.subset) if (run := read(job, out)) is not None]
        found.update(machine=machine, versions=versions(), date=time.strftime("%Y-%m-%d"), subset=args.subset,
                     settings=" ".join(SETTINGS[args.subset]), seconds=sum(run["seconds"] for run in runs), runs=runs)
        if args.animals:
            found["animals"] = animals(args.animals.resolve(), weights, out, args.seeds, args.workers, start_animals)
        path.write_text(json.dumps(found, indent=1) + "\n")

    for job in plan(args.subset):
        if job.variant in wanted and job.held_out in args.held_out and job.seed in args.seeds:
            train(command(job, args.subset, data, weights, out), args.workers)
            write()
    write(start_animals=True)
    print(table(found["runs"]))
    if args.animals:
        print("\n" + animals_table(found["animals"]))
    if args.check_open_clip:
        job = Job(args.check_open_clip, ZERO_SHOT, 0)
        train([*command(job, args.subset, data, weights, out / "float32"), "--precision", "fp32"], args.workers)
        exact = read(job, out / "float32")
        assert exact is not None, f"{job.name} has no results"
        peer = open_clip_score(data, weights, job.held_out)
        numbers = {"ucdr_ref": exact["unseen"]["mAP@all"], "open_clip": round(peer, 3)}
        found.setdefault("open_clip", {})[job.held_out] = numbers
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nzero-shot mAP@all, {job.held_out}, float32: {numbers}")
        if abs(numbers["ucdr_ref"] - numbers["open_clip"]) > 0.2:
            raise SystemExit("they differ by more than 0.2 points")


if __name__ == "__main__":
    main()
