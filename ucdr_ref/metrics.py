"""Retrieval metrics and search: functions of features and labels. Imports nothing from the package.

Conventions (of UCDR-Adapter's evaluation, shared with ProS and SnMpNet):

- Ranking is by squared distance in float64, rounded to float32; equal ones keep the gallery's order.
- AP@k is divided by the number of hits within the first k, as in published tables; for `mAP@k/relevant` by
  the textbook's min(relevant, k). A query without hit scores 0 and counts.
"""
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEMORY_BUDGET = 2**26  # bytes of a chunk
BYTES_PER_PAIR = 48  # that ranking takes: distance, keys, hits, precisions
SPARE = 16  # candidates of a search beyond k


def retrieval(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor,
              k: int = 200) -> dict[str, Any]:
    """Rank the gallery [g, e] for every query [q, e], on the queries' device; labels [q], [g] are integers.

    Returns, where k = 200:
      `mAP@200`, `mAP@200/relevant`, `Prec@200`, `mAP@all`, `Prec@100`: means over all queries, in 0..1
      `AP`: AP@k of each query, float64 [q] on the CPU
      `per_class`, `per_class@all`: {label: mean of AP@k, of AP@g, over the class's queries}
      `queries`, `gallery`, `k`, `k_used`, `no_relevant`: q, g, k, min(k, g), queries whose class it lacks
    Raises ValueError for input that is empty, does not fit together or is not finite.
    """
    query, gallery = _checked(query, gallery, k)
    query, gallery = query.double(), gallery.to(query.device).double()
    labels, gallery_labels = (torch.as_tensor(x, device=query.device) for x in (query_labels, gallery_labels))
    if (labels.shape, gallery_labels.shape) != (query.shape[:1], gallery.shape[:1]):
        raise ValueError(f"Expected labels [{len(query)}] and [{len(gallery)}], as many as features; got "
                         f"{list(labels.shape)} and {list(gallery_labels.shape)}.")
    query_norms, gallery_norms = squared_norms(query, "query"), squared_norms(gallery)
    chunk = max(1, MEMORY_BUDGET // (BYTES_PER_PAIR * len(gallery)))
    columns: list[Tensor] = []
    for part in torch.arange(len(query), device=query.device).split(chunk):
        distances = torch.addmm(gallery_norms, query[part], gallery.T, alpha=-2).add_(query_norms[part, None])
        hits = gallery_labels[_rank(distances.clamp_(min=0).float())] == labels[part, None]
        relevant, first = hits.sum(1), hits[:, :k]
        columns.append(torch.stack([
            average_precision(first), average_precision(first, relevant), average_precision(hits),
            first.double().mean(1), hits[:, :100].double().mean(1), relevant.double()]))
    scores = torch.cat(columns, dim=1).cpu()
    names = (f"mAP@{k}", f"mAP@{k}/relevant", "mAP@all", f"Prec@{k}", "Prec@100")
    return {
        **dict(zip(names, scores[:5].mean(1).tolist())), "AP": scores[0],
        "per_class": class_means(scores[0], labels), "per_class@all": class_means(scores[2], labels),
        "queries": len(query), "gallery": len(gallery), "k": k, "k_used": min(k, len(gallery)),
        "no_relevant": int((scores[5] == 0).sum())}


def _rank(distances: Tensor) -> Tensor:
    """float32 distances [q, g], none negative -> gallery indices [q, g] by (distance, index)"""
    if distances.device.type != "cpu":
        return distances.sort(dim=1, stable=True).indices
    # Keys are integers, a distance's bits above its index: numpy sorts them several times as fast as floats.
    keys = distances.view(torch.int32).long() << 32 | torch.arange(distances.shape[1])
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFFFFFF


def average_precision(hits: Tensor, relevant: Tensor | None = None) -> Tensor:
    """AP@k = sum over hits i <= k of (hits up to i) / i, over a divisor: hits [..., k] -> [...] float64.

    The divisor is the number of hits or, where `relevant` [...] counts relevant items, min(relevant, k).
    """
    count = hits.sum(-1) if relevant is None else relevant.clamp(max=hits.shape[-1])
    ranks = torch.arange(1, hits.shape[-1] + 1, device=hits.device, dtype=torch.int32)
    precision_at_hits = hits.cumsum(-1, dtype=torch.int32) / ranks * hits
    return precision_at_hits.sum(-1, dtype=torch.float64) / count.clamp(min=1)


def class_means(values: Tensor, labels: Tensor) -> dict[int, float]:
    """{label: mean of its values}, labels ascending, for values [q] and labels [q]"""
    classes, position, count = labels.to(values.device).unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(classes)).index_add_(0, position, values)
    return dict(zip(classes.tolist(), (sums / count).tolist()))


def search(query: Tensor, gallery: Tensor | np.ndarray, k: int,
           norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of each query, on the CPU, reading the gallery in chunks.

    query [q, e]; gallery [g, e], perhaps a memory map; norms [g]: its `squared_norms`, if kept. Returns
    Euclidean distances [q, min(k, g)] and indices. Raises ValueError as `retrieval`.

    Scores |g|^2 - 2 q.g in float32 give k + 16 candidates, whose float64 distances decide: exact, unless more
    than 16 other rows (copies count) are as near as the k-th within a score's rounding.
    """
    query, gallery = (x.cpu() for x in _checked(query, gallery, k))
    squared_norms(query, "query")
    norms = squared_norms(gallery) if norms is None else norms
    (q, e), k = query.shape, min(k, len(gallery))
    factor, worst = -2 * query.float().T, torch.full((q,), torch.inf)  # worst: of the candidates' scores
    scores, indices = torch.empty(q, 0), torch.empty(q, 0, dtype=torch.long)
    chunk = max(k + SPARE, MEMORY_BUDGET // (4 * (e + 16 * q)))
    for start in range(0, len(gallery), chunk):
        rows = gallery[start : start + chunk].float()
        score = (rows @ factor).add_(norms[start : start + chunk, None])
        near = ((score - worst).amin(1) < 0).nonzero()[:, 0]  # rows that may enter some query's candidates
        scores = torch.cat([scores, score[near].T], 1)
        indices = torch.cat([indices, (near + start).expand(q, -1)], 1)
        scores, kept = scores.topk(min(k + SPARE, scores.shape[1]), dim=1, largest=False, sorted=False)
        indices, worst = indices.gather(1, kept), scores.amax(1)
    indices = indices.sort(dim=1).values
    squares = torch.stack([(gallery[found].double() - one).square().sum(1)
                           for one, found in zip(query.double(), indices)])
    squares, order = squares.float().sort(dim=1, stable=True)
    return squares[:, :k].sqrt(), indices.gather(1, order)[:, :k]


def squared_norms(rows: Tensor | np.ndarray, name: str = "gallery") -> Tensor:
    """|x|^2 [n] of features [n, e], at least float32. Raises ValueError where a row is not finite."""
    rows = torch.as_tensor(rows)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()
    if len(bad := (~(norms < 8e37)).nonzero()):  # NaN, or squared distances may exceed float32
        raise ValueError(f"{len(bad)} of {len(rows)} {name} feature rows hold NaN, infinite or overflowing "
                         f"values (first: row {int(bad[0])}).")
    return norms


def _checked(query: Tensor, gallery: Tensor | np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    query, gallery = torch.as_tensor(query).detach(), torch.as_tensor(gallery).detach()
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}.")
    if query.ndim != 2 or gallery.shape[1:] != query.shape[1:] or not query.numel() or not gallery.numel():
        raise ValueError("Expected query features [q, e] and gallery features [g, e]; got "
                         f"{list(query.shape)} and {list(gallery.shape)}.")
    return query, gallery


def zero_shot_accuracy(predicted: Tensor, labels: Tensor,
                       unseen: Tensor) -> dict[str, dict[str, float | None]]:
    """ZSL and generalised ZSL accuracy, in 0..1, for labels [b] and the ids of unseen classes.

    predicted [b, 2]: each image's best class among all, and among the unseen ones. `zsl`: unseen-class images
    among unseen classes; `unseen`, `seen`: images of these classes among all; `h` = 2US / (U + S). `instance`
    averages over images, `class` over classes with images; None where there is none.
    """
    labels = labels.cpu()
    hits, of_unseen = (predicted.cpu() == labels[:, None]).double(), torch.isin(labels, unseen.cpu())
    found: dict[str, dict[str, float | None]] = {"instance": {}, "class": {}}
    for name, images, column in (("zsl", of_unseen, 1), ("unseen", of_unseen, 0), ("seen", ~of_unseen, 0)):
        own = hits[images, column]
        by_class = class_means(own, labels[images]).values()
        found["instance"][name] = float(own.mean()) if by_class else None
        found["class"][name] = sum(by_class) / len(by_class) if by_class else None
    for values in found.values():
        u, s = values["unseen"], values["seen"]
        values["h"] = None
        if u is not None and s is not None:
            values["h"] = 2 * u * s / (u + s) if u + s else 0.0
    return found
