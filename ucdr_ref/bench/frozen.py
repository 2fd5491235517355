"""Rows of the table on real images that train nothing: arithmetic on features of zero-shot CLIP."""
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..clip.weights import file_digest, load_clip
from ..clip.zero_shot import ZeroShot
from ..config import Config
from ..data.benchmarks import Protocol, build_protocol
from ..data.features import FeatureCache, load_index
from ..data.folders import list_images
from ..data.images import Files
from ..distributed import pick_device
from ..experiments.retrieval import Encode, behind_form, fit_closed_form, rank
from ..ucdr.closed_form import center, feature_mean

STROKES = ("sketch", "quickdraw")
METRICS = ("mAP@200", "mAP@all", "Prec@100")
BY_SOURCES = "zero-shot, centred by the sources"
Row = dict[str, Any]


def numbers_of(rows: list[Row], **about: Any) -> list[Row]:
    """Rows of retrieval's evaluation of UCDR -> one for each method, in %, both galleries in it."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["protocol"] == "UCDR":
            method = row["method"].removesuffix(", centred")
            one = found.setdefault(row["method"], {**about, "method": method,
                                                   "transductive": row["transductive"]})
            one[row["gallery_name"]] = {metric: round(100 * row[metric], 3) for metric in METRICS}
    return list(found.values())


def encode_all(data: Path, weights: Path, cache: Path, config: Config) -> dict[str, FeatureCache]:
    """{inversion: features of all images of the config's domains}, each encoded once and kept in `cache`."""
    method = ZeroShot(load_clip(weights).to(pick_device("auto")))
    key = f"zero-shot {file_digest(weights)}"
    rows: dict[str, dict[str, Tensor]] = {}
    for strokes in ((), STROKES):
        inverting = replace(config, stroke_domains=strokes)
        wanted = strokes or config.domains
        files = [file for file in list_images(str(data)) if Path(file[0]).parts[0] in wanted]
        index = load_index(data, method, inverting, key, cache, files=files)
        rows["strokes" if strokes else "none"] = {
            os.path.join(data, path): row for path, row in zip(index.paths, index.features)}
    rows["strokes"] = rows["none"] | rows["strokes"]
    return {name: FeatureCache(method, config, found) for name, found in rows.items()}


def frozen_rows(config: Config, features: FeatureCache) -> list[Row]:
    """Zero-shot CLIP and the closed form, as they are and centred, and CLIP centred by the sources.

    lambda is chosen on the validation classes, never on test classes.
    """
    protocol = build_protocol(config)
    form, strength = fit_closed_form(config, protocol, features)
    methods = {"zero-shot": features.encode, "zero-shot, closed form": behind_form(features, form),
               BY_SOURCES: centred_by_sources(features, protocol, config.seen)}
    rows = [row for row in rank(methods, protocol.tests[:1])
            if row["method"] != f"{BY_SOURCES}, centred"]
    found = numbers_of(rows, held_out=config.held_out, seed=config.seed, precision=config.precision,
                       train_images=len(protocol.train))
    return [{**row, "lambda": strength if row["method"].endswith("form") else None} for row in found]


def centred_by_sources(features: FeatureCache, protocol: Protocol, seen: str) -> Encode:
    """Each set loses the mean of training images, whose classes are others (inductive): the gallery that of
    its own domain, the queries that of the source domain `seen`.
    """
    train, gallery = protocol.train, protocol.gallery_domain
    means = {}
    for domain in (gallery, seen):
        files = train.keep([i for i, name in enumerate(train.domains) if name == domain])
        means[domain] = feature_mean(features.encode(files))

    def encode(files: Files) -> Tensor:
        return center(features.encode(files), means[gallery if files.domains[0] == gallery else seen])

    return encode
