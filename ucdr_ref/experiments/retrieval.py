"""Retrieval protocols to tables: the trained method beside zero-shot CLIP, and the paper's numbers where there are any."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip.model import CLIP
from ..clip.zero_shot import ZeroShot, normalised
from ..config import Config
from ..images.batches import STATISTICS, Files, ImageDataset, augment, balanced_batches, load
from ..images.features import extract
from ..machine.files import write_text_atomic
from ..machine.processes import fold, share
from ..metrics import retrieval, search
from ..training.loop import Feed
from ..ucdr.adapter import Batch
from .protocols import Protocol, Test
from .report import sheet

COLUMNS = ("mAP@200", "Prec@200", "mAP@all", "Prec@100")
# As published (ViT-B/32), by dataset, protocol and gallery.
PUBLISHED = {
    ("domainnet", "UCDR", "unseen"): "mean of 5 query domains: CLIP mAP@200 0.4435 Prec@200 0.3840, ProS 0.6052 0.5626, "
                                     "UCDR-Adapter 0.6071 0.5655; query sketch: UCDR-Adapter mAP@200 0.6591",
    ("domainnet", "UCDR", "mixed"): "mean of 5 query domains: ProS mAP@200 0.5546 Prec@200 0.5195, UCDR-Adapter 0.5660 0.5311",
    ("domainnet", "UdCDR", "seen"): "mean of 5 query domains: ProS mAP@200 0.6332, UCDR-Adapter 0.6370",
    ("sketchy", "UcCDR", "unseen"): "ProS mAP@200 0.6991, UCDR-Adapter 0.7285",
    ("tuberlin", "UcCDR", "unseen"): "ProS mAP@all 0.6675, UCDR-Adapter 0.6581",
}
Encode = Callable[[Tensor], Tensor]


def score(encode: Encode, test: Test, config: Config, image_size: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """For each gallery of a test: the metrics of `metrics.retrieval`, with the files and the first ten results per query."""
    query, kept = extract(encode, test.query, config, image_size, device)
    queries = test.query.keep(kept)
    features: dict[str, Tensor] = {}
    results = {}
    for name, files in test.galleries.items():
        new = files.keep([i for i, path in enumerate(files.paths) if path not in features])  # galleries of a test overlap
        if len(new):
            rows, kept = extract(encode, new, config, image_size, device)
            features.update(zip(new.keep(kept).paths, rows))
        files = files.keep([i for i, path in enumerate(files.paths) if path in features])
        names = sorted(set(queries.classes) | set(files.classes))
        query_ids, gallery_ids = (torch.tensor([names.index(label) for label in part.classes], device=device)
                                  for part in (queries, files))
        gallery = torch.stack([features[path] for path in files.paths]).to(device)
        metrics = retrieval(query.to(device), query_ids, gallery, gallery_ids)
        shown = shown_queries(queries)
        nearest = search(query[shown].to(device), gallery, min(10, len(files)))[1].tolist()
        results[name] = {"metrics": metrics, "names": names, "queries": queries, "gallery": files,
                         "shown": list(zip(shown, nearest))}
    return results


def validation_score(encode: Encode, test: Test, config: Config, image_size: int, device: torch.device) -> float:
    """mAP@200 of the validation queries, by which phase 2 keeps its best epoch (D5)."""
    return next(iter(score(encode, test, config, image_size, device).values()))["metrics"]["mAP@200"]


def shown_queries(queries: Files, count: int = 8) -> list[int]:
    """Indices of queries of as many different classes as `count` allows, for the picture."""
    first: dict[str, int] = {}
    for i, label in enumerate(queries.classes):
        first.setdefault(label, i)
    indices = list(first.values())
    return indices[:: max(1, -(-len(indices) // count))][:count]


def evaluate(encoders: Mapping[str, Encode], protocol: Protocol, config: Config, image_size: int,
             device: torch.device) -> list[dict[str, Any]]:
    """One row per test, gallery and encoder: its numbers, and under `details` what the files need."""
    rows = []
    for test in protocol.tests:
        scored = {name: score(encode, test, config, image_size, device) for name, encode in encoders.items()}
        for gallery in test.galleries:
            for name in encoders:
                details = scored[name][gallery]
                metrics = details["metrics"]
                numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
                rows.append({"protocol": test.protocol, "query_domain": test.query_domain, "gallery_name": gallery,
                             "method": name, **numbers, "details": details})
    return rows


def table(rows: list[dict[str, Any]], dataset: str) -> str:
    """The rows as text, percentages, with the paper's numbers under the row they belong to."""
    lines = [f"{'protocol':<9} {'query':<11} {'gallery':<8} {'method':<13} " + " ".join(f"{name:>9}" for name in COLUMNS)
             + "  queries x gallery"]
    for i, row in enumerate(rows):
        key = (row["protocol"], row["query_domain"], row["gallery_name"])
        lines.append(f"{key[0]:<9} {key[1]:<11} {key[2]:<8} {row['method']:<13} "
                     + " ".join(f"{100 * row[name]:9.2f}" for name in COLUMNS) + f"  {row['queries']} x {row['gallery']}"
                     + (f"; k cut to {row['k_used']}" if row["k_used"] < row["k"] else "")
                     + (f"; {row['no_relevant']} queries without a relevant image" if row["no_relevant"] else ""))
        last = i + 1 == len(rows) or key != tuple(rows[i + 1][part] for part in ("protocol", "query_domain", "gallery_name"))
        if last and (dataset, key[0], key[2]) in PUBLISHED:
            lines.append(f"          published: {PUBLISHED[dataset, key[0], key[2]]}")
    return "\n".join(lines)


def write_results(rows: list[dict[str, Any]], folder: Path, about: dict[str, Any]) -> None:
    """results.json, per_class.csv and queries.png (each query's first ten: hits green, misses red) in `folder`."""
    plain = [{key: value for key, value in row.items() if key != "details"} for row in rows]
    write_text_atomic(folder / "results.json", json.dumps({**about, "rows": plain}, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["protocol", "query_domain", "gallery", "method", "class", "queries", "mAP@200", "mAP@all"])
    for row in rows:
        details = row["details"]
        for label, value in sorted(details["metrics"]["per_class"].items()):
            name = details["names"][label]
            writer.writerow([row["protocol"], row["query_domain"], row["gallery_name"], row["method"], name,
                             details["queries"].classes.count(name), f"{value:.6f}",
                             f"{details['metrics']['per_class@all'][label]:.6f}"])
    write_text_atomic(folder / "per_class.csv", text.getvalue())
    picture = []
    first = (rows[0]["protocol"], rows[0]["gallery_name"])
    for i in range(len(rows[0]["details"]["shown"])):
        for row in rows:
            if (row["protocol"], row["gallery_name"]) == first:
                queries, gallery = row["details"]["queries"], row["details"]["gallery"]
                index, nearest = row["details"]["shown"][i]
                picture.append((queries.paths[index], f"{row['method']}: {queries.classes[index]}",
                                [(gallery.paths[j], gallery.classes[j] == queries.classes[index]) for j in nearest]))
    sheet(picture, folder / "queries.png")

CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory


def feed(phase: str, protocol: Protocol, config: Config, image_size: int, device: torch.device) -> Feed:
    """Domain-balanced, augmented batches of the training files for one phase of UCDR-Adapter."""
    class_ids = torch.tensor([protocol.class_names.index(name) for name in protocol.train.classes])
    domain_ids = torch.tensor([protocol.domain_names.index(name) for name in protocol.train.domains])
    size = config.source_batch if phase == "source" else config.target_batch

    def order(epoch: int) -> list[list[int]]:
        return balanced_batches(domain_ids.tolist(), size, fold(config.seed, phase), epoch, config.balance == "exact")

    def batches(epoch: int, left: Sequence[list[int]]) -> Iterator[tuple[Batch, list[str]]]:
        shares = [share(batch) for batch in left]
        dataset = ImageDataset(protocol.train, augment(image_size), config.stroke_domains,
                               fold(config.seed, phase, epoch))
        for indices, images, _ in load(dataset, shares, config.workers, config.bad_images == "skip", device):
            images = images.view(-1, 3, image_size, image_size)  # a share may be empty
            images, classes, domains = (part.to(device, non_blocking=True)
                                        for part in (images, class_ids[indices], domain_ids[indices]))
            images = normalised(images, *STATISTICS[config.train_normalization])  # D4
            yield Batch(images, classes, domains), [protocol.train.paths[i] for i in indices]

    epochs = config.source_epochs if phase == "source" else config.target_epochs
    return Feed(epochs, order, batches, lambda batch: cut(batch, phase, config))


def cut(batch: Batch, phase: str, config: Config) -> list[tuple[Batch, float]]:
    """What passes at once of a batch, each part with its share of the images: the losses' weighted sum is the batch's.

    Only phase 2 is a mean over images alone; in phase 1 queues and momentum move once a batch, so it stays whole.
    """
    b = len(batch.images)
    size = config.micro_batch or (CPU_PART if batch.images.device.type == "cpu" else b)
    if phase == "source" or b <= size:
        return [(batch, 1.0)]
    return [(Batch(*part), len(part[0]) / b) for part in zip(*(rows.split(size) for rows in batch))]


def class_anchors(config: Config, clip: CLIP, protocol: Protocol, device: torch.device) -> Tensor | None:
    """Class features [c, e] that replace the text template (D13): the file's rows, or prototypes; None for text.

    A prototype is the mean of the frozen tower's normalised features of a class's gallery-domain training images.
    Raises ValueError for a file of another shape, or a class without such images.
    """
    names = protocol.class_names
    if config.class_features in ("template", "plain"):
        return None
    if config.class_features == "prototypes":
        files = protocol.train.keep([i for i, name in enumerate(protocol.train.domains) if name == protocol.gallery_domain])
        missing = sorted(set(names) - set(files.classes))
        if missing:
            raise ValueError(f"--class-features prototypes: no training image in {protocol.gallery_domain} for "
                             f"{', '.join(missing[:5])}")
        features, kept = extract(ZeroShot(clip).encode, files, config, clip.image_size, device)
        labels = torch.tensor([names.index(name) for name in files.keep(kept).classes])
        return torch.zeros(len(names), clip.embed_dim).index_add_(0, labels, features).to(device)  # its length does not matter
    try:
        rows = torch.from_numpy(np.load(config.class_features, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"--class-features {config.class_features}: expected template, plain, prototypes or a .npy file of "
                         f"numbers ({str(error).splitlines()[0]})") from None
    if rows.shape != (len(names), clip.embed_dim) or not torch.isfinite(rows.float()).all():
        raise ValueError(f"--class-features {config.class_features}: holds {list(rows.shape)}, expected "
                         f"{[len(names), clip.embed_dim]} finite numbers, rows in class order")
    return rows.to(device)
