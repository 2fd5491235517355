"""Rows of the table on real images that train nothing: each image passes a tower once, all else is arithmetic
on features.

Zero-shot CLIP, its domain subspace removed, the closed form, and any trained adapter with the closed form of
its own features: each as it is (inductive) and centred (transductive). Zero-shot CLIP also centred by the
means of other classes' images: the gallery loses the mean of its domain's training images, the queries that
of a source domain's (`--seen`), so nothing is taken from the test. lambda is chosen on the validation
classes, never on test classes.
"""
from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip.weights import file_digest, load_clip
from ..config import Config
from ..data.benchmarks import Protocol, build_protocol
from ..data.features import FeatureCache, load_index
from ..experiments.experiment import restore
from ..experiments.retrieval import behind_form, features_of, label_ids, score, validation_score, zero_shot
from ..ucdr.closed_form import ClosedForm, Measured, center, choose_strength, feature_mean, measure

METRICS = ("mAP@200", "mAP@all", "Prec@100")
BY_TRAINING_MEANS = "zero-shot, centred by means of other classes"


def stored(method: Any, config: Config, key: str, cache: Path) -> FeatureCache:
    """Features of all images of the config's domains, kept in `cache` for `key`: each is encoded once."""
    table, root = features_of(method, config), Path(config.data_root)
    others = [path.name for path in root.iterdir() if path.name not in config.domains]
    index = load_index(root, table.extractor, key, cache, without=others)
    table.rows |= zip(map(index.path, range(len(index.paths))), index.features)
    return table


def frozen_rows(config: Config, out: Path, device: torch.device) -> list[dict[str, Any]]:
    """Rows of zero-shot CLIP, subspace removal and closed form for the config's held-out domain."""
    method = zero_shot(config, load_clip(config.weights).to(device))
    return rows_of("zero-shot", stored(method, config, file_digest(config.weights), out / "cache"), config)


def adapter_rows(folder: Path, out: Path, device: torch.device, form: bool) -> list[dict[str, Any]]:
    """Rows of a finished run's adapter, those it wrote itself; with `form`, also of the closed form of its
    features, which costs a pass of all images.
    """
    if not form:
        return written_rows(folder)
    config, method, _ = restore(folder, {}, device)
    key = file_digest(folder / "best.pt")
    return rows_of("ucdr-adapter", stored(method, config, key, out / "cache"), config)


def written_rows(folder: Path) -> list[dict[str, Any]]:
    """The adapter's rows of a run's results.json, as `rows_of` has them."""
    results = json.loads((folder / "results.json").read_text())
    config, found = results["config"], []
    for transductive in (False, True):
        mine = {row["gallery_name"]: row for row in results["rows"] if row["protocol"] == "UCDR"
                and row["method"].startswith("ucdr-adapter") and row["transductive"] == transductive}
        if mine:  # there is no centred row of few classes
            found.append({"held_out": config["held_out"], "seed": config["seed"], "method": "ucdr-adapter",
                          "transductive": transductive, "lambda": None,
                          **{gallery: in_per_cent(mine[gallery]) for gallery in ("unseen", "mixed")}})
    return found


def in_per_cent(numbers: dict[str, Any]) -> dict[str, float]:
    return {metric: round(100 * numbers[metric], 3) for metric in METRICS}


def training_mean(table: FeatureCache, protocol: Protocol, domain: str) -> Tensor:
    """`feature_mean` of a domain's training images, which are of other classes than the queries."""
    train = protocol.train
    return feature_mean(table.encode(train.keep([i for i, d in enumerate(train.domains) if d == domain])))


def fit(table: FeatureCache, protocol: Protocol) -> tuple[Measured, float]:
    """Everything of a closed form, and the lambda that the validation classes choose."""
    z = table.encode(protocol.train)
    class_ids, domain_ids = (ids.to(z.device) for ids in label_ids(protocol, protocol.train))
    measured = measure(z, class_ids, domain_ids, len(protocol.domain_names))
    return measured, choose_strength(
        measured, lambda form: validation_score(behind_form(table, form), protocol))


def rows_of(name: str, table: FeatureCache, config: Config) -> list[dict[str, Any]]:
    """Numbers in per cent of the method `name`, whose features `table` holds, and of its closed forms, for
    queries of the held-out domain.
    """
    protocol = build_protocol(replace(config, selection="validation"))
    test = next(test for test in protocol.tests if test.protocol == "UCDR")
    start = time.process_time()
    measured, strength = fit(table, protocol)
    seconds = time.process_time() - start
    identity = torch.eye(len(measured.mean), device=measured.mean.device)
    removed = ClosedForm(measured.mean, measured.subspace, identity)
    methods = {name: table.encode, f"{name}, subspace removed": behind_form(table, removed),
               f"{name}, closed form": behind_form(table, measured.form(strength))}
    features = {title: [encode(files) for files in (test.query, *test.galleries.values())]
                for title, encode in methods.items()}
    rows = [(title, centred, [center(z) for z in parts] if centred else parts)
            for title, parts in features.items() for centred in (False, True)]
    if name == "zero-shot":
        query, *galleries = features[name]
        means = [training_mean(table, protocol, domain) for domain in (config.seen, config.gallery)]
        rows.append((BY_TRAINING_MEANS, False, [center(query, means[0]),
                                                *(center(gallery, means[1]) for gallery in galleries)]))
    found = []
    for title, centred, (query, *galleries) in rows:
        numbers = {where: in_per_cent(score(query, gallery, test.query, files)[0])
                   for (where, files), gallery in zip(test.galleries.items(), galleries, strict=True)}
        found.append({"held_out": config.held_out, "seed": config.seed, "method": title,
                      "transductive": centred,
                      "lambda": strength if title.endswith("closed form") else None, **numbers,
                      "train_images": len(protocol.train), "fit_cpu_seconds": round(seconds, 2)})
    return found
