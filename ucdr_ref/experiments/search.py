"""Searching a folder of images, with the features of a finished run or of zero-shot CLIP."""
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..cli import digest_of, write_atomic
from ..clip.weights import file_digest, load_clip
from ..clip.zero_shot import ZeroShot, text_features
from ..config import from_dict, locate_weights
from ..data.features import Index, load_index, stream_features
from ..data.images import Files
from ..distributed import one_process, pick_device, set_precision
from ..ucdr.closed_form import center, feature_mean
from .experiment import restore
from .report import SOFTWARE, Shown, contact_sheet

OTHERS = "name another --run, or --weights without --run for zero-shot CLIP"


def search(run: Path | None, gallery: Path | None, images: list[str], texts: list[str], k: int,
           like: Path | None, invert: str, outputs: Sequence[Path], cache: Path, force: bool,
           overrides: Mapping[str, Any]) -> tuple[Index, dict[str, Any]]:
    """The index of the gallery, and what --json prints: the k nearest images of each query.

    run: None for zero-shot CLIP of the overrides' `weights`; gallery: None for the run's own; like: images of
    the queries' kind whose mean they lose, as the gallery loses its own. Raises ValueError for features that
    depend on their neighbours or that texts cannot search, and as `restore`, `check_output`, `load_index`.
    """
    one_process("a search")
    device = pick_device(overrides.get("device", "auto"))
    if run:
        config, method, _ = restore(run, overrides, device, force)
        if config.method == "sre-clip" and config.test_attention == "batch":  # S2
            raise ValueError(f"{run}: --test-attention batch makes features depend on others; {OTHERS}")
        title, model_files = f"run {run}, CLIP of {config.weights}", [config.weights, str(run / "best.pt")]
    else:
        weights = locate_weights(overrides["weights"])
        config = from_dict({**overrides, "weights": weights, "method": "zero-shot", "data_root": ""})
        method = ZeroShot(load_clip(weights).to(device))
        title, model_files = f"zero-shot CLIP of {weights}", [weights]
    elsewhere = config.method in ("sre-clip", "closed-form") or config.evaluation_features != "normalized"
    if texts and elsewhere:
        raise ValueError(f"--text cannot search features other than CLIP's normalized ones; {OTHERS}")
    gallery = gallery or Path(config.target or os.path.join(config.data_root, config.gallery or "real"))
    if not gallery.is_dir():
        raise ValueError(f"{gallery} is no folder of images to search; give one as --gallery DIR")
    for path in outputs:
        check_output(path, [gallery, like or gallery, *map(Path, images)])
    set_precision(config.precision)
    if set(config.stroke_domains) <= {"none"}:  # the model has seen no inverted image
        invert = "none"
    key = digest_of([file_digest(file) for file in model_files])
    parts, answers, unreadable = list[Tensor](), list[dict[str, Any]](), list[str]()
    if images:
        domains = [Path(path).absolute().parent.parent.name for path in images]  # <domain>/<class>/<image>
        queries = Files(images, domains, domains)
        for rows, features, inverted in stream_features(method, config, queries, invert):
            parts.append(features)
            answers += [{"query": images[i], "kind": "image", "inverted": flag}
                        for i, flag in zip(rows, inverted.tolist())]
    if texts:
        parts.append(text_features(method.clip, texts).cpu())  # L-align pulls an adapter's to these
        answers += [{"query": text, "kind": "text", "inverted": False} for text in texts]
    load = partial(load_index, method=method, config=config, key=key, cache=cache, invert=invert,
                   unreadable=unreadable)
    index = load(gallery)
    if like:
        mean = feature_mean(load(like).features)
        parts = [center(features, mean) for features in parts]
        index = replace(index, features=center(index.features))
        title += f"; queries centred by {like}, gallery by itself"
    if answers:
        distances, nearest = metrics.search(torch.cat(parts), index.features, k)
        for answer, *found in zip(answers, distances.tolist(), nearest.tolist()):
            answer["results"] = [{"path": index.path(i), "distance": distance} for distance, i in zip(*found)]
    return index, {
        "model": title, "gallery": str(gallery), "images": len(index.paths), "encoded": index.encoded,
        "inverted": int(index.inverted.sum()), "unreadable": unreadable, "queries": answers}


def as_text(found: Mapping[str, Any]) -> str:
    """What a terminal shows of what --json prints."""
    lines = [found["model"], f"{found['images']} images in {found['gallery']}: {found['encoded']} encoded "
             f"now, {found['inverted']} inverted as strokes, {len(found['unreadable'])} unreadable",
             *(f"left out: {sentence}" for sentence in found["unreadable"])]
    for answer in found["queries"]:
        lines += ["", answer["query"] + " (inverted)" * answer["inverted"]]
        lines += [f"{rank:4d}  {hit['distance']:.4f}  {hit['path']}"
                  for rank, hit in enumerate(answer["results"], 1)]
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The contact sheet of the answers. Raises OSError."""
    sheet = []
    for answer in found["queries"]:
        text, image = answer["query"], answer["kind"] == "image"
        query = Shown(text, Path(text).name) if image else Shown("", text)
        sheet.append((query, [Shown(hit["path"], f"{hit['distance']:.3f} {Path(hit['path']).name}")
                              for hit in answer["results"]]))
    picture = contact_sheet(sheet)
    write_atomic(path, lambda file: file.write(picture))


def export(index: Index, path: Path) -> None:
    """The vectors, float32 [g, e], as .npy; beside it .paths.txt, a row's path a line. Raises OSError."""
    names = [os.fsencode(name) + b"\n" for name in index.paths]
    write_atomic(path, lambda file: np.save(file, index.features.numpy()))
    write_atomic(path.with_suffix(".paths.txt"), lambda file: file.writelines(names))


def check_output(path: Path, inputs: Sequence[Path]) -> None:
    """ValueError for a path that cannot be written, or where something else than an earlier output lies."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no such folder; make it, or name another file")
    if {path.resolve(), *path.resolve().parents} & {file.resolve() for file in inputs}:
        raise ValueError(f"{path} is, or lies among, the images of this search; name another file")
    if path.suffix == ".npy":
        allowed = path.exists() == path.with_suffix(".paths.txt").exists()
    else:
        allowed = not path.exists() or SOFTWARE.encode() in path.read_bytes()[:99]  # a sheet's mark
    if not allowed:
        raise ValueError(f"{path}: no earlier search wrote the file that is there; name another one")
