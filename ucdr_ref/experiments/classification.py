"""Domain-adaptive zero-shot classification as an experiment: SRE-CLIP beside CLIP as it is, on the same
target images.
"""
from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.load import OPENAI_SHA256
from ..clip.model import CLIP
from ..clip.tensorfile import file_digest, show
from ..clip.zero_shot import ZeroShot, class_text_features
from ..config import Config
from ..images.features import prototypes
from ..machine.files import write_text_atomic
from ..machine.processes import world
from ..sre.adapter import SRECLIP, check_unseen
from ..sre.class_vectors import node_vectors
from ..sre.closed_form import Ridge, fit
from ..sre.graph import Graph, normalised_adjacency, parse_graph
from ..training.journal import load_own_state
from ..ucdr.closed_form import ClosedFormAdapter
from . import class_folders
from .class_folders import Features, Folder, features
from .contract import Experiment, Method, Training
from .page import classification_page as page
from .predictions import accuracies, baseline_logits, method_scores, predict, scores_of
from .report import plain
from .report import write_classification as write_results
from .run_folder import check_sizes, read_lines
from .trees import Listing, below

__all__ = ["build", "check", "evaluate", "page", "prepare", "rebuild", "table", "tested", "write_results"]

COLUMNS = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
TEXT, PROTOTYPES = "zero-shot", "prototypes"  # baselines
SCORES = "test_scores.jsonl"
PUBLISHED = {"awa2": "published (I2AwA, instance): unseen 69.7, seen 88.0, H 77.7, an ablation line in the "
                     "released code"}


@dataclass(frozen=True)
class Data:
    """The class graph, which of its classes are unseen, and the folders of images."""

    graph: Graph
    unseen: list[int]
    sources: list[Folder]
    targets: list[Folder]

    def digests(self) -> dict[str, Any]:
        lists = {part: [folder.files.digest(os.path.realpath(folder.root)) for folder in folders]
                 for part, folders in (("source", self.sources), ("target", self.targets))}
        return {**lists, "graph": class_folders.graph_digest(self.graph, self.unseen)}

    @property
    def listing(self) -> Listing:
        """The images' names below each folder, the sources' first."""
        parts = {**{f"source {i}": folder for i, folder in enumerate(self.sources)},
                 "target": self.targets[0]}
        return {part: below(os.path.realpath(folder.root), folder.files.paths)
                for part, folder in parts.items()}


def prepare(config: Config, before: Listing | None = None) -> tuple[Config, Data]:
    """Graph and folders; the drawn data is drawn first where it is absent. before: `trees.with_gone` takes
    it.

    Raises ValueError or FileNotFoundError.
    """
    if world() > 1:
        raise ValueError("--method sre-clip encodes each image once and then trains on features, for which "
                         "one process is enough: start it without torchrun")
    if config.dataset == "toy" and not config.source:
        config = class_folders.drawn(config)
    graph, unseen = class_folders.graph_and_unseen(config)
    before = before or {}
    sources = class_folders.scan_sources(config, graph, unseen, before)
    return config, Data(graph, unseen, sources, [target_folder(config, graph, before)])


def target_folder(config: Config, graph: Graph, before: Listing) -> Folder:
    ids = class_folders.read_folder_ids(config.folder_ids)
    return class_folders.scan_folder("--target", config.target, graph, ids, before=before.get("target", ()))


def build(config: Config, data: Data, clip: CLIP, device: torch.device) -> Experiment:
    """A method that starts from its initial values, drawn from torch's global generator."""
    graph, names = data.graph, data.graph.names[:data.graph.classes]
    vectors = node_vectors(graph, clip, config.class_vectors)
    method: SRECLIP | ClosedFormAdapter
    if config.method == "closed-form":
        method = ClosedFormAdapter(clip, ZeroShot(clip).encode,
                                   nothing_fitted(clip.embed_dim, vectors[:graph.classes]))
    else:
        adjacency = normalised_adjacency(graph.edges, len(graph.ids))
        method = SRECLIP(clip, names, vectors, adjacency, data.unseen, config).to(device)

    def start(folder: Path) -> Training:
        source, target = (features(folders, graph, clip, config, folder / "features", device)
                          for folders in (data.sources, data.targets))
        name, anchors = baseline(clip, graph, source)
        extra: dict[str, Any] = {"graph": asdict(graph), "unseen_ids": data.unseen, "baseline": name,
                                 "anchors": anchors}
        if isinstance(method, ClosedFormAdapter):
            method.form, extra["strength"] = fit(source.take, source.labels, vectors[:graph.classes])
            return Training({}, None, config, config.sre_iterations, extra)
        validate = None
        if config.sre_report == "best-test":  # S6
            validate = partial(test_score, method, target, device, folder)
        feeds = {"sre": class_folders.feed(source, target, config, device)}
        # No tower runs in this loop, so its arithmetic stays float32; test evaluations are noted, but none
        # stops it.
        return Training(feeds, validate, replace(config, precision="fp32"), config.sre_iterations, extra)

    summary = class_folders.summary(data.sources, data.targets, graph, data.unseen)
    if isinstance(method, SRECLIP):
        count = sum(parameter.numel() for parameter in method.trainable("sre").values())
        summary += f"\nphase sre: {count:,} trainable parameters"
    domains = [Path(root).name for root in config.source]
    return Experiment(method, names, domains, summary, data.digests(), start)


def nothing_fitted(e: int, class_vectors: Tensor) -> Ridge:
    """A ridge regression of the shapes of e-dimensional features and class vectors [c, w], to be filled."""
    return Ridge(torch.zeros(e, class_vectors.shape[1]), torch.zeros_like(class_vectors))


def check(config: Config, state: dict[str, Any], path: Path) -> None:
    """Raises Misfit, KeyError, TypeError or ValueError for a checkpoint of other sizes, or a graph that is
    none.
    """
    graph, unseen, anchors = parse_graph(state["graph"]), state["unseen_ids"], state["anchors"]
    if not (isinstance(state["baseline"], str) and isinstance(unseen, list)
            and all(type(k) is int for k in unseen)):
        raise TypeError("the baseline or the unseen classes are something else")
    if len(state["class_names"]) != graph.classes:
        raise ValueError(f"{len(state['class_names'])} class names, {graph.classes} classes in the graph")
    check_unseen(torch.tensor(unseen, dtype=torch.long), state["class_names"])
    weights = state["method"]
    e = len(weights["form.weights"]) if config.method == "closed-form" else weights["adapter.query.weight"].shape[1]
    if anchors.shape != (graph.classes, e) or not torch.isfinite(anchors).all():
        raise ValueError(f"the baseline's anchors are {list(anchors.shape)}, or not finite")
    if config.method == "closed-form":
        check_sizes(path, weights, {"form.anchors": [graph.classes]})
        return
    extra = config.sre_batch - 1 if config.bank_ring == "released" else 0
    check_sizes(path, weights,
                {"bank.store": [config.sre_bank + extra, config.sre_hidden],
                 "class_vectors": [len(graph.ids)]})


def rebuild(config: Config, clip: CLIP, state: dict[str, Any], path: Path, device: torch.device) -> Method:
    """The method of a checkpoint, ready to encode."""
    method: SRECLIP | ClosedFormAdapter
    if config.method == "closed-form":
        ridge = nothing_fitted(clip.embed_dim, state["method"]["form.anchors"])
        method = ClosedFormAdapter(clip, ZeroShot(clip).encode, ridge).to(device)
    else:
        graph, vectors = parse_graph(state["graph"]), state["method"]["class_vectors"]
        adjacency = normalised_adjacency(graph.edges, len(graph.ids))
        method = SRECLIP(clip, state["class_names"], vectors, adjacency, state["unseen_ids"],
                         config).to(device)
    load_own_state(method, state["method"], path)
    return method.eval()


def baseline(clip: CLIP, graph: Graph, source: Features) -> tuple[str, Tensor]:
    """Class anchors [c, e] of CLIP without training: text features of "a photo of a {name}".

    Weights without a text tower: the mean direction of each class's source images, zero where it has none.
    """
    names = graph.names[: graph.classes]
    if clip.has_text:
        return TEXT, class_text_features(clip, names).cpu()
    chunks = torch.arange(len(source)).split(4096)
    parts = ((F.normalize(source.take(part), dim=1), source.labels[part]) for part in chunks)
    return PROTOTYPES, F.normalize(prototypes(parts, len(names)), dim=1)


def test_score(method: SRECLIP, target: Features, device: torch.device, folder: Path) -> float:
    """H (instance) on the test images, noted in the run folder: the released code's choice of what to report
    (S6).
    """
    unseen, c = method.unseen_ids.tolist(), len(method.class_names)
    found = accuracies(predict(method_scores(method, target, device), len(target), c, unseen), target.labels,
                       unseen, c)
    path = folder / SCORES
    # The log knows how many evaluations came before; later lines are of a run that was killed and has gone
    # back.
    count = (folder / "log.jsonl").read_bytes().count(b'"validation_mAP"')
    lines = read_lines(path)[:count] if path.exists() else []
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in [*lines, found]))
    return found["instance"]["h"] or 0.0


def best_scores(folder: Path) -> tuple[int, dict[str, dict[str, float | None]]]:
    """Number of test evaluations, and each metric's own maximum over them (S6)."""
    lines = read_lines(folder / SCORES)
    try:
        known = [line[average][name] for line in lines for average in ("instance", "class")
                 for name in COLUMNS]
        assert lines and all(value is None or type(value) in (int, float) for value in known)
    except (KeyError, TypeError, AssertionError):
        raise ValueError(f"{show(folder / SCORES)} does not hold accuracies as a training notes them; train "
                         f"again") from None

    def maximum(average: str, name: str) -> float | None:
        return max((line[average][name] for line in lines if line[average][name] is not None), default=None)

    return len(lines), {average: {name: maximum(average, name) for name in COLUMNS}
                        for average in ("instance", "class")}


def tested(config: Config, state: dict[str, Any], before: Listing | None = None) -> Data:
    """What a run is evaluated on: the graph it was trained with, and the target images."""
    if world() > 1:
        raise ValueError("a run of sre-clip is evaluated by one process: start it without torchrun")
    graph = parse_graph(state["graph"])
    return Data(graph, list(state["unseen_ids"]), [], [target_folder(config, graph, before or {})])


def evaluate(config: Config, data: Data, method: Any, state: dict[str, Any], folder: Path,
             device: torch.device,
             with_closed_form: bool = False) -> list[dict[str, Any]]:
    """Rows of baseline, closed form and method, each as it is and calibrated, with `details` for the files.

    Accuracies in 0..1 under `instance` and `class`. Calibration takes kappa as the share of unseen
    predictions.
    """
    graph, unseen = data.graph, data.unseen
    names = graph.names[: graph.classes]
    target = features(data.targets, graph, method.clip, config, folder / "features", device)
    about = {"images": len(target), "classes": len(target.labels.unique()), "unreadable": target.skipped}
    scores = {state["baseline"]: scores_of(partial(baseline_logits, state["anchors"]), target)}
    if config.method == "closed-form":
        scores["closed-form"] = scores_of(method.form.cpu().logits, target)
    elif with_closed_form:
        sources = class_folders.scan_sources(config, graph, unseen)
        source = features(sources, graph, method.clip, config, folder / "features", device)
        vectors = state["method"]["class_vectors"][:graph.classes]
        scores["closed-form"] = scores_of(fit(source.take, source.labels, vectors)[0].logits, target)
    if config.method == "sre-clip":
        scores["sre-clip"] = method_scores(method, target, device)
    rows: list[dict[str, Any]] = []
    for name, parts in scores.items():
        as_is = predict(parts, len(target), len(names), unseen)
        tried = {name: as_is}
        if as_is.zsl:  # prototypes know no unseen class: nothing to calibrate
            tried[f"{name}, calibrated"] = as_is.calibrated(config.sre_kappa)
        for title, predicted in tried.items():
            details = {"predicted": predicted, "labels": target.labels, "names": names, "unseen": unseen}
            rows.append({"method": title, **about, **accuracies(predicted, target.labels, unseen, len(names)),
                         "details": details})
    if config.sre_report == "best-test":  # S6
        count, best = best_scores(folder)
        rows.append({"method": "best-test", "evaluations": count, **about, **best})
    return rows


def table(rows: list[dict[str, Any]], config: Config) -> str:
    """The rows as text, in per cent."""
    lines = [f"{'method':<25} {'average':<9}" + "".join(f"{title:>9}" for title in COLUMNS.values())
             + "  images, classes"]
    for row in rows:
        for average in ("instance", "class"):
            found = [row[average][name] for name in COLUMNS]
            values = "".join("        -" if value is None else f"{100 * value:9.2f}" for value in found)
            lines.append(f"{plain(row['method']):<25} {average:<9}{values}  {row['images']}, "
                         f"{row['classes']}")
        if row["method"] == PROTOTYPES:
            lines.append("              (no text tower: nearest mean of source images, which knows no unseen "
                         "class)")
        if "evaluations" in row:
            lines.append(f"              (each metric's maximum over {row['evaluations']} evaluations on the "
                         f"test images, S6)")
    # Published numbers stand beside the whole target alone, and OpenAI's weights.
    whole = config.graph in PUBLISHED and rows[0]["classes"] == 50
    if whole and file_digest(config.weights) in OPENAI_SHA256.values():
        lines.append(PUBLISHED[config.graph])
    return "\n".join(lines)
