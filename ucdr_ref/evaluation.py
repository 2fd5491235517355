"""Retrieval protocols to tables: the trained method beside zero-shot CLIP, and the paper's numbers where there are any."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .data import Files
from .features import extract
from .machine.files import write_text_atomic
from .metrics import retrieval, search
from .pictures import sheet
from .protocols import Protocol, Test

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
