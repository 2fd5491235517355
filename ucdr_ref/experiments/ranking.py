"""Retrieval tests to a table: every method beside zero-shot CLIP, as it is and centred."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..clip.weights import OPENAI_SHA256, file_digest
from ..config import Config
from ..images.batches import Files, chunks
from ..images.features import Extractor
from ..machine.processes import gather, world
from ..machine.processes import rank as own_rank
from ..metrics import retrieval
from ..ucdr import closed_form
from ..ucdr.closed_form import ClosedForm
from .protocols import Test
from .report import plain

COLUMNS = ("mAP@200", "Prec@200", "mAP@all", "Prec@100")
# As published (ViT-B/32), by dataset, protocol and gallery.
PUBLISHED = {
    ("domainnet", "UCDR", "unseen"):
        "mean of 5 query domains: CLIP mAP@200 0.4435 Prec@200 0.3840, ProS 0.6052 0.5626, "
        "UCDR-Adapter 0.6071 0.5655; query sketch: UCDR-Adapter mAP@200 0.6591",
    ("domainnet", "UCDR", "mixed"):
        "mean of 5 query domains: ProS mAP@200 0.5546 Prec@200 0.5195, UCDR-Adapter 0.5660 0.5311",
    ("domainnet", "UdCDR", "seen"):
        "mean of 5 query domains: ProS mAP@200 0.6332, UCDR-Adapter 0.6370",
    ("sketchy", "UcCDR", "unseen"): "ProS mAP@200 0.6991, UCDR-Adapter 0.7285",
    ("tuberlin", "UcCDR", "unseen"): "ProS mAP@all 0.6675, UCDR-Adapter 0.6581",
}
# files -> features [n, e] on the device of the readable ones, and these
Rows = Callable[[Files], tuple[Tensor, Files]]


class FeatureTable:
    """Features of one encoder, each file encoded once, by one process: the galleries of tests overlap."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.rows: dict[str, Tensor | None] = {}  # None: not readable

    def of(self, files: Files) -> tuple[Tensor, Files]:
        """Features [n, e] on the device of the n readable files, and these files, in every process.

        Raises ValueError when no file can be read, or one cannot and --bad-images is error.
        """
        if new := files.keep([i for i, path in enumerate(files.paths) if path not in self.rows]):
            options = self.extractor.options
            batches = chunks(len(new), options.eval_batch)[own_rank()::world()]  # of all domains each
            found = self.extractor.stream(new, batches, options.bad_images == "skip")
            self.rows |= dict.fromkeys(new.paths)
            for indices, rows in gather([(indices.tolist(), rows.cpu()) for indices, rows, _ in found]):
                self.rows |= dict(zip(new.keep(indices).paths, rows))
        features = {i: row for i, path in enumerate(files.paths) if (row := self.rows[path]) is not None}
        if not features:
            raise ValueError(f"none of the {len(files)} images could be read; the first is {files.paths[0]}")
        return torch.stack([*features.values()]).to(self.extractor.device), files.keep([*features])


def formed(table: FeatureTable, form: ClosedForm) -> Rows:
    """The table's features behind a closed form: no image is encoded again."""
    def rows(files: Files) -> tuple[Tensor, Files]:
        features, found = table.of(files)
        with torch.inference_mode():
            return form(features), found

    return rows


def score(rows: Rows, test: Test, center: bool = False) -> dict[str, dict[str, Any]]:
    """For each gallery of a test: the numbers of `metrics.retrieval`, and what report and picture need.

    center: queries and gallery each lose their own mean first (transductive).
    """
    def moved(files: Files) -> tuple[Tensor, Files]:
        features, found = rows(files)
        return closed_form.center(features) if center else features, found

    query, queries = moved(test.query)
    results = {}
    for name, files in test.galleries.items():
        gallery, found = moved(files)
        names = sorted({*queries.classes, *found.classes})
        number = {label: i for i, label in enumerate(names)}
        query_ids, gallery_ids = (torch.tensor([number[label] for label in part.classes], device=query.device)
                                  for part in (queries, found))
        metrics = retrieval(query, query_ids, gallery, gallery_ids)
        results[name] = {
            "metrics": metrics, "names": names, "queries": queries, "gallery": found,
            "unreadable": len(test.query) - len(queries) + len(files) - len(found),
            "query_features": query.cpu(), "gallery_features": gallery.cpu()}
    return results


def validation_score(rows: Rows, test: Test, selected: tuple[str, str]) -> float:
    """The metric, in the gallery, by which phase 2 keeps its best epoch: `Protocol.selected` (D5)."""
    gallery, metric = selected
    return score(rows, test)[gallery]["metrics"][metric]


def rank(methods: Mapping[str, Rows], tests: list[Test]) -> list[dict[str, Any]]:
    """Two rows per test, gallery and method, the second centred: numbers, and `details` for the files."""
    rows = []
    for test in tests:
        scored = {(name, center): score(features, test, center)
                  for name, features in methods.items() for center in (False, True)}
        for gallery in test.galleries:
            for (name, center), found in scored.items():
                details = found[gallery]
                numbers = {key: value for key, value in details["metrics"].items()
                           if isinstance(value, (int, float))}
                rows.append({
                    "protocol": test.protocol, "query_domain": test.query_domain, "gallery_name": gallery,
                    "method": f"{name}, centred" if center else name, "transductive": center, **numbers,
                    "unreadable": details["unreadable"], "details": details})
    return rows


def published(config: Config, protocol: str, gallery: str) -> str:
    """The published numbers of a row, empty unless it is what they describe.

    That is the whole dataset with its split and galleries, and OpenAI's ViT-B/32, told by its digest.
    """
    text = PUBLISHED.get((config.dataset, protocol, gallery), "")
    usual = config.gallery in ("", "real", "extended_photo", "images")  # each dataset has one of them
    same = (usual and not config.per_class and config.holdback == 0.08 and not config.file_lists
            and (protocol != "UdCDR" or config.ud_gallery == "trained")  # D7
            and (config.dataset != "sketchy" or config.sketchy_split == "eccv"))
    return text if text and same and file_digest(config.weights) == OPENAI_SHA256["ViT-B-32.pt"] else ""


def table(rows: list[dict[str, Any]], config: Config) -> str:
    """The rows as text, percentages, with the paper's numbers under the row they belong to."""
    titles = " ".join(f"{name:>9}" for name in COLUMNS)
    lines = [f"{'protocol':<9} {'query':<11} {'gallery':<8} {'method':<24} {titles}  queries x gallery"]
    key = itemgetter("protocol", "query_domain", "gallery_name")
    for (protocol, domain, gallery), group in groupby(rows, key):
        for row in group:
            numbers = " ".join(f"{100 * row[name]:9.2f}" for name in COLUMNS)
            remarks = {f"{row['queries']} x {row['gallery']}": True, "transductive": row["transductive"],
                       f"k cut to {row['k_used']}": row["k_used"] < row["k"],
                       f"{row['unreadable']} unreadable images left out": row["unreadable"],
                       f"{row['no_relevant']} queries without a relevant image": row["no_relevant"]}
            told = "; ".join(remark for remark, holds in remarks.items() if holds)
            lines.append(f"{protocol:<9} {plain(domain):<11} {gallery:<8} {plain(row['method']):<24} "
                         f"{numbers}  {told}")
        if text := published(config, protocol, gallery):
            lines.append(f"          published (ViT-B/32): {text}")
    return "\n".join(lines)
