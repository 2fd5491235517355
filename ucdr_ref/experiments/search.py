"""Searching a folder of images with the features of a finished run, or of CLIP as it is.

Queries are images or texts. The folder is encoded once (`images.cache`), under a key that holds all that
shapes its features: digests of the weights that were loaded and of best.pt, precision, reading, inversion.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics
from ..clip.tokenizer import tokenize
from ..clip.weights import file_digest
from ..clip.zero_shot import ZeroShot
from ..config import Config, from_dict, located
from ..images.cache import EncodePaths, Index, build_index
from ..images.features import Extractor
from ..machine.files import digest_of
from ..machine.processes import one_process, pick_device
from ..ucdr.adapter import UCDRAdapter
from ..ucdr.closed_form import center, feature_mean
from .contract import Method
from .experiment import load_tower, restore
from .report import Shown, plain, sheet

FEW = 5  # queries whose mean tells something about their kind


class Model(NamedTuple):
    """What encodes images, and perhaps texts."""

    title: str
    config: Config
    method: Method
    device: torch.device
    digests: tuple[str, str]  # of best.pt, empty for CLIP as it is, and of the weights

    def encoder(self, invert: str) -> EncodePaths:
        """Of paths; the last column of the features tells which images were inverted.

        "auto" inverts nothing for a run that inverted nothing.
        """
        if invert == "auto" and not {*self.config.stroke_domains}.difference(["none"]):
            invert = "no"
        return Extractor(self.method, self.config, self.device).of_paths(invert, flags=True)


def run_model(folder: Path, overrides: dict[str, Any], verify: bool = True,
              other_weights: bool = False) -> Model:
    """The best model of a finished run. Raises as `experiment.restore`."""
    device = pick_device(overrides.get("device", "auto"))
    config, method, _ = restore(folder, overrides, device, verify, other_weights)
    digests = file_digest(folder / "best.pt"), file_digest(config.weights)
    return Model(f"run {folder}", config, method, device, digests)


def clip_model(overrides: dict[str, Any], verify: bool = True) -> Model:
    """Zero-shot CLIP of the weights in `overrides`. Raises as `load_clip`."""
    config = from_dict({"method": "zero-shot", **overrides, "weights": located(overrides["weights"])})
    device = pick_device(config.device)
    method = ZeroShot(load_tower(config, verify, device))
    digests = "", file_digest(config.weights)
    return Model(f"zero-shot CLIP of {config.weights}", config, method, device, digests)


def own_gallery(config: Config) -> Path:
    """The folder that a run's own tests search; ValueError where the config does not name it."""
    if config.target:
        return Path(config.target)
    domain = config.gallery or ("real" if config.dataset in ("toy", "domainnet") else "")
    if not domain or not config.data_root:
        raise ValueError("which images should be searched? give their folder as --gallery DIR")
    return Path(config.data_root) / domain


def encode_folder(model: Model, folder: Path, invert: str, cache: Path) -> tuple[Index, np.ndarray]:
    """The index of a folder, and which of its images were inverted, bool [g]. Raises as `build_index`."""
    config = model.config
    made_of = [*model.digests, config.precision, config.image_reading, invert]
    index = build_index(folder, model.encoder(invert), digest_of(made_of), cache, config.bad_images)
    return replace(index, features=index.features[:, :-1]), index.features[:, -1] > 0


def encode_images(model: Model, paths: Sequence[str], invert: str) -> tuple[Tensor, list[bool]]:
    """Features [q, e] of query images and which were inverted; ValueError for one that cannot be read."""
    found = list(model.encoder(invert)(list(paths)))
    if unread := sorted(set(range(len(paths))).difference(*(indices.tolist() for indices, _ in found))):
        raise ValueError(f"{paths[unread[0]]}: not a readable query image; name another one")
    rows = torch.cat([features for _, features in found]).cpu()
    return rows[:, :-1], (rows[:, -1] > 0).tolist()


def encode_texts(model: Model, texts: Sequence[str]) -> Tensor:
    """CLIP's features [q, e] of the texts as they are, L2-normalised.

    A trained adapter is searched by them too, since L-align pulled its features towards text. ValueError
    where features are elsewhere (SRE-CLIP, a closed form) or of other lengths, and without a text tower.
    """
    method, clip = model.method, model.method.clip
    if not isinstance(method, (ZeroShot, UCDRAdapter)) or model.config.evaluation_features != "normalized":
        raise ValueError(f"the features of {model.title} are not in CLIP's space at unit length, so --text "
                         "cannot search them; name --weights alone for CLIP, or --query images")
    clip.require_text()
    with torch.no_grad():
        ids = tokenize(list(texts), clip.context_length).to(model.device)
        return F.normalize(clip.encode_text(ids).float(), dim=-1).cpu()


def search(model: Model, gallery: Path, images: Sequence[str], texts: Sequence[str], k: int, cache: Path,
           invert_query: str, invert_gallery: str, centre: bool,
           like: Path | None) -> tuple[Index, dict[str, Any]]:
    """The k nearest images of a gallery folder to each query image and text: the index with the features that
    were searched, and what --json prints.

    centre (transductive): the gallery loses its mean, query images that of the folder `like` or, as texts
    do, their own when they are FEW or more. Raises ValueError for fewer, and as those above.
    """
    one_process("a search")
    if like and not centre:
        raise ValueError(f"--queries-like {like}: a mean to remove, which needs --center as well")
    for what, asked in (("texts or more", texts),
                        ("query images or more, or --queries-like DIR", () if like else images)):
        if centre and 0 < len(asked) < FEW:
            raise ValueError(f"--center needs {FEW} {what}, to know their mean; got {len(asked)}")
    features: list[Tensor] = []
    answers: list[dict[str, Any]] = []
    about = ["the gallery less its mean"] if centre else []
    if images:
        found, flags = encode_images(model, images, invert_query)
        mean, whose = None, f"these {len(images)}"
        if centre and like:
            others, _ = encode_folder(model, like, invert_query, cache)
            mean, whose = feature_mean(rows(others)), f"{len(others.paths)} images in {like}"
        if centre:
            about.append(f"query images less the mean of {whose}")
            found = center(found, mean)
        features.append(found)
        answers += [{"query": path, "kind": "image", "inverted": flag} for path, flag in zip(images, flags)]
    if texts:
        found = encode_texts(model, texts)
        if centre:
            about.append(f"texts less the mean of these {len(texts)}")
            found = center(found)
        features.append(found)
        answers += [{"query": text, "kind": "text", "inverted": False} for text in texts]
    index, inverted = encode_folder(model, gallery, invert_gallery, cache)
    if centre:
        index = replace(index, features=center(rows(index)).numpy())
    if answers:
        distances, nearest = metrics.search(torch.cat(features), index.features, k)
        for answer, lengths, places in zip(answers, distances.tolist(), nearest.tolist()):
            answer["results"] = [{"path": index.path(j), "distance": length, "inverted": bool(inverted[j])}
                                 for j, length in zip(places, lengths)]
    count = len(index.paths)
    return index, {
        "model": model.title, "gallery": str(gallery), "images": count, "encoded": index.encoded,
        "cached": count - index.encoded, "skipped": len(index.skipped), "inverted": int(inverted.sum()),
        "unreadable": index.skipped, "centred": "; ".join(about), "queries": answers}


def rows(index: Index) -> Tensor:
    return torch.from_numpy(np.array(index.features))


def draw(found: dict[str, Any], path: Path) -> None:
    """The contact sheet of the answers, inverted images as the model saw them. Raises as `report.sheet`."""
    pictures = []
    for answer in found["queries"]:
        query = Shown(answer["query"], "query", None, answer["inverted"])
        if answer["kind"] == "text":
            query = Shown("", answer["query"])
        hits = [Shown(hit["path"], f"{hit['distance']:.3f}", None, hit["inverted"])
                for hit in answer["results"]]
        pictures.append((query, hits))
    sheet(pictures, path)


def as_text(found: dict[str, Any]) -> str:
    """What a terminal shows; names and texts without what does not print."""
    told = {"encoded": "encoded now", "cached": "from the cache", "skipped": "unreadable",
            "inverted": "inverted as strokes"}
    notes = ", ".join(f"{found[name]} {words}" for name, words in told.items() if found[name])
    lines = [plain(found["model"]), f"{found['images']} images in {plain(found['gallery'])}: {notes}"]
    if found["centred"]:
        lines.append(f"centred (transductive): {plain(found['centred'])}")
    for answer in found["queries"]:
        kind = " (text)" if answer["kind"] == "text" else " (inverted)" if answer["inverted"] else ""
        lines += ["", plain(answer["query"]) + kind]
        for rank, hit in enumerate(answer["results"], 1):
            mark = " (inverted)" if hit["inverted"] else ""
            lines.append(f"{rank:4d}  {hit['distance']:.4f}  {plain(hit['path'])}{mark}")
    return "\n".join(lines)
