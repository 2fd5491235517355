"""Timing, what an image costs, and what metrics and search are timed beside: a batched sort and FAISS."""
from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics
from ..clip.zero_shot import ZeroShot
from ..distributed import autocast, memory_gib
from ..ucdr.adapter import UCDRAdapter
from ..ucdr.closed_form import STRENGTHS, measure

SEARCH = [200_000, 512]  # gallery and width
SEARCH_CASES = [(threads, q) for threads in (1, 2) for q in (1, 10, 100)]
SEARCH_ROUNDS = 9
DOMAINS = 5
CPU = torch.device("cpu")


def timed(work: Callable[[], Any], steps: int, device: torch.device,
          warm_up: bool = True) -> dict[str, float]:
    """Mean CPU-seconds and seconds of a call, and the peak memory of the process (of the GPU where one is
    used).
    """
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if warm_up:
        work()
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        work()
    wait()
    return {"cpu_s": (time.process_time() - cpu) / steps, "wall_s": (time.perf_counter() - wall) / steps,
            "memory_gib": memory_gib(device)}


def in_turns(work: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """{"name_cpu_s", "name_wall_s"}: medians of calls that take turns, so that all meet the same load."""
    times = [{name: timed(call, 1, device, warm_up=turn == 0) for name, call in work.items()}
             for turn in range(rounds)]
    return {f"{name}_{unit}": median(turn[name][unit] for turn in times)
            for name in work for unit in ("cpu_s", "wall_s")}


def batched_sort(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor,
                 chunk: int = 100) -> dict[str, float]:
    """mAP@200 and mAP@all as most code has them: float32 distances and PyTorch's sort, 100 queries a time."""
    first, whole = [], []
    for rows, labels in zip(query.split(chunk), query_labels.split(chunk)):
        hits = gallery_labels[torch.cdist(rows, gallery).argsort(dim=1)] == labels[:, None]
        first.append(metrics.average_precision(hits[:, :200]))
        whole.append(metrics.average_precision(hits))
    return {"mAP@200": torch.cat(first).mean().item(), "mAP@all": torch.cat(whole).mean().item()}


def measure_search(g: int, e: int) -> dict[str, Any]:
    """`metrics.search` and FAISS's flat index in turns, k = 10. The squared norms are kept between searches,
    as FAISS keeps its copy of the gallery; `once` is without them. `faiss` is the index as it comes, which
    scans row by row for few queries; `blas` makes it multiply matrices for any number.
    """
    import faiss

    query, _, gallery, _ = random_features(max(q for _, q in SEARCH_CASES), g, e)
    index = faiss.IndexFlatL2(e)
    index.add(gallery.numpy())
    norms, results = metrics.squared_norms(gallery), []
    before = torch.get_num_threads(), faiss.omp_get_max_threads()

    def by_blas(rows: Any) -> None:
        threshold = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 1
        try:
            index.search(rows, 10)
        finally:
            faiss.cvar.distance_compute_blas_threshold = threshold

    try:
        for threads, q in SEARCH_CASES:
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)
            rows = query[:q].contiguous()
            results.append({"threads": threads, "queries": q, **in_turns({
                "ours": partial(metrics.search, rows, gallery, 10, norms),
                "faiss": partial(index.search, rows.numpy(), 10),
                "blas": partial(by_blas, rows.numpy()),
                "once": partial(metrics.search, rows, gallery, 10)}, SEARCH_ROUNDS, CPU)})
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
    return {"faiss": faiss.__version__, "cases": results}


def search_ratios(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case, ours / FAISS's faster way: `cpu`, with the same threads, and `wall`, with FAISS's best
    number of threads, which for one query is one.
    """
    def best(case: dict[str, Any], unit: str) -> float:
        return min(case[f"faiss_{unit}"], case[f"blas_{unit}"])

    return [{"name": f"{case['queries']} queries, {case['threads']} threads",
             "cpu": case["ours_cpu_s"] / best(case, "cpu_s"),
             "wall": case["ours_wall_s"] / min(best(other, "wall_s") for other in cases
                                               if other["queries"] == case["queries"])}
            for case in cases]


def random_features(q: int, g: int, e: int, classes: int = 45) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L2-normalised features around random class centres, and their labels: queries, then gallery."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, e, generator=generator)
    out = []
    for count in (q, g):
        labels = torch.randint(classes, (count,), generator=generator)
        out += [F.normalize(centres[labels] + 3 * torch.randn(count, e, generator=generator), dim=1), labels]
    return out[0], out[1], out[2], out[3]


def measure_encoding(adapter: UCDRAdapter, images: Tensor, sizes: dict[str, Any],
                  device: torch.device) -> dict[str, float]:
    """Encoding by zero-shot CLIP and by the adapter in turns, and the fit of as many random features as the
    metrics' gallery has, with a form for each lambda that is tried.

    `pass` and `adapter`: CPU-seconds per image (seconds on a GPU); `adapter_passes`: their ratio; `passes`:
    what a closed form costs per training image, in passes of the image tower.
    """
    def encode(method: Any) -> None:
        with torch.inference_mode(), autocast(sizes["precision"], device):
            method.encode(images)

    zero_shot = ZeroShot(adapter.clip)
    found = in_turns({"pass": lambda: encode(zero_shot), "adapter": lambda: encode(adapter)},
                     max(3, sizes["steps"]), device)
    features = random_features(1, sizes["sizes"][1], adapter.clip.embed_dim)
    z, class_ids = (part.to(device) for part in features[2:])
    domain_ids = torch.arange(len(z), device=device) % DOMAINS

    def fit() -> None:
        measured = measure(z, class_ids, domain_ids, DOMAINS)
        for strength in STRENGTHS:
            measured.form(strength)

    fitted = timed(fit, 1, device)
    clock = "wall_s" if device.type == "cuda" else "cpu_s"
    tower, both = (found[f"{name}_{clock}"] / len(images) for name in ("pass", "adapter"))
    return {"pass_s_per_image": tower, "adapter_s_per_image": both, "adapter_passes": both / tower,
            "fit_s": fitted[clock], "images": len(z), "passes": 1 + fitted[clock] / len(z) / tower,
            "memory_gib": fitted["memory_gib"]}
