"""Time and peak memory beside a plain transcription of the published computation, the tests':
`python -m ucdr_ref.bench.speed`, in a checkout.

Weights, images and labels are random. Each part and side runs in a fresh process, one after the other, so
that its peak memory is its own. CPU-seconds are those of all threads: they hold on a machine that does other
things too, where seconds do not.

phase1, phase2: a training step. encode: a batch of images by the image tower alone and by the adapter, in
turns, and the cost of a closed form. metrics: beside a loop over queries, timed on 200 of them and scaled,
and a batched sort. search: beside faiss-cpu's flat index (requirements-dev.txt), in turns.

Exit status 1 when a required figure is missed. On two CPU cores, float32, 245 classes, 5 domains, 16 context
vectors, batch 50: phase 1 at least 2x, phase 2 at least 3x (ViT-B/32) or 2x (ViT-B/16) fewer CPU-seconds,
each in at most half the memory; a closed form of 20,000 images at most 1.05 passes of the tower for each;
metrics at 8,000 x 20,000 x 512 in 25 CPU-s and 2 GB; search at 200,000 x 512 in no more CPU-seconds than
FAISS's faster way, row by row or by BLAS, for 1, 10 and 100 queries with one and two threads.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F

from tests import plain as transcription

from .. import metrics
from ..cli import run_command
from ..config import Config
from ..data.benchmarks import class_list
from ..demo.pretrain import random_clip
from ..distributed import autocast, pick_device
from ..experiments.experiment import versions
from ..experiments.retrieval import microbatches
from ..ucdr.adapter import Batch, UCDRAdapter
from .peers import (
    SEARCH,
    batched_sort,
    measure_encoding,
    measure_search,
    random_features,
    search_ratios,
    timed,
)
from .record import parser_of, result_file, write_results

TEXT = dict(context_length=77, vocab_size=49408)
BASE = dict(image_size=224, vision_width=768, vision_layers=12, vision_heads=12, embed_dim=512,
            text_width=512, text_layers=12, text_heads=8, **TEXT)
TINY = dict(image_size=32, patch=8, vision_width=64, vision_layers=2, vision_heads=1, embed_dim=32,
            text_width=64, text_layers=2, text_heads=1, **TEXT)
SHAPES = {"ViT-B/32": dict(BASE, patch=32), "ViT-B/16": dict(BASE, patch=16), "tiny": TINY}
TWO = ("ours", "plain")
PARTS = {"phase1": TWO, "phase2": TWO, "encode": ("ours",), "metrics": (*TWO, "sort"),
         "search": ("both",)}  # and their sides
PHASES = {"phase1": "source", "phase2": "target"}
FASTER = {"phase1": {"ViT-B/32": 2.0, "ViT-B/16": 2.0}, "phase2": {"ViT-B/32": 3.0, "ViT-B/16": 2.0}}
PUBLISHED = dict(batch=50, classes=245, domains=5, context=16, precision="fp32", sizes=[8000, 20000, 512])
PLAIN_QUERIES = 200
Result = dict[str, Any]


def build(side: str, sizes: dict[str, Any], device: torch.device) -> UCDRAdapter | transcription.PlainAdapter:
    """One side's model, its queues filled with random features."""
    torch.manual_seed(0)
    clip = random_clip(**SHAPES[sizes["arch"]]).eval().requires_grad_(False).to(device)
    names = class_list("domainnet-train") + [f"class {i}" for i in range(sizes["classes"])]
    kind = UCDRAdapter if side == "ours" else transcription.PlainAdapter
    config = Config(context_vectors=sizes["context"])
    model = kind(clip, names[:sizes["classes"]], [f"domain {i}" for i in range(sizes["domains"])],
                 config).to(device)
    rows = F.normalize(torch.randn(sizes["classes"], config.queue_size, clip.embed_dim, device=device),
                       dim=-1)
    if isinstance(model, UCDRAdapter):
        labels = torch.arange(sizes["classes"], device=device).repeat_interleave(config.queue_size)
        model.queues.push(rows.flatten(0, 1), labels)
    else:
        for queue, features in zip(model.queues, rows):
            queue.extend(features)
    return model


def random_batch(sizes: dict[str, Any], device: torch.device) -> Batch:
    size, b = SHAPES[sizes["arch"]]["image_size"], sizes["batch"]
    ids = (torch.arange(b) % sizes["classes"], torch.arange(b) % sizes["domains"])
    return Batch(*(part.to(device) for part in (torch.randn(b, 3, size, size), *ids)))


def measure(part: str, side: str, sizes: dict[str, Any]) -> Result:
    """One side of one part. Runs in a process of its own."""
    if part == "search":
        return measure_search(*sizes["search_sizes"])
    device = torch.device(sizes["device"])
    if part == "metrics":
        return measure_metrics(side, sizes, device)
    model, batch = build(side, sizes, device), random_batch(sizes, device)
    if part == "encode":
        assert isinstance(model, UCDRAdapter)
        return measure_encoding(model, batch.images, sizes, device)
    step = training_step(model, batch, PHASES[part], Config(precision=sizes["precision"]))
    return timed(step, sizes["steps"], device)


def training_step(model: UCDRAdapter | transcription.PlainAdapter, batch: Batch, phase: str,
                  config: Config) -> Callable[[], None]:
    """A step as the training loop takes it: loss, gradient, Adam."""
    trained = model.requires_grad_(False).trainable(phase)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    parts = [(batch, 1.0)]
    if isinstance(model, UCDRAdapter):
        model.start(phase)
        parts = microbatches(batch, phase, config)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part, share in parts:
            with autocast(config.precision, batch.images.device):
                loss = model.step(part, phase)["loss"]
            (share * loss).backward()
        optimizer.step()

    return step


def measure_metrics(side: str, sizes: dict[str, Any], device: torch.device) -> Result:
    q, g, e = sizes["sizes"]
    query, query_labels, gallery, gallery_labels = (part.to(device) for part in random_features(q, g, e))
    rank: Callable[..., Any] = {"ours": metrics.retrieval, "plain": transcription.retrieval,
                                "sort": batched_sort}[side]
    few = min(q, PLAIN_QUERIES) if side == "plain" else q
    result: Result = timed(lambda: rank(query[:few], query_labels[:few], gallery, gallery_labels), 1, device,
                           warm_up=False)
    scaled = {name: result[name] * q / few for name in ("cpu_s", "wall_s")}
    return {**result, **scaled, "queries_timed": few}


def checks(part: str, sides: dict[str, Result], sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """What is required at the published sizes, and nothing at others: [{what, value, bound, met}]."""
    arch, gpu = sizes["arch"], sizes["device"] != "cpu"
    published = all(sizes[name] == PUBLISHED[name] for name in PUBLISHED if name != "sizes") and not gpu
    full_size, ours = sizes["sizes"] == PUBLISHED["sizes"], sides.get("ours", {})
    wanted: list[tuple[str, float, str, float]] = []
    if part in FASTER and arch in FASTER[part] and published:
        plain = sides["plain"]
        wanted += [("plain / ours in CPU-seconds", plain["cpu_s"] / ours["cpu_s"], ">=", FASTER[part][arch]),
                   ("ours / plain in memory", ours["memory_gib"] / plain["memory_gib"], "<=", 0.5)]
    if part == "metrics" and full_size:
        wanted += [("seconds" if gpu else "CPU-seconds", ours["wall_s" if gpu else "cpu_s"], "<=", 25.0),
                   ("GB", ours["memory_gib"] * 2 ** 30 / 1e9, "<=", 2.0)]
    if part == "encode" and full_size:
        wanted.append(("passes of the tower", ours["passes"], "<=", 1.05))
    if part == "search" and sizes["search_sizes"] == SEARCH:
        wanted += [(f"ours / FAISS in CPU-seconds, {ratio['name']}", ratio["cpu"], "<=", 1.0)
                   for ratio in search_ratios(sides["both"]["cases"])]
    return [{"what": what, "value": value, "bound": f"{sign} {bound:g}",
             "met": value >= bound if sign == ">=" else value <= bound}
            for what, value, sign, bound in wanted]


def isolated(part: str, side: str, sizes: dict[str, Any]) -> Result:
    """`measure` in a fresh process. Raises ValueError where it is killed, as for lack of memory."""
    # threads that wait for a busy core would spin, and that would count
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, part, side, sizes).result()
        except BrokenProcessPool:
            raise ValueError(f"{part} ({side}) was killed, probably for lack of memory; lower --batch or the "
                             "sizes, or run another --part") from None


def describe(part: str, side: str, result: Result) -> str:
    """What was measured, a line; of search a line a case."""
    if part == "search":
        return "\n".join(
            f"search {ratio['name']:<24}" + "".join(
                f" {name} {case[f'{name}_wall_s']:.4f} s ({case[f'{name}_cpu_s']:.4f} CPU-s)"
                for name in ("ours", "faiss", "blas", "once"))
            + f"  ours / FAISS {ratio['cpu']:.2f} in CPU-s, {ratio['wall']:.2f} in s"
            for case, ratio in zip(result["cases"], search_ratios(result["cases"])))
    if part == "encode":
        return (f"encode: the tower {result['pass_s_per_image']:.4f} s an image, the adapter "
                f"{result['adapter_s_per_image']:.4f} s ({result['adapter_passes']:.2f} passes); the fit of "
                f"{result['images']:,} images {result['fit_s']:.2f} s, a closed form {result['passes']:.4f} "
                "passes an image")
    text = f"{part + ' ' + side:<16} {result['cpu_s']:9.2f} CPU-s {result['wall_s']:9.2f} s" \
        f" {result['memory_gib']:7.2f} GiB"
    if result.get("queries_timed") == PLAIN_QUERIES:
        text += f"  (time scaled from {PLAIN_QUERIES} queries)"
    return text


def compare(part: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Measures and prints the sides of a part; {} where FAISS is not installed."""
    if part == "search" and find_spec("faiss") is None:
        print("search not measured: faiss-cpu is not installed; `pip install faiss-cpu`, or choose another "
              "--part", flush=True)
        return {"required": []}
    sides = {}
    for side in PARTS[part]:
        sides[side] = isolated(part, side, sizes)
        print(describe(part, side, sides[side]), flush=True)
    ratios = {f"{side} / ours": [sides[side][unit] / sides["ours"][unit]
                                 for unit in ("cpu_s", "wall_s", "memory_gib")]
              for side in PARTS[part][1:]}
    return {**sides, "ratios": ratios, "required": checks(part, sides, sizes)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("ucdr_ref.bench.speed", __doc__)
    parser.add_argument("--arch", choices=SHAPES, default="ViT-B/32")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    for name, count, default, text in (
            ("batch", None, 50, "images a step"), ("classes", None, 245, "training classes"),
            ("domains", None, 5, "source domains"), ("context", None, 16, "learnable context vectors"),
            ("steps", None, 2, "steps measured after the first"),
            ("sizes", 3, PUBLISHED["sizes"], "queries, gallery and width of the metrics"),
            ("search-sizes", 2, SEARCH, "gallery and width of the search")):
        parser.add_argument(f"--{name}", type=int, nargs=count, default=default, metavar="N",
                            help=f"{text} (default: {default})")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU when there is one)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    if min(args.batch, args.classes, args.domains, args.context, args.steps, *args.sizes,
           *args.search_sizes) < 1:
        parser.error("sizes must be at least 1")
    return args


def measure_all(args: argparse.Namespace) -> bool:
    """Measures, prints the ratios last, writes the JSON; whether every required figure was met."""
    device = pick_device(args.device)
    sizes = {name: value for name, value in vars(args).items() if name not in ("json", "part")}
    sizes["device"] = str(device)
    print(", ".join(f"{name} {value}" for name, value in (versions(device) | sizes).items()), flush=True)
    parts = {part: compare(part, sizes) for part in (PARTS if args.part == "all" else (args.part,))}
    print("\nCPU-seconds, seconds, memory")
    for part, result in parts.items():
        for name, values in result.get("ratios", {}).items():
            print(f"{part:<8} {name} " + " ".join(f"{value:8.2f}x" for value in values))
        for check in result["required"]:
            verdict = "met" if check["met"] else "MISSED"
            print(f"{part:<8} {check['what']} {check['value']:.2f}, required {check['bound']}: {verdict}")
    met = all(check["met"] for result in parts.values() for check in result["required"])
    if args.json:
        write_results(args.json, {"versions": versions(device), "sizes": sizes, "parts": parts,
                                  "all_met": met})
    return met


def main(argv: list[str] | None = None) -> int:
    met = True

    def run(argv: list[str] | None) -> None:
        nonlocal met
        met = measure_all(parse(argv))

    return run_command(run, argv) or int(not met)


if __name__ == "__main__":
    sys.exit(main())
