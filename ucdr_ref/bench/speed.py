"""Time and peak memory of every part beside a plain transcription of the published computation.

    python -m ucdr_ref.bench.speed --json docs/speed-b32.json

Weights, images and labels are random, so no file is needed. Each part and side runs alone in a fresh
process, so that its peak memory is its own; its first step is not counted. CPU-seconds are those of all
threads: they hold on a machine that does other things too, where seconds do not. The JSON has the load
before each part, the number of processes that want a core; a call of one --part keeps the others'.

phase1, phase2, encode: a training step, a batch's features; beside tests/plain.py. passes: one pass of the
tower and the adapter's two, in turns. read: JPEG files to the tower's
input, beside CLIP's own transform. metrics: beside the authors' loop over queries (the first 200, scaled)
and a plain batched sort. search: in turns with faiss-cpu's flat index (requirements-dev.txt); the bound is
the faster of its two modes with its best number of threads.
"""
import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from tests import plain

from .. import metrics
from ..cli import run_command
from ..clip.zero_shot import ZeroShot
from ..config import Config
from ..data.benchmarks import class_list
from ..demo.pretrain import random_clip
from ..experiments.retrieval import microbatches
from ..ucdr.adapter import Batch, UCDRAdapter
from .peers import (
    PHOTOS,
    batched_retrieval,
    measure_search,
    random_features,
    read_photos,
    search_table,
    timed,
    write_photos,
)
from .record import origin, read_results, write_results

TEXT = dict(context_length=77, vocab_size=49408)
BASE = dict(image_size=224, vision_width=768, vision_layers=12, embed_dim=512,
            text_width=512, text_layers=12, **TEXT)
SHAPES = {"ViT-B/32": dict(BASE, patch=32), "ViT-B/16": dict(BASE, patch=16),
          "tiny": dict(image_size=32, patch=8, vision_width=64, vision_layers=2, embed_dim=32,
                       text_width=64, text_layers=2, **TEXT)}
SIDES = {"phase1": ("ours", "plain"), "phase2": ("ours", "plain"), "encode": ("ours", "plain"),
         "passes": ("ours",), "read": ("ours", "plain"), "metrics": ("ours", "plain", "batched"),
         "search": ("ours",)}
TITLES = {"phase1": "phase 1, a step", "phase2": "phase 2, a step", "encode": "encoding, 50 images",
          "read": "reading 64 photos", "metrics": "retrieval metrics"}
PUBLISHED: dict[str, Any] = dict(batch=50, classes=245, domains=5, sizes=[8000, 20000, 512],
                                 search_sizes=[200_000, 512])  # metrics: q, g, e; search: g, e
PLAIN_QUERIES = 200
Sizes = dict[str, Any]


def build(side: str, sizes: Sizes) -> UCDRAdapter | plain.PlainAdapter:
    """One side's model, its queues filled with random features."""
    torch.manual_seed(0)
    clip = random_clip(**SHAPES[sizes["arch"]]).eval().requires_grad_(False)
    names = class_list("domainnet-train") + [f"class {i}" for i in range(sizes["classes"])]
    kind, config = plain.PlainAdapter if side == "plain" else UCDRAdapter, Config()
    model = kind(clip, names[:sizes["classes"]], [f"domain {i}" for i in range(sizes["domains"])],
                 config)
    rows = F.normalize(torch.randn(sizes["classes"], config.queue_size, clip.embed_dim), dim=2)
    if isinstance(model, UCDRAdapter):
        labels = torch.arange(sizes["classes"]).repeat_interleave(config.queue_size)
        model.queues.push(rows.flatten(0, 1), labels)
    else:
        for queue, features in zip(model.queues, rows):
            queue.extend(features)
    return model


def training_step(model: UCDRAdapter | plain.PlainAdapter, batch: Batch, phase: str) -> Callable[[], None]:
    """A step as the training loop takes it: loss, gradient, Adam."""
    trained = model.requires_grad_(False).trainable(phase)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    parts = [(batch, 1.0)]
    if isinstance(model, UCDRAdapter):
        model.start(phase)
        parts = microbatches(batch, phase, Config())
    optimizer = torch.optim.Adam(trained.values(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part, share in parts:
            (share * model.step(part, phase)["loss"]).backward()
        optimizer.step()

    return step


def measure_part(part: str, side: str, sizes: Sizes) -> dict[str, Any]:
    """One side of one part; runs in a process of its own."""
    if part == "search":
        return measure_search(*sizes["search_sizes"])
    if part == "read":
        with tempfile.TemporaryDirectory() as folder:
            paths, size = write_photos(folder), SHAPES[sizes["arch"]]["image_size"]
            result = timed(lambda: read_photos(side, paths, size), 5)
        return {**result, "images_per_s": PHOTOS / result["cpu_s"]}
    if part == "metrics":
        return measure_metrics(side, *sizes["sizes"])
    model, size, ids = build(side, sizes), SHAPES[sizes["arch"]]["image_size"], torch.arange(sizes["batch"])
    batch = Batch(torch.randn(len(ids), 3, size, size), ids % sizes["classes"], ids % sizes["domains"])

    def encode(method: Any) -> None:
        with torch.inference_mode():
            method.encode(batch.images)

    if part == "encode":
        return timed(partial(encode, model), sizes["steps"])
    if part == "passes":
        tower = ZeroShot(model.clip if isinstance(model, UCDRAdapter) else model.model.clip)
        turns = [[timed(partial(encode, method), 1, warm_up=turn == 0)["cpu_s"] / sizes["batch"]
                  for method in (tower, model)] for turn in range(5)]
        one, two = map(median, zip(*turns))
        return {"tower_s_per_image": one, "adapter_s_per_image": two}
    phase = {"phase1": "source", "phase2": "target"}[part]
    return timed(training_step(model, batch, phase), sizes["steps"])


def measure_metrics(side: str, q: int, g: int, e: int) -> dict[str, Any]:
    query, labels, gallery, gallery_labels = random_features(q, g, e)
    rank = {"ours": metrics.retrieval, "plain": plain.retrieval, "batched": batched_retrieval}[side]
    few = min(q, PLAIN_QUERIES) if side == "plain" else q
    result = timed(lambda: rank(query[:few], labels[:few], gallery, gallery_labels), 1, warm_up=False)
    return {"cpu_s": result["cpu_s"] * q / few, "wall_s": result["wall_s"] * q / few,
            "memory_gib": result["memory_gib"], "queries_timed": few}


def isolated(part: str, side: str, sizes: Sizes) -> dict[str, Any]:
    """`measure_part` in a fresh process. Raises ValueError where it is killed, as for lack of memory."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins for a core would count
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure_part, part, side, sizes).result()
        except BrokenProcessPool:
            raise ValueError(f"{part} ({side}) was killed, probably for lack of memory") from None


def table(parts: dict[str, Any]) -> str:
    """Markdown: CPU-seconds and memory of each part that has a peer."""
    lines = ["| | CPU-seconds: here | plain | ratio | peak GiB: here | plain |", "|---" * 6 + "|"]
    for part, title in TITLES.items():
        for side in ("plain", "batched"):
            if side in parts.get(part, {}):
                ours, peer = parts[part]["ours"], parts[part][side]
                name = title + (", beside a batched sort" if side == "batched" else "")
                lines.append(f"| {name} | {ours['cpu_s']:.1f} | {peer['cpu_s']:.1f} | "
                             f"{peer['cpu_s'] / ours['cpu_s']:.1f} | {ours['memory_gib']:.1f} | "
                             f"{peer['memory_gib']:.1f} |")
    return "\n".join(lines)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=SHAPES, default="ViT-B/32")
    parser.add_argument("--part", choices=(*SIDES, "all"), default="all")
    parser.add_argument("--steps", type=int, default=1, help="steps measured (default: %(default)s)")
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    args = parser.parse_args(argv)
    sizes = {"arch": args.arch, "steps": args.steps, **PUBLISHED}
    document = read_results(args.json) if args.json else {}
    line = f"{parser.prog} --arch {args.arch} --part {args.part} --steps {args.steps}"
    about, parts = origin(line, args.machine), document.get("parts", {})
    for part in SIDES if args.part == "all" else [args.part]:
        load = os.getloadavg()[0]
        sides = {side: isolated(part, side, sizes) for side in SIDES[part]}
        found = sides["ours"] if part == "search" else sides
        parts[part] = {**found, "measured": {**about, "load": load}}
        print(f"{part}: {found}", flush=True)
        if args.json:
            write_results(args.json, {"versions": about["versions"], "sizes": sizes, **document,
                                      "parts": parts})
    print(table(parts))
    if "search" in parts:
        print(search_table(parts["search"]["cases"]))


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
