"""Domain-adaptive zero-shot classification as an experiment: SRE-CLIP beside CLIP as it is."""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import CLIP
from ..clip.weights import OPENAI_SHA256, file_digest
from ..clip.zero_shot import class_text_features
from ..config import Config
from ..images.features import prototypes
from ..machine.files import digest_of, write_text_atomic
from ..machine.processes import one_process
from ..sre.adapter import SRECLIP, check_unseen
from ..sre.graph import Graph, duplicates, node_vectors, normalized_adjacency, parse_graph
from ..training.journal import Run, load_own_state
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
AVERAGES = ("instance", "class")
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
    target: Folder

    def digests(self) -> dict[str, Any]:
        """Of the images' names in each folder, and of what the method takes from the graph."""
        source, target = ([folder.files.digest(os.path.realpath(folder.root)) for folder in folders]
                          for folders in (self.sources, [self.target]))
        graph = self.graph
        content = [graph.ids, graph.names, graph.edges, graph.classes, self.unseen]
        return {"source": source, "target": target, "graph": digest_of(content)}

    @property
    def listing(self) -> Listing:
        """The images' names below each folder, the sources' first."""
        parts = {**{f"source {i}": folder for i, folder in enumerate(self.sources)}, "target": self.target}
        return {part: below(os.path.realpath(folder.root), folder.files.paths)
                for part, folder in parts.items()}


def prepare(config: Config, before: Listing) -> tuple[Config, Data]:
    """Graph and folders; the drawn data is drawn first where it is absent. before: for `trees.with_gone`."""
    one_process("sre-clip, which encodes each image once and then works on features,")
    if config.dataset == "toy":
        config = class_folders.drawn(config)
    graph, unseen = class_folders.graph_and_unseen(config)
    sources = class_folders.scan_sources(config, graph, unseen, before)
    return config, Data(graph, unseen, sources, target_folder(config, graph, before))


def target_folder(config: Config, graph: Graph, before: Listing) -> Folder:
    return class_folders.scan_folder("--target", config.target, graph, before=before.get("target", ()))


def made(config: Config, clip: CLIP, graph: Graph, unseen: Sequence[int],
         vectors: Tensor) -> SRECLIP:
    """The method with its initial values; class vectors [N, w]."""
    adjacency = normalized_adjacency(graph.edges, len(graph.ids))
    return SRECLIP(clip, graph.names[:graph.classes], vectors, adjacency, unseen, config)


def build(config: Config, data: Data, clip: CLIP, device: torch.device) -> Experiment:
    """A method that starts from its initial values, drawn from torch's global generator."""
    graph, vectors = data.graph, node_vectors(data.graph, clip, config.class_vectors)
    method = made(config, clip, graph, data.unseen, vectors).to(device)

    def start(folder: Path, about: dict[str, Any]) -> Training:
        source, target = (features(folders, clip, config, folder, device)
                          for folders in (data.sources, [data.target]))
        name, anchors = baseline(clip, graph, source)
        about |= {"class_names": graph.names[:graph.classes],
                  "domain_names": [Path(root).name for root in config.source],
                  "graph": asdict(graph), "unseen_ids": data.unseen, "baseline": name, "anchors": anchors}
        validate = None
        if config.sre_report == "best-test":  # S6
            validate = partial(test_score, method, target, device, folder)
        feeds = {"sre": class_folders.feed(source, target, config, device)}
        # No tower runs in this loop, so its arithmetic stays float32; no test evaluation stops it early.
        options = replace(config, precision="fp32")
        return feeds, validate, Run(folder, options, device, about, config.sre_iterations)

    summary = class_folders.summary(data.sources, [data.target], graph, data.unseen)
    return Experiment(method, summary, start)


def check(config: Config, state: dict[str, Any], path: Path) -> None:
    """Raises Misfit, KeyError, TypeError or ValueError for a checkpoint that `rebuild` could not take."""
    graph, unseen, anchors = parse_graph(state["graph"]), state["unseen_ids"], state["anchors"]
    if not (isinstance(state["baseline"], str) and isinstance(unseen, list)
            and all(type(k) is int and 0 <= k < graph.classes for k in unseen)):
        raise TypeError("the baseline or the unseen classes are something else")
    if len(state["class_names"]) != graph.classes:
        raise ValueError(f"{len(state['class_names'])} class names, {graph.classes} classes in the graph")
    check_unseen(torch.tensor(unseen, dtype=torch.long), state["class_names"])
    weights = state["method"]
    e = weights["adapter.query.weight"].shape[1]
    rows = config.sre_bank + (config.sre_batch - 1 if config.bank_ring == "released" else 0)  # S7
    sizes = {"bank.store": [rows, config.sre_hidden], "class_vectors": [len(graph.ids)]}
    sound = anchors.dtype == torch.float32 and anchors.shape == (graph.classes, e)
    if not sound or not torch.isfinite(anchors).all():
        raise ValueError(f"the baseline's anchors are {anchors.dtype} {list(anchors.shape)}, or not finite")
    check_sizes(path, weights, sizes)


def rebuild(config: Config, clip: CLIP, state: dict[str, Any], path: Path, device: torch.device) -> Method:
    """The method of a checkpoint, ready to encode."""
    vectors = state["method"]["class_vectors"]
    method = made(config, clip, parse_graph(state["graph"]), state["unseen_ids"], vectors).to(device)
    load_own_state(method, state["method"], path)
    return method.eval()


def baseline(clip: CLIP, graph: Graph, source: Features) -> tuple[str, Tensor]:
    """Class anchors [c, e] of CLIP without training: text features of "a photo of a {name}".

    Weights without a text tower: the mean direction of each class's source images, zero where it has none.
    """
    if clip.has_text:
        return TEXT, class_text_features(clip, graph.names[:graph.classes]).cpu()
    parts = ((F.normalize(source.take(rows), dim=1), source.labels[rows])
             for rows in torch.arange(len(source)).split(4096))
    return PROTOTYPES, F.normalize(prototypes(parts, graph.classes), dim=1)


def test_score(method: SRECLIP, target: Features, device: torch.device, folder: Path) -> float:
    """H (instance) on the test images, which the released code reports (S6); noted in the run folder.

    The loop logs it as `validation_mAP`, its name for whatever score it is given.
    """
    unseen, c = method.unseen_ids.tolist(), len(method.class_names)
    predicted = predict(method_scores(method, target, device), len(target), c, unseen)
    found = accuracies(predicted, target.labels, unseen, c)
    path = folder / SCORES
    # The log knows how many evaluations came before; later lines are of a run that was killed.
    count = (folder / "log.jsonl").read_bytes().count(b'"validation_mAP"')
    lines = read_lines(path)[:count] if path.exists() else []
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in [*lines, found]))
    return found["instance"]["h"] or 0.0


def best_scores(folder: Path) -> tuple[int, dict[str, dict[str, float | None]]]:
    """Number of test evaluations, and each metric's own maximum over them (S6)."""
    lines = read_lines(folder / SCORES)
    best: dict[str, dict[str, float | None]] = {average: {} for average in AVERAGES}
    try:
        for average, name in product(AVERAGES, COLUMNS):
            values = [line[average][name] for line in lines if line[average][name] is not None]
            if not lines or not all(0 <= value <= 1 for value in values):
                raise TypeError
            best[average][name] = max(values, default=None)
    except (KeyError, TypeError):
        raise ValueError(f"{folder / SCORES} does not hold accuracies as a training notes them; train "
                         "again") from None
    return len(lines), best


def tested(config: Config, state: dict[str, Any], before: Listing) -> Data:
    """What a run is evaluated on: the graph it was trained with, and the target images."""
    one_process("sre-clip")
    graph = parse_graph(state["graph"])
    return Data(graph, list(state["unseen_ids"]), [], target_folder(config, graph, before))


def evaluate(config: Config, data: Data, method: Any, state: dict[str, Any], folder: Path,
             device: torch.device, with_closed_form: bool = False) -> list[dict[str, Any]]:
    """Rows of baseline and method, with `details` for the files; accuracies in 0..1, `instance`, `class`."""
    graph, unseen, names = data.graph, data.unseen, data.graph.names[:data.graph.classes]
    twice = set(duplicates(names))  # WebVision has two cranes
    names = [f"{name} ({synset})" if name in twice else name for name, synset in zip(names, graph.ids)]

    target = features([data.target], method.clip, config, folder, device)
    scores = {state["baseline"]: scores_of(partial(baseline_logits, state["anchors"]), target)}
    scores["sre-clip"] = method_scores(method, target, device)
    about = {"images": len(target), "classes": len(target.labels.unique()), "unreadable": target.skipped}
    rows: list[dict[str, Any]] = []
    for name, parts in scores.items():
        predicted = predict(parts, len(target), len(names), unseen)
        details = {"predicted": predicted, "labels": target.labels, "names": names, "unseen": unseen}
        rows.append({"method": name, **about, **accuracies(predicted, target.labels, unseen, len(names)),
                     "details": details})
    if config.sre_report == "best-test":  # S6
        count, best = best_scores(folder)
        rows.append({"method": "best-test", "evaluations": count, **about, **best})
    return rows


def table(rows: list[dict[str, Any]], config: Config) -> str:
    """The rows as text, in per cent."""
    titles = "".join(f"{title:>9}" for title in COLUMNS.values())
    lines, indent = [f"{'method':<25} {'average':<9}{titles}  images, classes"], " " * 14
    for row in rows:
        for average in AVERAGES:
            found = [row[average][name] for name in COLUMNS]
            values = "".join(f"{'-':>9}" if value is None else f"{100 * value:9.2f}" for value in found)
            lines.append(f"{plain(row['method']):<25} {average:<9}{values}  "
                         f"{row['images']}, {row['classes']}")
        if row["method"] == PROTOTYPES:
            lines.append(f"{indent}(no text tower: nearest mean of source images, which knows no unseen "
                         "class)")
        if "evaluations" in row:
            lines.append(f"{indent}(each metric's maximum over {row['evaluations']} evaluations on the test "
                         "images, S6)")
    # Published numbers stand beside the whole target alone, and OpenAI's weights.
    whole = config.graph in PUBLISHED and rows[0]["classes"] == 50
    if whole and file_digest(config.weights) in OPENAI_SHA256.values():
        lines.append(PUBLISHED[config.graph])
    return "\n".join(lines)
