"""Retrieval metrics and exact search: functions of features and labels. Imports nothing from the package.

Conventions (the evaluation protocol of UCDR-Adapter, shared with ProS and SnMpNet):

- Ranking is by squared Euclidean distance of the vectors as given; equal ones keep the gallery's order.
- The distance of a pair is *defined* as the float32 nearest to one fixed float64 sum over the two vectors
  (`squared_distances`), whatever the chunk, the thread count, the BLAS or the device. So copies of one vector
  tie exactly, every chunk size gives the same ranks, and `search` and `retrieval` always agree.
- AP@k is divided by the number of hits within the first k (`mAP@k`), as published tables are; the textbook
  divisor min(relevant, k) is reported beside it (`mAP@k/relevant`). A query without hit scores 0 and counts.
- A gallery smaller than k: k is its size. The keys keep the k that was asked for, `k_used` tells the cut.
"""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEMORY_BUDGET = 2**26  # bytes of a chunk when no size is given; larger ones leave the CPU's cache
BYTES_PER_PAIR = 48  # of a chunk: distances and bounds in float64, keys and sorted keys, hits, precisions
BYTES_PER_SCANNED = 16  # of a pair whose distance is only bounded
FIRST_LOOK = 2**15  # rows of a scan whose k nearest bound what is looked for among the others
SCAN_BYTES = 2**19  # of gallery rows that `search` reads at once; they stay in a core's cache
WIDEST_SCAN = 2**16  # features; the scan's error bound is derived for fewer
INDEX = 0xFFFFFFFF  # the bits of a key that hold the gallery index


def retrieval(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int = 200,
              chunk: int | None = None) -> dict[str, Any]:
    """Rank the gallery for every query and score the ranks.

    query [q, e], query_labels [q], gallery [g, e], gallery_labels [g]; labels are integers of one numbering.
    `chunk` queries are ranked at once, on their device, in O(chunk * g) memory; None: by MEMORY_BUDGET.

    Returns, for k = 200:
      `mAP@200`, `mAP@200/relevant`, `Prec@200`, `mAP@all`, `Prec@100`: means over all queries, in 0..1
      `AP`, `AP@all`: AP@k and AP@g of each query, float64 tensors [q] on the CPU
      `precision`: Prec@1, Prec@2, ... to the larger of k and 100, or g, a float64 tensor on the CPU
      `per_class`, `per_class@all`: {label: mean of `AP` / of `AP@all` over that class's queries}
      `queries`, `gallery`, `k`, `k_used`: q, g, what was asked for, and min(k, g)
      `no_relevant`: the number of queries whose class is absent from the gallery
    At g the two divisors are the same number, so mAP@all has one variant. Prec@100 is cut to g likewise.

    Raises ValueError on empty or mismatching input and on features that are not finite. Source: evaluation
    protocol of UCDR-Adapter (WACV 2025); divisor as in the benchmark's released code.
    """
    query, gallery = _tensor(query), _tensor(gallery)
    query_labels, gallery_labels = map(torch.as_tensor, (query_labels, gallery_labels))
    _check_shapes(query, gallery, k, chunk)
    for name, x, labels in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        if labels.shape != x.shape[:1]:
            raise ValueError(f"{len(x)} {name} features need labels of shape [{len(x)}]; "
                             f"got {list(labels.shape)}.")
        _check_rows(x.float().norm(dim=1), name)
    query = _double(query)
    gallery = _double(gallery).to(query.device)
    query_labels, gallery_labels = query_labels.to(query.device), gallery_labels.to(query.device)
    index = torch.arange(len(gallery), device=query.device)
    k_used, hundred = min(k, len(gallery)), min(100, len(gallery))
    chunk = chunk or max(1, MEMORY_BUDGET // (BYTES_PER_PAIR * len(gallery)))

    columns: list[Tensor] = []
    found = torch.zeros(max(k_used, hundred), dtype=torch.long, device=query.device)  # hits at each rank
    for rows, labels in zip(query.split(chunk), query_labels.split(chunk)):
        order = _sort(_keys(squared_distances(rows, gallery), index)) & INDEX
        hits = gallery_labels[order] == labels[:, None]
        relevant, first = hits.sum(1), hits[:, :k_used]
        found += hits[:, :len(found)].sum(0)
        scores = [average_precision(first), average_precision(first, relevant), average_precision(hits)]
        columns.append(torch.stack([*scores, relevant.double()]))
    ap, ap_relevant, ap_all, relevant = torch.cat(columns, dim=1).cpu()
    precision = found.cpu().cumsum(0).double() / torch.arange(1, len(found) + 1) / len(query)
    averaged = {f"mAP@{k}": ap.mean(), f"mAP@{k}/relevant": ap_relevant.mean(), "mAP@all": ap_all.mean(),
                f"Prec@{k}": precision[k_used - 1], "Prec@100": precision[hundred - 1]}
    return {
        **{name: value.item() for name, value in averaged.items()},
        "AP": ap, "AP@all": ap_all, "precision": precision,
        "per_class": class_means(ap, query_labels), "per_class@all": class_means(ap_all, query_labels),
        "queries": len(query), "gallery": len(gallery), "no_relevant": int((relevant == 0).sum()),
        "k": k, "k_used": k_used}


def average_precision(hits: Tensor, relevant: Tensor | None = None) -> Tensor:
    """AP@k = sum over hits i <= k of (hits up to i) / i, over a divisor; 0 where that is 0.

    hits [..., k] (true where the item at that rank is relevant) -> [...] float64. The divisor is the number
    of hits within the list (published tables) or, where `relevant` [...], the number of items of the query's
    class in the gallery, is given, min(relevant, k).
    """
    hits = hits.bool()
    k = hits.shape[-1]
    count = hits.sum(-1) if relevant is None else relevant.clamp(max=k)
    ranks = torch.arange(1, k + 1, device=hits.device, dtype=torch.int32)
    precision_at_hits = hits.cumsum(-1, dtype=torch.int32) / ranks * hits
    return precision_at_hits.sum(-1, dtype=torch.float64) / count.clamp(min=1)


def class_means(values: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean of values [q] over the queries of each class in labels [q]: {label: mean}, labels ascending."""
    classes, position, count = labels.to(values.device).unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(classes)).index_add_(0, position, values)
    return dict(zip(classes.tolist(), (sums / count).tolist(), strict=True))


def search(query: Tensor, gallery: Tensor | np.ndarray, k: int, chunk: int | None = None,
           lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of each query, exactly, with the gallery read `chunk` rows at a time.

    query [q, e]; gallery [g, e], a tensor or an array such as a memory map larger than memory: O(q * chunk)
    memory whatever g is. Returns (Euclidean distances [q, k] float32, gallery indices [q, k]) on the query's
    device, nearest first, equal squared distances by index; k is cut to g. Raises ValueError as `retrieval`.
    On a CPU, `_candidates` first leaves out the rows that provably are among nobody's k nearest.

    `lengths`: `row_lengths(gallery)`, where several searches share one gallery: one query reads it once
    then, not twice. They must be of these very rows: with others, the answer is wrong.
    """
    query = _tensor(query)
    _check_shapes(query, gallery, k, chunk)
    _check_rows(query.float().norm(dim=1), "query")
    if lengths is not None and lengths.shape != (len(gallery),):
        raise ValueError(f"lengths must be row_lengths(gallery), of shape [{len(gallery)}]; "
                         f"got {list(lengths.shape)}.")
    gallery = _tensor(gallery)
    home, query, k = query.device, _double(query.detach()), min(k, len(gallery))
    q, e = query.shape
    exact = chunk or max(1, MEMORY_BUDGET // (BYTES_PER_PAIR * q + 4 * e))
    on_cpu = query.device.type == gallery.device.type == "cpu"
    leaves_out = e <= WIDEST_SCAN and q * k < min(exact, len(gallery))
    scan = on_cpu and leaves_out and _multiplies_in_float32(q, e)
    best = torch.empty(q, 0, dtype=torch.int64, device=query.device)

    def nearest(rows: Tensor, index: Tensor) -> Tensor:
        new = _keys(squared_distances(query, rows.to(query.device)), index)
        keys = torch.cat([best, new], dim=1)
        return keys.topk(min(k, keys.shape[1]), dim=1, largest=False, sorted=True).values

    step = exact if chunk or not scan else max(exact, MEMORY_BUDGET // (BYTES_PER_SCANNED * q))
    for start in range(0, len(gallery), step):
        rows = gallery[start : start + step]
        if scan and k <= len(rows):
            known = None if lengths is None else lengths[start : start + step]
            for chosen in _candidates(query, rows, k, best, start, known).split(exact):
                best = nearest(rows[chosen], chosen + start)
        else:
            _check_rows(rows.float().norm(dim=1), "gallery", start)
            best = nearest(rows, torch.arange(start, start + len(rows), device=query.device))
    return _squares(best).sqrt().to(home), (best & INDEX).to(home)


def row_lengths(gallery: Tensor | np.ndarray) -> Tensor:
    """Euclidean lengths [g], float32 on the CPU, of the rows of a gallery [g, e], for `search`.

    Raises ValueError where a row is not finite.
    """
    gallery = _tensor(gallery)
    blocks = gallery.split(_scan_rows(gallery.shape[1]))
    lengths = torch.cat([block.float().norm(dim=1).cpu() for block in blocks])
    _check_rows(lengths, "gallery")
    return lengths


def _candidates(query: Tensor, rows: Tensor, k: int, best: Tensor, start: int,
                lengths: Tensor | None) -> Tensor:
    """Positions, ascending, of the rows that may be among the k nearest of some query [q, e] (float64).

    rows [c, e], the first of them number `start` of the gallery, and their lengths [c] where these are known;
    best [q, <= k], keys of the nearest before.

    With c and tiny of `_scan_error`, Q = |q|^2, G = |g|^2 and low = (1 - c)G - 2 q.g in float32, the defined
    distance D of a pair is
        low - cQ - tiny < D - Q < low + 2cG + cQ + tiny,
    so a row above the right-hand side of k others, or above the D of k earlier rows, is not among the k.
    """
    # One thread reads rows twice from its cache; several would wait for each other at every small block.
    once = lengths is not None and len(query) == 1 and rows.dtype == torch.float32
    reads_once = once or torch.get_num_threads() > 1
    size = MEMORY_BUDGET // (4 * query.shape[1]) if reads_once else _scan_rows(query.shape[1])
    left, low = -2 * query.float(), torch.empty(len(query), len(rows))
    norms = torch.empty(len(rows)) if lengths is None else lengths
    for at in range(0, len(rows), size):
        block = rows[at : at + size].float()
        torch.mm(left, block.T, out=low[:, at : at + size])
        if lengths is None:
            torch.linalg.vector_norm(block, dim=1, out=norms[at : at + size])
        del block  # the next one takes its memory, which the cache holds
    if lengths is None:
        _check_rows(norms, "gallery", start)

    c, tiny = _scan_error(query.shape[1])
    query_sq = (query**2).sum(1)
    low.addcmul_(norms, norms, value=1 - c)

    def upper(first: Tensor) -> Tensor:
        """The right-hand side, less its last two terms, of the k-th of these columns of `low`."""
        smallest, position = first.topk(k, dim=1, largest=False, sorted=False)
        return (smallest.double() + 2 * c * norms[position] ** 2).amax(1)

    def below(limit: Tensor) -> Tensor:
        limit = (limit + 2 * c * query_sq + tiny).float()
        return torch.from_numpy(np.flatnonzero((low <= limit[:, None]).any(0).numpy()))

    full = best.shape[1] == k
    limit = _squares(best[:, -1]) * (1 + c) - query_sq if full else upper(low[:, : max(k, FIRST_LOOK)])
    chosen = below(limit)
    if len(chosen) > 16 * k * len(query):  # few rows were nearer than a guess allows: look at all
        chosen = below(torch.minimum(limit, upper(low)))
    return chosen


def _scan_error(e: int) -> tuple[float, float]:
    """(c, tiny) of `_candidates`, for features of e numbers.

    Let u = 2^-24. Products and squared lengths are sums of e float32 terms: rounding the two inputs costs a
    term 2u, multiplying u, adding (e - 1)u, in whatever order, with or without FMA. So, by Cauchy-Schwarz,
    2 q.g is off by at most 2(e + 3)u |q||g| <= (e + 3)u (Q + G), and G, the rounded square of a rounded root,
    by (e + 6)u G. Forming `low` takes three roundings, of numbers of at most 2(Q + G). In all, G - 2 q.g is
    off by at most 2(e + 8)u (Q + G). c is twice that and 32u more: what is left, at least c(Q + G) / 2, is
    more than the roundings of `limit` and of D, of u times at most 3(Q + G) each. Products of the small terms
    are left out; e <= WIDEST_SCAN keeps them below a fiftieth. `tiny` is more than float32's underflow costs:
    2^-126 (1 + |q| + |g|) for each of e terms.
    """
    return 4 * (e + 16) * 2.0**-24, e * 2.0**-100


def _scan_rows(e: int) -> int:
    return max(1, SCAN_BYTES // (4 * e))


def _multiplies_in_float32(q: int, e: int) -> bool:
    """False where autocast or a precision setting makes the scan's products bfloat16 or TF32.

    An example tells: (1 + 2^-12)(1 + 2^-11) needs all 24 bits of a float32, and the other terms are zero.
    """
    size = _scan_rows(e)
    left, rows = torch.zeros(q, e), torch.zeros(size, e)
    left[:, 0], rows[:, 0] = 1 + 2**-12, 1 + 2**-11
    products = torch.mm(left, rows.T, out=torch.empty(q, 2 * size)[:, :size])
    return bool((products == (1 + 2**-12) * (1 + 2**-11)).all())


def squared_distances(query: Tensor, gallery: Tensor) -> Tensor:
    """||query_i - gallery_j||^2 as float32: [q, e], [g, e] -> [q, g]; a pair's bits are the same anywhere.

    One float64 matrix product gives q^2 + g^2 - 2qg, whose last digits depend on how the BLAS blocks the sum.
    They matter only where the error bound spans two float32 values: those pairs (about one in 100,000) get
    the reference sum `_halving_sum` instead, and all others provably round to what it would have given.
    """
    query, gallery = query.double(), gallery.double()
    query_sq, gallery_sq = (torch.linalg.vector_norm(x, dim=1) ** 2 for x in (query, gallery))
    # |error| <= (e + 3) u (|q| + |g|)^2 <= (e + 3) eps (q^2 + g^2); 16 covers the reference's, 2 for safety
    bound = 2 * (query.shape[1] + 16) * torch.finfo(torch.float64).eps * (query_sq.max() + gallery_sq)
    upper = torch.addmm(gallery_sq + bound, query, gallery.T, alpha=-2).add_(query_sq[:, None])
    distances = upper.float()
    undecided = (upper.sub_(2 * bound).float() != distances).nonzero()
    for pairs in undecided.split(max(1, MEMORY_BUDGET // (32 * query.shape[1]))):
        i, j = pairs.unbind(1)
        distances[i, j] = _halving_sum((query[i] - gallery[j]) ** 2).float()
    return distances


def _keys(distances: Tensor, index: Tensor) -> Tensor:
    """Distinct int64 that order by distance, then by gallery index [g]: any sort or top-k of them is stable.

    The index is in the low 32 bits, the distance's bits above it: float32 >= 0 are ordered like their bits.
    """
    return (distances.view(torch.int32).to(torch.int64) << 32) | index


def _squares(keys: Tensor) -> Tensor:
    """The squared distances in keys."""
    return (keys >> 32).to(torch.int32).view(torch.float32)


def _sort(keys: Tensor) -> Tensor:
    """Sorts each row; on the CPU by numpy, whose integer sort is ten times as fast as PyTorch's."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return keys.sort(dim=1).values


def _halving_sum(x: Tensor) -> Tensor:
    """Row sums [rows, e] -> [rows] by adding halves: elementwise, so no library chooses another order."""
    x = torch.nn.functional.pad(x, (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))
    while x.shape[1] > 1:
        left, right = x.chunk(2, dim=1)
        x = left + right
    return x[:, 0]


def _double(x: Tensor) -> Tensor:
    """float64 on the tensor's own device, or on the CPU where the device (Apple's GPU) has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _tensor(rows: Tensor | np.ndarray) -> Tensor:
    """The rows where they are, a memory map's in their file; only an array read backwards is copied."""
    if isinstance(rows, Tensor):
        return rows.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that must not be written to: none is
        return torch.from_numpy(rows if min(rows.strides) >= 0 else rows.copy())


def _check_shapes(query: Tensor, gallery: Tensor | np.ndarray, k: int, chunk: int | None) -> None:
    if k < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"k and chunk must be at least 1; got k = {k}, chunk = {chunk}.")
    for name, x in (("query", query), ("gallery", gallery)):
        if x.ndim != 2 or 0 in x.shape:
            shape = tuple(x.shape)
            raise ValueError(f"The {name} features must be a non-empty [rows, e] matrix; got shape {shape}.")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"Query and gallery features must be of one width; got {query.shape[1]} and "
                         f"{gallery.shape[1]}: encode both with the same model.")


def _check_rows(lengths: Tensor, name: str, start: int = 0) -> None:
    """ValueError where the lengths [rows] of feature vectors are such that they cannot be ranked."""
    # Two lengths below 9e18 add up to a distance whose square still fits float32. NaN compares false.
    fine = lengths < 9e18
    if not fine.all():
        bad = (~fine).nonzero()
        raise ValueError(f"{len(bad)} of {len(lengths)} {name} feature rows hold NaN, infinite or "
                         f"overflowing values (first: row {start + int(bad[0])}); check images and model.")


def zero_shot_accuracy(logits: Tensor, labels: Tensor,
                       unseen_ids: Sequence[int] | Tensor) -> dict[str, dict[str, float]]:
    """ZSL and generalised ZSL accuracy, in 0..1, of logits [b, c] and labels [b].

    `zsl`: unseen-class images among unseen classes; `unseen`, `seen`: images of these classes among all
    classes; `h` = 2US / (U + S). Under `instance` averaged over images, under `class` over the classes that
    have images. NaN where there is no image. Raises ValueError for NaN logits and ids outside 0..c-1.
    """
    labels, unseen_ids = (torch.as_tensor(ids, device=logits.device) for ids in (labels, unseen_ids))
    c = logits.shape[1]
    known = all(ids.dtype != torch.bool and ((0 <= ids) & (ids < c)).all() for ids in (labels, unseen_ids))
    if not known or logits.isnan().any():
        raise ValueError(f"expected logits [b, {c}] without NaN, and labels and unseen_ids of 0 to {c - 1}.")
    is_unseen = torch.zeros(c, dtype=torch.bool, device=logits.device)
    is_unseen[unseen_ids.long()] = True
    among_unseen = logits.masked_fill(~is_unseen, -torch.inf).argmax(dim=1)
    return predicted_accuracy(logits.argmax(dim=1), among_unseen, labels, is_unseen)


def predicted_accuracy(everywhere: Tensor, among_unseen: Tensor, labels: Tensor,
                       is_unseen: Tensor) -> dict[str, dict[str, float]]:
    """`zero_shot_accuracy` of predictions: the class of each image among all classes [b] and among the unseen
    ones [b], labels [b], and which classes are unseen [c].
    """
    everywhere, among_unseen, labels = everywhere.cpu(), among_unseen.cpu(), labels.cpu()
    of_unseen = is_unseen.cpu()[labels]

    def accuracy(predicted: Tensor, images: Tensor, by_class: bool) -> float:
        hits = (predicted == labels)[images].double()
        if by_class:
            hits = torch.tensor([*class_means(hits, labels[images]).values()], dtype=torch.float64)
        return float(hits.mean())

    result = {}
    for name, by_class in (("instance", False), ("class", True)):
        u, s = accuracy(everywhere, of_unseen, by_class), accuracy(everywhere, ~of_unseen, by_class)
        result[name] = {"zsl": accuracy(among_unseen, of_unseen, by_class), "unseen": u, "seen": s,
                        "h": 2 * u * s / (u + s) if u + s else 0.0}
    return result
