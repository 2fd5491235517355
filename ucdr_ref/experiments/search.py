"""Searching a folder of images, with the features of a finished run or of zero-shot CLIP.

Queries are images or texts. The gallery is encoded once, later only what is new in it (`data.features`).
"""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import metrics
from ..cli import digest_of, write_atomic
from ..clip.tokenizer import tokenize
from ..clip.weights import file_digest, load_clip
from ..clip.zero_shot import ZeroShot
from ..config import Config, from_dict, locate_weights
from ..data.features import EVAL_BATCH, Extractor, Index, load_index
from ..data.images import Files, split_indices
from ..distributed import one_process, pick_device, set_precision
from ..ucdr.closed_form import center, feature_mean
from .experiment import restore
from .report import SOFTWARE, Shown, contact_sheet, write_png

OTHERS = "name another --run, or --weights without --run for zero-shot CLIP"


class Model(NamedTuple):
    """What encodes images, and perhaps texts."""

    title: str
    config: Config
    extractor: Extractor
    key: str  # of its indexes


def load_model(run: Path | None, overrides: Mapping[str, Any], force: bool = False) -> Model:
    """The best model of a run, or without one zero-shot CLIP of the weights in `overrides`.

    Raises as `restore` and `load_clip`; ValueError where features depend on their neighbours.
    """
    one_process("a search")
    device, method, digests = pick_device(overrides.get("device", "auto")), None, []
    if run:
        config, method, state = restore(run, overrides, device, force)
        if config.method == "sre-clip" and config.test_attention == "batch":  # S2
            raise ValueError(f"{run} has --test-attention batch (--variant released): the images beside it "
                             f"change an image's features, so it cannot search; {OTHERS}")
        title, digests = f"run {run}", [file_digest(run / "best.pt")]
        if file_digest(config.weights) != state["weights_sha256"]:
            title += f", with {config.weights} in place of its own weights"
    else:
        config = from_dict({**overrides, "method": "zero-shot", "data_root": ""})
        config = replace(config, weights=locate_weights(config.weights))
        title, method = f"zero-shot CLIP of {config.weights}", ZeroShot(load_clip(config.weights).to(device))
    set_precision(config.precision)
    extractor = Extractor(method, device, config.precision, config.workers, config.stroke_domains)
    return Model(title, config, extractor, digest_of([*digests, file_digest(config.weights)]))


def own_gallery(config: Config) -> Path:
    """The folder that a run's own tests search; ValueError where the config names none that is here."""
    domain = config.gallery or ("real" if config.dataset in ("toy", "domainnet") else "")
    folder = config.target or (os.path.join(config.data_root, domain) if domain and config.data_root else "")
    if not os.path.isdir(folder):
        missing = f" ({folder} is no folder)" if folder else ""
        raise ValueError(f"which images should be searched{missing}? give their folder as --gallery DIR")
    return Path(folder)


def search(model: Model, gallery: Path, images: Sequence[str], texts: Sequence[str], k: int, cache: Path,
           invert: str = "auto", like: Path | None = None) -> tuple[Index, dict[str, Any]]:
    """The k nearest gallery images of each query: the index that was searched, and what --json prints.

    invert: `none`, or `auto` for what lies in a folder of a stroke domain or looks like strokes (nothing, for
    a run without stroke domains). like: a folder of images of the queries' kind and of many classes; the
    queries then lose its mean, and the gallery its own. Raises ValueError for an unreadable query and for
    texts that cannot be compared with images, and as `load_index`.
    """
    if like and texts:
        raise ValueError(f"--center {like}: the mean of images is none of --text; leave out one of the two")
    if not set(model.config.stroke_domains) - {"none"}:
        invert = "none"
    parts: list[Tensor] = []
    answers: list[dict[str, Any]] = []
    if images:
        found, flags = encode_images(model, images, invert)
        if like:
            mean = feature_mean(load_index(like, model.extractor, model.key, cache, invert).features)
            found = center(found, mean)
        parts.append(found)
        answers += [{"query": path, "kind": "image", "inverted": flag} for path, flag in zip(images, flags)]
    if texts:
        parts.append(encode_texts(model, texts))
        answers += [{"query": text, "kind": "text", "inverted": False} for text in texts]
    index = load_index(gallery, model.extractor, model.key, cache, invert)
    if like:
        index = replace(index, features=center(index.features))
    if answers:
        distances, nearest = metrics.search(torch.cat(parts), index.features, min(k, len(index.paths)))
        for answer, *hits in zip(answers, distances.tolist(), nearest.tolist()):
            answer["results"] = [{"path": index.path(i), "distance": x, "inverted": bool(index.inverted[i])}
                                 for x, i in zip(*hits)]
    return index, {
        "model": model.title, "gallery": str(gallery), "images": len(index.paths), "encoded": index.encoded,
        "inverted": int(index.inverted.sum()), "unreadable": index.unreadable,
        "centred": f"queries less the mean of {like}, gallery less its own" if like else "",
        "queries": answers}


def encode_images(model: Model, paths: Sequence[str], invert: str) -> tuple[Tensor, list[bool]]:
    """Features [q, e] of query images, and which were inverted."""
    domains = [Path(path).absolute().parent.parent.name for path in paths]  # <domain>/<class>/<image>
    files, batches = Files(list(paths), list(paths), domains), split_indices(len(paths), EVAL_BATCH)
    found = [(rows.cpu(), flags) for _, rows, flags in model.extractor.stream(files, batches, invert)]
    features, inverted = (torch.cat(part) for part in zip(*found))
    return features, inverted.tolist()


def encode_texts(model: Model, texts: Sequence[str]) -> Tensor:
    """CLIP's features [q, e] of the texts as they are, L2-normalised; L-align pulls an adapter's to these."""
    config, clip = model.config, model.extractor.method.clip
    if config.method not in ("zero-shot", "ucdr-adapter") or config.evaluation_features != "normalized":
        raise ValueError(f"{model.title}: not CLIP's features at unit length, so --text cannot search them; "
                         f"{OTHERS}")
    clip.require_text()
    with torch.no_grad():
        ids = tokenize(list(texts), clip.context_length).to(model.extractor.device)
        return F.normalize(clip.encode_text(ids).float(), dim=-1).cpu()


def as_text(found: Mapping[str, Any]) -> str:
    """What a terminal shows of what --json prints."""
    counts = {"encoded now": found["encoded"], "inverted as strokes": found["inverted"],
              "unreadable": len(found["unreadable"])}
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    lines = [found["model"], ", ".join([f"{found['images']} images in {found['gallery']}", *notes])]
    lines += [f"left out: {sentence}" for sentence in found["unreadable"]]
    lines += [f"centred: {found['centred']}"] * bool(found["centred"])
    for answer in found["queries"]:
        lines += ["", f"{answer['query']}{' (inverted)' * answer['inverted']}"]
        lines += [f"{rank:4d}  {hit['distance']:.4f}  {hit['path']}{' (inverted)' * hit['inverted']}"
                  for rank, hit in enumerate(answer["results"], 1)]
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The contact sheet of the answers, inverted images as the model saw them. Raises OSError."""
    sheet = []
    for answer in found["queries"]:
        file, caption = (answer["query"], "") if answer["kind"] == "image" else ("", answer["query"])
        sheet.append((Shown(file, caption, None, answer["inverted"]),
                      [Shown(hit["path"], f"{hit['distance']:.3f}", None, hit["inverted"])
                       for hit in answer["results"]]))
    write_png(contact_sheet(sheet), path)


def export(index: Index, path: Path) -> None:
    """The vectors, float32 [g, e], as .npy; beside it .paths.txt, a row's path a line. Raises OSError."""
    names = [os.fsencode(name) + b"\n" for name in index.paths]
    write_atomic(path, lambda file: np.save(file, index.features.numpy()))
    write_atomic(path.with_suffix(".paths.txt"), lambda file: file.writelines(names))


def check_output(flag: str, path: Path, ending: str, inputs: Sequence[Path]) -> None:
    """ValueError for another ending, a missing folder, a place among the inputs, a file of someone else."""
    if path.suffix != ending or not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: expected a name with the ending {ending} in a folder that exists")
    if {path.resolve(), *path.resolve().parents} & {file.resolve() for file in inputs}:
        raise ValueError(f"{flag} {path}: is, or lies among, the images of this search; name another place")
    if path.exists() and not is_output(path):
        raise ValueError(f"{flag} {path}: there is a file that no earlier search wrote; name another place")


def is_output(path: Path) -> bool:
    """Whether a search wrote a file: sheets bear a mark, and vectors have their paths beside them."""
    if path.suffix == ".npy":
        return path.with_suffix(".paths.txt").exists()
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except OSError:
        return False
