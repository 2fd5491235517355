"""Timing, and search beside FAISS's flat index in the same process."""
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
from ..machine.processes import memory_gib

SEARCH = [200_000, 512]  # gallery and width
SEARCH_CASES = [(threads, q) for threads in (1, 2) for q in (1, 10, 100)]
SEARCH_ROUNDS = 9


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


def measure_search(g: int, e: int) -> dict[str, Any]:
    """`metrics.search` and FAISS's flat index in turns, k = 10: median seconds and CPU-seconds of each, per
    case, and FAISS's version. The squared norms are kept between searches, as FAISS keeps its copy of the
    gallery; `once` is a search without them. `faiss` is the index as it comes, which scans the gallery row by
    row for few queries; `blas` makes it multiply matrices for any number of them.
    """
    import faiss

    query, _, gallery, _ = random_features(max(q for _, q in SEARCH_CASES), g, e)
    index = faiss.IndexFlatL2(e)
    index.add(gallery.numpy())
    norms = metrics.squared_norms(gallery)
    cpu, results = torch.device("cpu"), []
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
            work: dict[str, Callable[[], Any]] = {
                "ours": partial(metrics.search, rows, gallery, 10, norms),
                "faiss": partial(index.search, rows.numpy(), 10),
                "blas": partial(by_blas, rows.numpy()),
                "once": partial(metrics.search, rows, gallery, 10)}
            times = [{side: timed(call, 1, cpu, warm_up=turn == 0) for side, call in work.items()}
                     for turn in range(SEARCH_ROUNDS)]
            results.append({"threads": threads, "queries": q} | {
                f"{side}_{unit}": median(turn[side][unit] for turn in times)
                for side in work for unit in ("wall_s", "cpu_s")})
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
    return {"faiss": faiss.__version__, "cases": results}


def random_features(q: int, g: int, e: int, classes: int = 45) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L2-normalised features around random class centres, and their labels: queries, then gallery."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, e, generator=generator)
    out = []
    for count in (q, g):
        labels = torch.randint(classes, (count,), generator=generator)
        out += [F.normalize(centres[labels] + 3 * torch.randn(count, e, generator=generator), dim=1), labels]
    return out[0], out[1], out[2], out[3]
