"""What the package is timed beside: FAISS's flat index, CLIP's own image transform, a plain batched sort."""
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from .. import metrics
from ..clip.zero_shot import CLIP_MEAN, CLIP_STD, normalize, resize_crop
from ..data.images import Files, ImageDataset, load_batches, split_indices

SEARCH_CASES = [(threads, q) for threads in (1, 2) for q in (1, 10, 100)]
SEARCH_ROUNDS = 9
PHOTOS, PHOTO_SIZE = 64, (500, 375)


def timed(work: Callable[[], Any], steps: int, warm_up: bool = True) -> dict[str, float]:
    """Mean CPU-seconds and seconds of a call, and the peak memory of the process."""
    if warm_up:
        work()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        work()
    return {"cpu_s": (time.process_time() - cpu) / steps, "wall_s": (time.perf_counter() - wall) / steps,
            "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}  # of KiB, on Linux


def random_features(q: int, g: int, e: int, classes: int = 45) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L2-normalised features around random class centres, and their labels: queries, then gallery."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, e, generator=generator)
    out = []
    for count in (q, g):
        labels = torch.randint(classes, (count,), generator=generator)
        out += [F.normalize(centers[labels] + 3 * torch.randn(count, e, generator=generator), dim=1), labels]
    return out[0], out[1], out[2], out[3]


def batched_retrieval(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor,
                      k: int = 200) -> dict[str, float]:
    """mAP@k, Prec@k, mAP@all and Prec@100 as one would write them without more thought: float32 distances of
    500 queries, a sort of each row, cumulative sums.
    """
    ranks, columns = torch.arange(1, len(gallery) + 1), []
    for features, labels in zip(query.split(500), query_labels.split(500)):
        order = torch.cdist(features, gallery).argsort(dim=1, stable=True)
        hits = (gallery_labels[order] == labels[:, None]).float()
        precisions = hits.cumsum(dim=1) / ranks * hits
        columns.append(torch.stack([
            precisions[:, :k].sum(dim=1) / hits[:, :k].sum(dim=1).clamp(min=1), hits[:, :k].mean(dim=1),
            precisions.sum(dim=1) / hits.sum(dim=1).clamp(min=1), hits[:, :100].mean(dim=1)]))
    names = (f"mAP@{k}", f"Prec@{k}", "mAP@all", "Prec@100")
    return dict(zip(names, torch.cat(columns, dim=1).mean(dim=1).tolist()))


def measure_search(g: int, e: int) -> dict[str, Any]:
    """`metrics.search` and FAISS's flat index in turns, k = 10: medians of seconds and CPU-seconds of each.

    The squared norms are kept between searches, as FAISS keeps its copy of the gallery; `once` is a search
    without them. `faiss` is the index as it comes, which scans the gallery row by row for few queries; `blas`
    makes it multiply matrices for any number of them.
    """
    try:
        import faiss
    except ImportError:
        raise ValueError("faiss-cpu is missing; pip install faiss-cpu, or choose another --part") from None
    query, _, gallery, _ = random_features(max(q for _, q in SEARCH_CASES), g, e)
    index = faiss.IndexFlatL2(e)
    index.add(gallery.numpy())
    norms, cases = metrics.squared_norms(gallery), []
    before = torch.get_num_threads(), faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold

    def search_faiss(rows: Any, threshold: int) -> None:
        faiss.cvar.distance_compute_blas_threshold = threshold
        index.search(rows, 10)

    try:
        for threads, q in SEARCH_CASES:
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)
            rows = query[:q].contiguous()
            work: dict[str, Callable[[], Any]] = {
                "ours": partial(metrics.search, rows, gallery, 10, norms),
                "faiss": partial(search_faiss, rows.numpy(), before[2]),
                "blas": partial(search_faiss, rows.numpy(), 1),
                "once": partial(metrics.search, rows, gallery, 10)}
            times = [{side: timed(call, 1, warm_up=turn == 0)
                      for side, call in work.items()} for turn in range(SEARCH_ROUNDS)]
            cases.append({"threads": threads, "queries": q} | {
                f"{side}_{unit}": median(turn[side][unit] for turn in times)
                for side in work for unit in ("wall_s", "cpu_s")})
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
        faiss.cvar.distance_compute_blas_threshold = before[2]
    return {"faiss": faiss.__version__, "cases": cases}


def faiss_seconds(case: dict[str, Any], unit: str) -> float:
    """Of FAISS's faster mode."""
    return min(case[f"{side}_{unit}"] for side in ("faiss", "blas") if f"{side}_{unit}" in case)


def search_table(cases: list[dict[str, Any]], unit: str = "cpu_s") -> str:
    """Markdown, milliseconds; the ratio is to FAISS's faster mode with its best number of threads."""
    columns = ("ours", "faiss", "blas", "once")
    lines = ["| queries | threads | ms: here | FAISS | FAISS, BLAS | once | here / FAISS's best |",
             "|---" * 7 + "|"]
    for case in cases:
        times = [f"{1000 * case[f'{side}_{unit}']:.0f}" if f"{side}_{unit}" in case else "-"
                 for side in columns]
        best = min(faiss_seconds(other, unit) for other in cases if other["queries"] == case["queries"])
        lines.append("| " + " | ".join([str(case["queries"]), str(case["threads"]), *times,
                                        f"{case[f'ours_{unit}'] / best:.2f}"]) + " |")
    return "\n".join(lines)


def write_photos(folder: str) -> list[str]:
    """JPEG files of smooth colours, which compress as photos do."""
    generator, paths = torch.Generator().manual_seed(0), []
    for i in range(PHOTOS):
        dots = torch.randint(256, (24, 32, 3), dtype=torch.uint8, generator=generator).numpy()
        paths.append(os.path.join(folder, f"{i}.jpg"))
        Image.fromarray(dots).resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def read_photos(side: str, paths: list[str], image_size: int) -> list[Tensor]:
    """Batches of a tower's input, read in this process: by the package, or by CLIP's own transform."""
    n, batches = len(paths), split_indices(len(paths), 16)
    if side == "plain":
        transform = transforms.Compose([
            transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size), transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD)])
        return [torch.stack([transform(Image.open(paths[i]).convert("RGB")) for i in batch])
                for batch in batches]
    dataset = ImageDataset(Files(paths, [""] * n, [""] * n), resize_crop(image_size), ())
    return [normalize(images) for _, images, _ in load_batches(dataset, batches, 0)]
