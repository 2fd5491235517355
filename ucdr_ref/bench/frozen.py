"""Rows of the table on real images that train nothing: each image passes a tower once, all else is arithmetic
on features.

Zero-shot CLIP, its domain subspace removed, the closed form, and any trained adapter with the closed form of
its own features: each as it is (inductive) and centred (transductive). lambda is chosen on the validation
classes, never on test classes.
"""
from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip.weights import file_digest, load_clip
from ..clip.zero_shot import ZeroShot
from ..config import Config
from ..experiments import protocols
from ..experiments.experiment import restore
from ..experiments.ranking import FeatureTable, Rows, formed, score, validation_score
from ..experiments.retrieval import measured_form
from ..images.batches import Files
from ..images.features import Extractor
from ..machine.files import load_state, save_atomic
from ..ucdr.closed_form import ClosedForm, choose_strength

METRICS = ("mAP@200", "mAP@all", "Prec@100")
BLOCK = 512  # images between two saves


class Stored(FeatureTable):
    """Features that also lie in a file, for `key`: what was encoded once is not encoded again. Counts its
    CPU-seconds.
    """

    def __init__(self, extractor: Extractor, path: Path, key: str) -> None:
        super().__init__(extractor)
        self.path, self.key, self.cpu_seconds = path, key, 0.0
        self.others: list[tuple[str, bool, Tensor]] = []  # strokes that were encoded the other way round
        if path.exists() and (state := load_state(path))["key"] == key:
            for file, inverted, row in zip(state["paths"], state["inverted"], state["features"]):
                if inverted == self.inverted(file):
                    self.rows[file] = row
                else:
                    self.others.append((file, inverted, row))
            self.cpu_seconds = state["cpu_seconds"]

    def inverted(self, path: str) -> bool:
        """Whether an image `<domain>/<class>/<image>` is colour-inverted (D14)."""
        return Path(path).parts[-3] in self.extractor.options.stroke_domains

    def of(self, files: Files) -> tuple[Tensor, Files]:
        new = [i for i, path in enumerate(files.paths) if path not in self.rows]
        for start in range(0, len(new), BLOCK):
            before = time.process_time()
            super().of(files.keep(new[start:start + BLOCK]))
            self.cpu_seconds += time.process_time() - before
            kept = [(path, self.inverted(path), row) for path, row in self.rows.items() if row is not None]
            names, flags, rows = zip(*kept, *self.others)
            save_atomic({"key": self.key, "cpu_seconds": self.cpu_seconds, "paths": list(names),
                         "inverted": list(flags),
                         "features": torch.stack(rows)}, self.path)
            print(f"{self.path.name}: {len(self.rows)} images, {self.cpu_seconds:.0f} CPU-s", flush=True)
        return super().of(files)


def frozen_rows(config: Config, weights: Path, out: Path, device: torch.device,
                form: bool = True) -> list[dict[str, Any]]:
    """Rows of zero-shot CLIP and, with `form`, of subspace removal and closed form for the config's held-out
    domain.
    """
    # bf16, that of --subset cpu, has the name that every precision once had
    path = out / ("clip.pt" if config.precision == "bf16" else f"clip-{config.precision}.pt")
    method = ZeroShot(load_clip(weights).to(device))
    key = f"{file_digest(weights)} {config.precision}"
    return rows_of({"zero-shot": Stored(Extractor(method, config, device), path, key)}, config, form)


def adapter_rows(folder: Path, device: torch.device, form: bool) -> list[dict[str, Any]]:
    """Rows of a finished run's adapter, those it wrote itself unless its features are at hand; with `form`,
    also of the closed form of its features, which costs a pass of all training images.
    """
    if not form and not (folder / "features.pt").exists():
        return written_rows(folder)
    config, method, _ = restore(folder, {}, device)
    key = file_digest(folder / "best.pt")
    return rows_of({"ucdr-adapter": Stored(Extractor(method, config, device), folder / "features.pt", key)},
                   config, form)


def written_rows(folder: Path) -> list[dict[str, Any]]:
    """The adapter's rows of a run's results.json, as `rows_of` has them."""
    results = json.loads((folder / "results.json").read_text())
    found = []
    for transductive in (False, True):
        mine = {row["gallery_name"]: row for row in results["rows"] if row["protocol"] == "UCDR"
                and row["method"].startswith("ucdr-adapter") and row["transductive"] == transductive}
        numbers = {gallery: {metric: round(100 * mine[gallery][metric], 3) for metric in METRICS}
                   for gallery in ("unseen", "mixed")}
        config = results["config"]
        found.append({"held_out": config["held_out"], "seed": config["seed"], "method": "ucdr-adapter",
                      "transductive": transductive, "lambda": None, **numbers})
    return found


def rows_of(tables: Mapping[str, Stored], config: Config, form: bool = True) -> list[dict[str, Any]]:
    """Numbers in points of 100 of each method of `tables` and of its closed forms, for queries of the
    held-out domain.
    """
    protocol = protocols.build(replace(config, selection="validation"))
    test = next(test for test in protocol.tests if test.protocol == "UCDR")
    assert protocol.validation is not None and protocol.selected is not None
    found = []
    for name, table in tables.items():
        methods: dict[str, Rows] = {name: table.of}
        strength, seconds = None, 0.0
        if form:
            for files in (protocol.train, protocol.validation.query,
                          *protocol.validation.galleries.values()):
                table.of(files)  # the one pass, before the clock runs
            start = time.process_time()
            measured = measured_form(protocol, table)
            strength = choose_strength(measured, lambda tried,
                                       table=table: validation_score(  # type: ignore[misc]
                formed(table, tried), protocol.validation, protocol.selected))
            seconds = time.process_time() - start
            identity = torch.eye(len(measured.mean))
            removed = ClosedForm(measured.mean, measured.subspace, identity.to(measured.mean.device))
            methods |= {f"{name}, subspace removed": formed(table, removed),
                        f"{name}, closed form": formed(table, measured.form(strength))}
        for title, rows in methods.items():
            for center in (False, True):
                scored = score(rows, test, center)
                numbers = {gallery: {metric: round(100 * scored[gallery]["metrics"][metric], 3)
                                     for metric in METRICS}
                           for gallery in ("unseen", "mixed")}
                found.append({"held_out": config.held_out, "seed": config.seed, "method": title,
                              "transductive": center,
                              "lambda": strength if title.endswith("closed form") else None, **numbers,
                              "train_images": len(protocol.train), "fit_cpu_seconds": round(seconds, 2),
                              "encode_cpu_seconds": round(table.cpu_seconds, 1),
                              "encoded": len(table.rows) + len(table.others)})
    return found
