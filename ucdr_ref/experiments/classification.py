"""Domain-adaptive zero-shot classification to tables: SRE-CLIP beside CLIP as it is, on the same target images."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import CLIP
from ..clip.tensorfile import file_digest
from ..clip.zero_shot import class_text_features
from ..config import Config
from ..machine.files import write_text_atomic
from ..metrics import zero_shot_accuracy
from ..sre.adapter import SRECLIP
from ..sre.graph import Graph, parse_graph
from .class_folders import Features, features, scan_folder

COLUMNS = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
TEXT, PROTOTYPES = "zero-shot", "prototypes"  # baselines
SCORES = "test_scores.jsonl"
PUBLISHED = {"awa2": "published (I2AwA, instance): unseen 69.7, seen 88.0, H 77.7, an ablation line in the released code"}


def baseline(clip: CLIP, graph: Graph, source: Features) -> tuple[str, Tensor]:
    """Class anchors [c, e] of CLIP without training: text features of "a photo of a {name}".

    Weights without a text tower: the mean direction of each class's source images, zero where it has none.
    """
    names = graph.names[: graph.classes]
    if clip.has_text:
        return TEXT, class_text_features(clip, names).cpu()
    sums = torch.zeros(len(names), clip.embed_dim)
    for part in torch.arange(len(source)).split(4096):
        sums.index_add_(0, source.labels[part], F.normalize(source.take(part), dim=1))
    return PROTOTYPES, F.normalize(sums, dim=1)


def baseline_logits(target: Features, anchors: Tensor) -> Tensor:
    """Cosines [n, c] with the anchors [c, e]; a class without an anchor is never predicted."""
    cosines = F.normalize(target.take(torch.arange(len(target))), dim=1) @ anchors.T
    return cosines.masked_fill(~anchors.any(dim=1), -torch.inf)


def logits(method: SRECLIP, target: Features, device: torch.device) -> Tensor:
    """Test-time logits [n, c] in batches of the training size, in the order of the paths: classes in a row (S2)."""
    training = method.training
    method.eval()
    parts = torch.arange(len(target)).split(method.config.sre_batch)
    found = torch.cat([method.logits(target.take(part).to(device)).cpu() for part in parts])
    method.train(training)
    return found


def accuracies(scores: Tensor, target: Features, unseen: list[int]) -> dict[str, dict[str, float | None]]:
    """`zero_shot_accuracy` of logits [n, c], None where there is nothing to count or to predict."""
    result = zero_shot_accuracy(scores, target.labels, unseen)
    no_zsl = bool(scores[:, unseen].isinf().all())

    def known(name: str, value: float) -> float | None:
        return None if math.isnan(value) or (name == "zsl" and no_zsl) else value

    return {average: {name: known(name, value) for name, value in values.items()} for average, values in result.items()}


def test_score(method: SRECLIP, target: Features, device: torch.device, folder: Path) -> float:
    """H (instance) on the test images, noted in the run folder: the released code's choice of what to report (S6)."""
    found = accuracies(logits(method, target, device), target, method.unseen_ids.tolist())
    path = folder / SCORES
    # The log knows how many evaluations came before; later lines are of a run that was killed and has gone back.
    count = (folder / "log.jsonl").read_bytes().count(b'"validation_mAP"')
    lines = path.read_text(encoding="utf-8").splitlines()[:count] if path.exists() else []
    write_text_atomic(path, "".join(line + "\n" for line in [*lines, json.dumps(found)]))
    return found["instance"]["h"] or 0.0


def best_scores(folder: Path) -> tuple[int, dict[str, dict[str, float | None]]]:
    """Number of test evaluations, and each metric's own maximum over them (S6)."""
    lines = [json.loads(line) for line in (folder / SCORES).read_text(encoding="utf-8").splitlines()]

    def maximum(average: str, name: str) -> float | None:
        return max((line[average][name] for line in lines if line[average][name] is not None), default=None)

    return len(lines), {average: {name: maximum(average, name) for name in COLUMNS} for average in ("instance", "class")}


def evaluate(folder: Path, config: Config, method: SRECLIP, state: dict[str, Any],
             device: torch.device) -> list[dict[str, Any]]:
    """Rows of baseline and method: accuracies in 0..1 under `instance` and `class`, and `details` for the files."""
    graph, unseen = parse_graph(state["graph"]), list(state["unseen_ids"])
    target = features([scan_folder("--target", config.target, graph)], graph, method.clip, config,
                      file_digest(config.weights), folder / "features", device)
    about = {"images": len(target), "classes": len(target.labels.unique())}
    rows: list[dict[str, Any]] = []
    predicted = {state["baseline"]: baseline_logits(target, state["anchors"]), "sre-clip": logits(method, target, device)}
    for name, scores in predicted.items():
        details = {"logits": scores, "labels": target.labels, "names": graph.names[: graph.classes], "unseen": unseen}
        rows.append({"method": name, **about, **accuracies(scores, target, unseen), "details": details})
    if config.sre_report == "best-test":  # S6
        count, best = best_scores(folder)
        rows.append({"method": "best-test", "evaluations": count, **about, **best})
    return rows


def table(rows: list[dict[str, Any]], config: Config) -> str:
    """The rows as text, in per cent."""
    lines = [f"{'method':<13} {'average':<9}" + "".join(f"{title:>9}" for title in COLUMNS.values()) + "  images, classes"]
    for row in rows:
        for average in ("instance", "class"):
            found = [row[average][name] for name in COLUMNS]
            values = "".join("        -" if value is None else f"{100 * value:9.2f}" for value in found)
            lines.append(f"{row['method']:<13} {average:<9}{values}  {row['images']}, {row['classes']}")
        if row["method"] == PROTOTYPES:
            lines.append("              (no text tower: nearest mean of source images, which knows no unseen class)")
        if "evaluations" in row:
            lines.append(f"              (each metric's maximum over {row['evaluations']} evaluations on the test images, S6)")
    if config.graph in PUBLISHED:
        lines.append(PUBLISHED[config.graph])
    return "\n".join(lines)
