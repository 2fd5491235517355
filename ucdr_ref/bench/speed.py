"""Time and peak memory of every part beside a plain transcription of the published computation: `python -m
ucdr_ref.bench.speed`.

Weights, images and labels are random, so no file is needed. Each part and side runs alone in a fresh process
of the same interpreter, one after the other, so that its peak memory is its own; both see the same machine,
threads and sizes. The first step of each is not counted. CPU-seconds are those of all threads: they hold on a
machine that does other things too, where seconds do not. The plain metrics are timed on the first queries and
scaled to all, which the output says.

`closed-form` is the cost of a closed form, in passes of the image tower per training image; `read` is
images/s of one process from JPEG files to the tower's input size, beside CLIP's own transform.

`search` compares exact search with faiss-cpu's flat index (requirements-dev.txt), both in one process and in
turns, so that they meet the same load on a busy machine; the ratio is that of the median seconds, to the
faster of FAISS's two ways, row by row and by BLAS. Adding vectors to FAISS is not timed.

Exit status 1 when a required figure is missed. On two CPU cores, float32, 245 classes, 5 domains, 16 context
vectors, batch 50: phase 1 at least 2x, phase 2 at least 3x (ViT-B/32) or 2x (ViT-B/16) fewer CPU-seconds,
each in at most half the memory; a closed form of 20,000 images at most 1.05 passes of the tower for each;
metrics at 8,000 x 20,000 x 512 in 25 s and 2 GB; search at 200,000 x 512 no slower than FAISS for 1, 10 and
100 queries with one and two threads. On a GPU: encoding with ViT-B/16 in bf16 at half the measured matrix
peak.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F

from tests import plain as bench_plain

from .. import metrics
from ..clip.weights import one_line
from ..config import Config
from ..demo.pretrain import random_clip
from ..experiments.datasets import class_list
from ..experiments.retrieval import cut
from ..experiments.run_folder import versions
from ..machine.command import command
from ..machine.processes import autocast, pick_device
from ..ucdr.adapter import Batch, UCDRAdapter
from .costs import measure_closed_form, measure_reading
from .peers import SEARCH, measure_search, random_features, timed
from .record import result_file, write_results

TEXT = dict(context_length=77, vocab_size=49408)
BASE = dict(image_size=224, vision_width=768, vision_layers=12, vision_heads=12, embed_dim=512,
            text_width=512, text_layers=12, text_heads=8, **TEXT)
TINY = dict(image_size=32, patch=8, vision_width=64, vision_layers=2, vision_heads=1, embed_dim=32,
            text_width=64, text_layers=2, text_heads=1, **TEXT)
SHAPES = {"ViT-B/32": dict(BASE, patch=32), "ViT-B/16": dict(BASE, patch=16), "tiny": TINY}
PARTS = ("phase1", "phase2", "encode", "closed-form", "read", "metrics", "search")
PASSES = 1.05  # of the image tower, per training image of a closed form
PHASES = {"phase1": "source", "phase2": "target"}
FASTER = {"phase1": {"ViT-B/32": 2.0, "ViT-B/16": 2.0}, "phase2": {"ViT-B/32": 3.0, "ViT-B/16": 2.0}}
PUBLISHED = dict(batch=50, classes=245, domains=5, context=16, precision="fp32", sizes=[8000, 20000, 512])
PLAIN_QUERIES = 200


def build(side: str, sizes: dict[str, Any], device: torch.device) -> UCDRAdapter | bench_plain.PlainAdapter:
    """One side's model, its queues filled with random features."""
    torch.manual_seed(0)
    clip = random_clip(**SHAPES[sizes["arch"]]).eval().requires_grad_(False).to(device)
    names = class_list("domainnet-train") + [f"class {i}" for i in range(sizes["classes"])]
    kind = UCDRAdapter if side == "ours" else bench_plain.PlainAdapter
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


def measure(part: str, side: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """One side of one part, of `search` both; `closed-form` has one. Runs in a process of its own."""
    if part == "search":
        return measure_search(*sizes["search_sizes"])
    device = torch.device(sizes["device"])
    if part == "closed-form":
        return measure_closed_form(SHAPES[sizes["arch"]], sizes, device)
    if part == "read":
        return measure_reading(side, SHAPES[sizes["arch"]]["image_size"])
    if part == "metrics":
        return measure_metrics(side, sizes, device)
    model, batch = build(side, sizes, device), random_batch(sizes, device)
    config = Config(precision=sizes["precision"])
    if part == "encode":
        def encode() -> None:
            with autocast(config.precision, device):
                model.encode(batch.images)

        result = timed(encode, sizes["steps"], device)
        result["images_per_s"] = sizes["batch"] / result["wall_s"]
    else:
        result = timed(training_step(model, batch, PHASES[part], config), sizes["steps"], device)
    if device.type == "cuda":
        flops = sizes["batch"] * image_flops(part, SHAPES[sizes["arch"]])
        peak = matmul_flops(torch.bfloat16 if sizes["precision"] == "bf16" else torch.float32, device)
        result.update(matmul_peak_tflops=peak / 1e12, matmul_share=flops / result["wall_s"] / peak)
    return result


def training_step(model: UCDRAdapter | bench_plain.PlainAdapter, batch: Batch, phase: str,
                  config: Config) -> Callable[[], None]:
    """A step as the training loop takes it: loss, gradient, Adam."""
    trained = model.requires_grad_(False).trainable(phase)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    if isinstance(model, UCDRAdapter):
        model.start(phase)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part, share in cut(batch, phase, config) if isinstance(model, UCDRAdapter) else [(batch, 1.0)]:
            with autocast(config.precision, batch.images.device):
                loss = model.step(part, phase)["loss"]
            (share * loss).backward()
        optimizer.step()

    return step


def measure_metrics(side: str, sizes: dict[str, Any], device: torch.device) -> dict[str, float]:
    q, g, e = sizes["sizes"]
    query, query_labels, gallery, gallery_labels = (part.to(device) for part in random_features(q, g, e))
    few, rank = (q, metrics.retrieval) if side == "ours" else (min(q, PLAIN_QUERIES), bench_plain.retrieval)
    result = timed(lambda: rank(query[:few], query_labels[:few], gallery, gallery_labels), 1, device,
                   warm_up=False)
    if few == q:
        return result
    scaled = {name: result[name] * q / few for name in ("cpu_s", "wall_s")}
    return {**result, **scaled, "queries_timed": few}


def image_flops(part: str, shape: dict[str, int]) -> float:
    """Operations of our image tower per image (a multiplication and an addition are two), without text.

    With frozen weights a backward pass costs what the forward pass does, and attention's twice that.
    """
    d, n = shape["vision_width"], (shape["image_size"] // shape["patch"]) ** 2

    def tower(tokens: int, backward: bool = False) -> float:
        linear, attention = 24 * tokens * d ** 2, 4 * tokens ** 2 * d
        # keys and values of all, the rest of one
        last_linear, last_attention = (4 * tokens + 20) * d ** 2, 4 * tokens * d
        projection = 2 * d * shape["embed_dim"]
        return ((shape["vision_layers"] - 1) * linear + last_linear + projection) * (2 if backward else 1) \
            + ((shape["vision_layers"] - 1) * attention + last_attention) * (3 if backward else 1)

    patches = 2 * n * 3 * shape["patch"] ** 2 * d
    if part == "phase1":  # online and momentum
        return patches + tower(n + 3, backward=True) + tower(n + 3)
    return patches + tower(n + 1) + tower(n + 3, backward=part == "phase2")  # query and target pass


def matmul_flops(dtype: torch.dtype, device: torch.device, size: int = 8192, rounds: int = 10) -> float:
    """Operations per second of a size^3 matrix product, the best of `rounds`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / min(timed(lambda: a @ b, 1, device)["wall_s"] for _ in range(rounds))


def checks(part: str, ours: dict[str, float], plain: dict[str, float],
           sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """What is required at the published sizes, and nothing at others: [{what, value, bound, met}]."""
    gpu, arch = sizes["device"].startswith("cuda"), sizes["arch"]
    published = all(sizes[name] == PUBLISHED[name] for name in PUBLISHED if name != "sizes")
    wanted: list[tuple[str, float, str, float]] = []
    if part in FASTER and arch in FASTER[part] and published and not gpu:
        wanted.append(("plain / ours in CPU-seconds", plain["cpu_s"] / ours["cpu_s"], ">=",
                       FASTER[part][arch]))
        wanted.append(("ours / plain in memory", ours["memory_gib"] / plain["memory_gib"], "<=", 0.5))
    if part == "metrics" and sizes["sizes"] == PUBLISHED["sizes"]:
        # On a busy machine seconds exceed CPU-seconds, which then bound what an idle one would take.
        wanted.append(("seconds", ours["wall_s"] if gpu else min(ours["wall_s"], ours["cpu_s"]), "<=", 25.0))
        wanted.append(("GB", ours["memory_gib"] * 2 ** 30 / 1e9, "<=", 2.0))
    if part == "encode" and gpu and arch == "ViT-B/16" and sizes["precision"] == "bf16":
        wanted.append(("share of the matrix peak", ours["matmul_share"], ">=", 0.5))
    return [{"what": what, "value": value, "bound": f"{sign} {bound:g}",
             "met": value >= bound if sign == ">=" else value <= bound}
            for what, value, sign, bound in wanted]


def isolated(part: str, side: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process. Raises ValueError when memory runs out: by then it is often killed."""
    # threads that wait for a busy core would spin, and that would count
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, part, side, sizes).result()
        except BrokenProcessPool:
            reason = "was killed, probably for lack of memory"
        except (RuntimeError, MemoryError) as error:  # PyTorch's allocators have no type of their own
            if isinstance(error, RuntimeError) and not re.search("alloc|overflow", str(error)):
                raise
            reason = f"lacked memory ({one_line(error)})"
    raise ValueError(f"{part} ({side}) {reason}; lower --batch or the sizes, or run another --part")


def describe(name: str, result: dict[str, float]) -> str:
    text = f"{name:<16} {result['cpu_s']:9.2f} CPU-s {result['wall_s']:9.2f} s"
    text += f" {result['memory_gib']:7.2f} GiB"
    if "images_per_s" in result:
        text += f" {result['images_per_s']:8.1f} images/s"
    if "matmul_share" in result:
        text += f" {result['matmul_share']:7.1%} of {result['matmul_peak_tflops']:.0f} TFLOP/s"
    if "queries_timed" in result:
        text += f"  (time scaled from {result['queries_timed']:.0f} queries)"
    return text


def compare(part: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Measures both sides of a part and prints them."""
    sides = {}
    for side in ("ours", "plain"):
        sides[side] = isolated(part, side, sizes)
        print(describe(f"{part} {side}", sides[side]), flush=True)
    ours, plain = sides["ours"], sides["plain"]
    ratios = {name: plain[name] / ours[name] for name in ("cpu_s", "wall_s", "memory_gib") if ours[name]}
    return {**sides, "plain_over_ours": ratios, "required": checks(part, ours, plain, sizes)}


def compare_closed_form(sizes: dict[str, Any]) -> dict[str, Any]:
    """Measures what a closed form costs and prints it beside one pass of the tower."""
    cost = isolated("closed-form", "ours", sizes)
    print(f"closed-form      {cost['passes']:.4f} passes of the tower per training image: a pass "
          f"{cost['pass_s_per_image']:.4f} s, the fit of {cost['images']:,} images {cost['fit_s']:.2f} s",
          flush=True)
    required = [{"what": "passes of the tower", "value": cost["passes"], "bound": f"<= {PASSES}",
                 "met": cost["passes"] <= PASSES}] if sizes["sizes"] == PUBLISHED["sizes"] else []
    return {"ours": cost, "plain_over_ours": {}, "required": required}


def compare_search(sizes: dict[str, Any]) -> dict[str, Any]:
    """Measures search beside FAISS and prints every case; nothing but a line where FAISS is not installed."""
    if find_spec("faiss") is None:
        print("search not measured: faiss-cpu is not installed; `pip install faiss-cpu`, or choose another "
              "--part", flush=True)
        return {"cases": [], "plain_over_ours": {}, "required": []}
    found = isolated("search", "both", sizes)
    required, ratios = [], {}
    for case in found["cases"]:
        name = f"{case['queries']} queries, {case['threads']} threads"
        ratio = case["ours_wall_s"] / min(case["faiss_wall_s"], case["blas_wall_s"])
        print(f"search {name:<24}" + "".join(f" {side} {case[f'{side}_wall_s']:.4f} s "
                                             f"({case[f'{side}_cpu_s']:.4f} CPU-s)"
                                            for side in ("ours", "faiss", "blas", "once")), flush=True)
        ratios[f"{case['threads']}x{case['queries']}"] = 1 / ratio
        if sizes["search_sizes"] == SEARCH:
            required.append({"what": f"ours / FAISS, {name}", "value": ratio, "bound": "<= 1",
                             "met": ratio <= 1})
    return {**found, "required": required, "plain_over_ours": ratios}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=SHAPES, default="ViT-B/32")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    numbers = (("batch", 50, "images per step"), ("classes", 245, "training classes"),
               ("domains", 5, "source domains"), ("context", 16, "learnable context vectors"),
               ("steps", 0, "steps measured (0: 2 on a CPU, 20 on a GPU)"))
    for name, default, text in numbers:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--sizes", type=int, nargs=3, metavar=("Q", "G", "E"), default=PUBLISHED["sizes"],
                        help="queries, gallery and feature width of the metrics (default: 8000 20000 512)")
    parser.add_argument("--search-sizes", type=int, nargs=2, metavar=("G", "E"), default=SEARCH,
                        help="gallery and feature width of the search (default: 200000 512)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU when there is one)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                        help="of both sides (default: fp32)")
    parser.add_argument("--json", type=result_file, metavar="FILE",
                        help="write everything measured, with machine and versions")
    args = parser.parse_args(argv)
    if args.steps < 0 or min(args.batch, args.classes, args.domains, args.context, *args.sizes,
                             *args.search_sizes) < 1:
        parser.error("sizes must be at least 1")
    return args


def run(args: argparse.Namespace) -> int:
    """Measures, prints the ratios last, writes the JSON; 1 when a required figure was missed, else 0."""
    device = pick_device(args.device)
    sizes = {name: value for name, value in vars(args).items() if name not in ("json", "part")}
    sizes.update(device=str(device), steps=args.steps or (20 if device.type == "cuda" else 2))
    print(", ".join(f"{name} {value}" for name, value in (versions() | sizes).items()), flush=True)
    special = {"search": compare_search, "closed-form": compare_closed_form}
    parts = {part: special[part](sizes) if part in special else compare(part, sizes)
             for part in (PARTS if args.part == "all" else (args.part,))}
    met = True
    print("\nplain / ours: CPU-seconds, seconds, memory (search: FAISS / ours, seconds, for each line above)")
    for part, result in parts.items():
        print(f"{part:<8} " + " ".join(f"{value:8.2f}x" for value in result["plain_over_ours"].values()))
        for check in result["required"]:
            met &= check["met"]
            verdict = "met" if check["met"] else "MISSED"
            print(f"{'':<8} {check['what']} {check['value']:.2f}, required {check['bound']}: {verdict}")
    if args.json:
        everything = {"versions": versions(), "sizes": sizes, "parts": parts, "all_met": met}
        write_results(args.json, everything)
    return 0 if met else 1


def main(argv: list[str] | None = None) -> int:
    missed = 0

    def measured(argv: list[str] | None) -> None:
        nonlocal missed
        missed = run(parse(argv))

    return command(measured, argv) or missed


if __name__ == "__main__":
    sys.exit(main())
