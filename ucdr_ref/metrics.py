"""Retrieval metrics and search: functions of features and labels. Imports nothing from the package.

Conventions (the evaluation protocol of UCDR-Adapter, shared with ProS and SnMpNet):

- Ranking is by |q|^2 + |g|^2 - 2 q.g in float64, rounded to float32; equal distances keep the gallery's
  order. So copies of one vector tie, but for about one pair in 10^8 that the product's last digits part.
- AP@k is divided by the number of hits within the first k (`mAP@k`), as published tables are; the textbook
  divisor min(relevant, k) is reported beside it (`mAP@k/relevant`). A query without hit scores 0 and counts.
- A gallery smaller than k: k is its size (`k_used`); the keys keep the k that was asked for.
"""
from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEMORY_BUDGET = 2**26  # bytes of a chunk
BYTES_PER_PAIR = 48  # of a ranked pair: distance, keys, hits, precisions
SPARE = 16  # candidates of a search beyond k


def retrieval(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor,
              k: int = 200) -> dict[str, Any]:
    """Rank the gallery [g, e] for every query [q, e], on the queries' device; labels [q], [g] are integers.

    Returns, for k = 200:
      `mAP@200`, `mAP@200/relevant`, `Prec@200`, `mAP@all`, `Prec@100`: means over all queries, in 0..1
      `AP`, `AP@all`: AP@k and AP@g of each query, float64 tensors [q] on the CPU
      `per_class`, `per_class@all`: {label: mean of `AP` / of `AP@all` over that class's queries}
      `queries`, `gallery`, `k`, `k_used`: q, g, what was asked for, and min(k, g)
      `no_relevant`: the number of queries whose class is absent from the gallery
    Raises ValueError on empty or mismatching input and on features that are not finite.
    """
    query, gallery = _checked(query, gallery, k)
    query, gallery = query.double(), gallery.to(query.device).double()
    labels, gallery_labels = (torch.as_tensor(x, device=query.device) for x in (query_labels, gallery_labels))
    if (labels.shape, gallery_labels.shape) != (query.shape[:1], gallery.shape[:1]):
        raise ValueError(f"{len(query)} query and {len(gallery)} gallery features need as many labels; got "
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
    ap, ap_all = scores[0], scores[2]
    return {
        **dict(zip(names, scores[:5].mean(1).tolist(), strict=True)), "AP": ap, "AP@all": ap_all,
        "per_class": class_means(ap, labels), "per_class@all": class_means(ap_all, labels),
        "queries": len(query), "gallery": len(gallery), "k": k, "k_used": min(k, len(gallery)),
        "no_relevant": int((scores[5] == 0).sum())}


def _rank(distances: Tensor) -> Tensor:
    """Gallery indices by (distance, index), of float32 distances [q, g], none negative.

    On a CPU numpy sorts integers: the bits of a distance, which are ordered like it, above those of the
    index. That is several times as fast as a stable sort of floats.
    """
    if distances.device.type != "cpu":
        return distances.sort(dim=1, stable=True).indices
    keys = distances.view(torch.int32).long() << 32 | torch.arange(distances.shape[1])
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFFFFFF


def average_precision(hits: Tensor, relevant: Tensor | None = None) -> Tensor:
    """AP@k = sum over hits i <= k of (hits up to i) / i, over a divisor; 0 without a hit.

    hits [..., k] (true where the item at that rank is relevant) -> [...] float64. The divisor is the number
    of hits or, where the number of relevant items [...] in the gallery is given, min(relevant, k).
    """
    count = hits.sum(-1) if relevant is None else relevant.clamp(max=hits.shape[-1])
    ranks = torch.arange(1, hits.shape[-1] + 1, device=hits.device, dtype=torch.int32)
    precision_at_hits = hits.cumsum(-1, dtype=torch.int32) / ranks * hits
    return precision_at_hits.sum(-1, dtype=torch.float64) / count.clamp(min=1)


def class_means(values: Tensor, labels: Tensor) -> dict[int, float]:
    """{label: mean of values [q] where labels [q] are that}, labels ascending."""
    classes, position, count = labels.to(values.device).unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(classes)).index_add_(0, position, values)
    return dict(zip(classes.tolist(), (sums / count).tolist(), strict=True))


def search(query: Tensor, gallery: Tensor | np.ndarray, k: int,
           norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of each query, on the CPU, reading the gallery in chunks.

    query [q, e]; gallery [g, e], a tensor or an array such as a memory map; norms [g], which may be kept
    between searches, are its `squared_norms`. Returns Euclidean distances [q, min(k, g)] and indices, nearest
    first, equal ones by index. Raises ValueError as `retrieval`.

    A float32 scan keeps k + 16 candidates and their float64 distances decide: exact, unless more than 16
    other rows (copies count) are as near as the k-th within float32's rounding of |g|^2 - 2 q.g.
    """
    query, gallery = (x.cpu() for x in _checked(query, gallery, k))
    squared_norms(query, "query")
    norms = squared_norms(gallery) if norms is None else norms
    if norms.shape != gallery.shape[:1]:
        raise ValueError(f"norms must be [{len(gallery)}]; got {list(norms.shape)}.")
    (q, e), k = query.shape, min(k, len(gallery))
    right, worst = -2 * query.float().T, torch.zeros(q)
    scores, indices = torch.empty(q, 0), torch.empty(q, 0, dtype=torch.long)
    chunk = max(k + SPARE, MEMORY_BUDGET // (4 * (e + 16 * q)))
    for start in range(0, len(gallery), chunk):
        rows = gallery[start : start + chunk].float()
        beyond = (rows @ right).add_(norms[start : start + chunk, None]).sub_(worst)
        # rows nearer than the worst candidate of a query, [n]; the first chunk has nothing to beat
        near = (beyond.amin(1) < 0).nonzero()[:, 0] if start else torch.arange(len(rows))
        scores = torch.cat([scores, (beyond[near] + worst).T], 1)
        indices = torch.cat([indices, (near + start).expand(q, -1)], 1)
        scores, kept = scores.topk(min(k + SPARE, scores.shape[1]), dim=1, largest=False, sorted=False)
        indices, worst = indices.gather(1, kept), scores.amax(1)
    indices = indices.sort(dim=1).values
    squares = torch.stack([(gallery[near].double() - one).square().sum(1)
                           for one, near in zip(query.double(), indices, strict=True)])
    squares, order = squares.float().sort(dim=1, stable=True)
    return squares[:, :k].sqrt(), indices.gather(1, order)[:, :k]


def squared_norms(rows: Tensor | np.ndarray, name: str = "gallery") -> Tensor:
    """|x|^2 [n] of features [n, e], at least float32. Raises ValueError where a row is not finite."""
    rows = _tensor(rows)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()
    bad = (~(norms < 8e37)).nonzero()  # NaN, or squared distances may exceed float32
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(rows)} {name} feature rows hold NaN, infinite or overflowing "
                         f"values (first: row {int(bad[0])}); check images and model.")
    return norms


def _tensor(rows: Tensor | np.ndarray) -> Tensor:
    """A memory map stays in its file; what is on Apple's GPU, which has no float64, comes to the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that must not be written to: none is
        rows = torch.as_tensor(rows).detach()
    return rows.cpu() if rows.device.type == "mps" else rows


def _checked(query: Tensor, gallery: Tensor | np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    query, gallery = _tensor(query), _tensor(gallery)
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}.")
    if query.ndim != 2 or gallery.shape[1:] != query.shape[1:] or not query.numel() or not gallery.numel():
        raise ValueError(f"Expected non-empty query features [q, e] and gallery features [g, e]; got "
                         f"{list(query.shape)} and {list(gallery.shape)}: encode both with one model.")
    return query, gallery


def zero_shot_accuracy(logits: Tensor, labels: Tensor, unseen_ids: Tensor) -> dict[str, dict[str, float]]:
    """ZSL and generalised ZSL accuracy, in 0..1, of logits [b, c], labels [b] and unseen class ids.

    `zsl`: unseen-class images among unseen classes; `unseen`, `seen`: images of these classes among all
    classes; `h` = 2US / (U + S). Under `instance` averaged over images, under `class` over the classes that
    have images. NaN where there is no image. Raises ValueError for logits with NaN.
    """
    if logits.isnan().any():
        raise ValueError("the logits hold NaN; check features and weights.")
    is_unseen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    is_unseen[torch.as_tensor(unseen_ids)] = True
    among_unseen = logits.masked_fill(~is_unseen, -torch.inf).argmax(dim=1)
    return predicted_accuracy(logits.argmax(dim=1), among_unseen, torch.as_tensor(labels), is_unseen)


def predicted_accuracy(everywhere: Tensor, among_unseen: Tensor, labels: Tensor,
                       is_unseen: Tensor) -> dict[str, dict[str, float]]:
    """`zero_shot_accuracy` of predictions [b] among all classes and among the unseen ones; is_unseen [c]."""
    labels = labels.cpu()
    of_unseen = is_unseen.cpu()[labels]

    def accuracy(predicted: Tensor, images: Tensor) -> tuple[float, float]:
        hits = (predicted.cpu() == labels)[images].double()
        by_class = class_means(hits, labels[images]).values()
        return float(hits.mean()), sum(by_class) / len(by_class) if by_class else float("nan")

    found = zip(accuracy(among_unseen, of_unseen), accuracy(everywhere, of_unseen),
                accuracy(everywhere, ~of_unseen), strict=True)
    return {name: {"zsl": zsl, "unseen": u, "seen": s, "h": 2 * u * s / (u + s) if u + s else 0.0}
            for name, (zsl, u, s) in zip(("instance", "class"), found, strict=True)}
