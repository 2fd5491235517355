"""What SRE-CLIP must be shown beside: ridge regression from image features to class vectors, and calibration.

Nothing here is published. `n` images, `e` CLIP embedding, `c` classes, `w` width of a class vector;
N(v) = v / |v|.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.zero_shot import class_text_features
from ..experiments.classification import features_of, scan_folder
from ..experiments.experiment import restore
from ..metrics import zero_shot_accuracy
from ..sre.adapter import SRECLIP
from ..sre.graph import Graph
from ..ucdr.closed_form import center

FOLDS = 5
STRENGTHS = tuple(10 ** (k / 2) for k in range(-4, 7))  # lambda, 0.01 to 1000


def solve(square: Tensor, cross: Tensor, strength: float) -> Tensor:
    """W [e, w] = (Z^T Z + lambda I)^-1 Z^T A, of square = Z^T Z [e, e] and cross = Z^T A [e, w]."""
    return torch.linalg.solve(square + strength * torch.eye(len(square), dtype=square.dtype), cross)


def ridge_scores(source: Tensor, labels: Tensor, target: Tensor, class_vectors: Tensor,
                 strength: float | None = None) -> tuple[Tensor, float]:
    """Cosines [n, c] of N(target) W and the class vectors, centred over the classes; and lambda.

    source [m, e] with labels [m]; target [n, e]; class_vectors [c, w]. lambda is `strength`, or chosen: the
    seen classes are dealt, in order, into five groups (fewer if a group had less than two); each is left out
    in turn and its source images are classified among its classes. Of STRENGTHS, the one with most hits, the
    larger of equals. Fewer than four seen classes leave nothing to choose by: 1.
    """
    a = class_vectors.double()
    a = a - a.mean(dim=0)
    z, anchors, seen = F.normalize(source.double(), dim=1), F.normalize(a, dim=1), labels.unique()
    square, cross = z.T @ z, z.T @ a[labels]
    folds = min(FOLDS, len(seen) // 2)
    if strength is None and folds > 1:
        hits = dict.fromkeys(STRENGTHS, 0)
        for group in (seen[k::folds] for k in range(folds)):
            out = torch.isin(labels, group)
            others = square - z[out].T @ z[out], cross - z[out].T @ a[labels[out]]
            for trial in STRENGTHS:
                w = solve(*others, trial)
                found = group[(z[out] @ w @ anchors[group].T).argmax(dim=1)]
                hits[trial] += int((found == labels[out]).sum())
        strength = max(STRENGTHS, key=lambda trial: (hits[trial], trial))
    elif strength is None:
        strength = 1.0
    mapped = F.normalize(target.double(), dim=1) @ solve(square, cross, strength)
    return F.normalize(mapped, dim=1) @ anchors.T, strength


def calibrated(scores: Tensor, unseen: Sequence[int], kappa: float) -> Tensor:
    """scores [n, c] less one number for the seen classes: a share kappa of the predictions is then unseen.

    As transductive as L-bias, whose prior it is. The number lies between two images' margins, best seen -
    best unseen; equal margins fall to one side together. Where kappa n images cannot be had, the nearest
    count is, the smaller of equals.
    """
    scores = scores.double()
    is_unseen = torch.zeros(scores.shape[1], dtype=torch.bool)
    is_unseen[list(unseen)] = True
    margins = scores[:, ~is_unseen].amax(dim=1) - scores[:, is_unseen].amax(dim=1)
    edges, counts = margins.unique(return_counts=True)
    reached = F.pad(counts.cumsum(0), (1, 0))  # unseen predictions for a number below edge 0, 1, ...
    edges = torch.cat([edges[:1] - 1, edges, edges[-1:] + 1])
    k = int((reached - kappa * len(scores)).abs().argmin())
    return torch.where(is_unseen, scores, scores - edges[k:k + 2].mean())


def compare(folder: Path, cache: Path, centered: bool = False) -> dict[str, dict[str, Any]]:
    """{row: accuracies over images, in 0..1}: a run of SRE-CLIP, zero-shot CLIP or prototypes, the ridge.

    Each also calibrated, with the run's kappa. centered: source and target features lose their mean before
    the ridge (transductive). cache: where the run's features are.
    """
    config, method, state = restore(folder, {}, torch.device("cpu"))
    assert isinstance(method, SRECLIP)
    graph, unseen = Graph(**state["graph"]), state["unseen_ids"]
    seen = set(range(graph.classes)) - set(unseen)
    sources = [scan_folder("--source", root, graph, seen) for root in config.source]
    source = features_of(sources, method.clip, config, cache)
    target = features_of([scan_folder("--target", config.target, graph)], method.clip, config, cache)
    x, y = source.rows, target.rows
    scores = {"sre-clip": method.logits(y)}
    if method.clip.has_text:
        scores["zero-shot"] = F.normalize(y, dim=1) @ class_text_features(method.clip, method.class_names).T
    if centered:
        x, y = center(x), center(y)
    vectors = method.class_vectors[:graph.classes]
    scores["ridge, centred" if centered else "ridge"], _ = ridge_scores(x, source.labels, y, vectors)
    scores |= {f"{name}, calibrated": calibrated(found, unseen, config.sre_kappa)
               for name, found in scores.items()}
    if not method.clip.has_text:  # nearest mean direction of source images, which no unseen class has
        sums = torch.zeros(graph.classes, x.shape[1]).index_add_(0, source.labels, F.normalize(source.rows))
        found = F.normalize(target.rows) @ F.normalize(sums).T
        scores["prototypes"] = found.masked_fill(~sums.any(dim=1), -torch.inf)
    ids, accuracies = torch.tensor(unseen), dict[str, dict[str, Any]]()
    for name, found in scores.items():
        best = torch.stack([found.argmax(dim=1), ids[found[:, ids].argmax(dim=1)]], dim=1)
        accuracies[name] = zero_shot_accuracy(best, target.labels, ids)["instance"]
    accuracies.get("prototypes", {})["zsl"] = None
    return accuracies
