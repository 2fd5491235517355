"""Retrieval metrics and exact search: pure functions of features and labels. Imports nothing from the
package.

Conventions (the evaluation protocol of UCDR-Adapter, shared with ProS and SnMpNet):

- Ranking is by squared Euclidean distance of the vectors as they are given. Equal distances keep the
gallery's order.
- The distance of a pair is *defined* as the float32 nearest to one fixed float64 sum over the pair's two
vectors
  (`squared_distances`). It depends on nothing else: not on the chunk, the thread count, the BLAS or the
  device. So copies of one vector tie exactly, every chunk size gives the same ranks, and `search` and
  `retrieval` always agree.
- AP@k is divided by the number of hits within the first k (`mAP@k`), as published tables are; the textbook
divisor
  min(relevant, k) is reported beside it (`mAP@k/relevant`). A query without hit scores 0 and stays in the
  mean.
- A gallery smaller than k: k is the gallery size. The keys keep the k that was asked for, `k_used` tells the
cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEMORY_BUDGET = 2**26  # bytes of a chunk when no size is given; larger ones leave the CPU's cache and are slower
BYTES_PER_PAIR = 48  # of a chunk: distances and bounds in float64, keys and sorted keys, hits, precisions
SCAN_BYTES = 2**19  # of gallery rows that `search` reads at once; they stay in a core's cache
WIDEST_SCAN = 2**16  # features; the scan's error bound is derived for fewer
INDEX = 0xFFFFFFFF  # the bits of a key that hold the gallery index


def retrieval(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    k: int = 200,
    chunk: int | None = None,
) -> dict[str, Any]:
    """Rank the gallery for every query and score the ranks.

    query [q, e], query_labels [q], gallery [g, e], gallery_labels [g]; labels are integers of one common
    numbering. `chunk` queries are ranked at once, with one matrix product and one sort on the queries'
    device, in O(chunk * g) memory; None takes what MEMORY_BUDGET allows.

    Returns, for k = 200:
      `mAP@200`, `mAP@200/relevant`, `Prec@200`, `mAP@all`, `Prec@100`   floats in 0..1, means over all
      queries `AP`, `AP@all`                 float64 tensors [q] on the CPU: AP@k and AP@g of each query
      `per_class`, `per_class@all`   {label: mean of `AP` / of `AP@all` over that class's queries}
      `queries`, `gallery`           q and g
      `no_relevant`                  number of queries whose class is absent from the gallery (they score 0)
      `k`, `k_used`                  what was asked for, and min(k, g)
    At g the two divisors are the same number, so mAP@all has one variant. Prec@100 is cut to g likewise.

    Raises ValueError on empty or mismatching input and on features that are not finite. Source: evaluation
    protocol of UCDR-Adapter (WACV 2025); divisor as in the benchmark's released code.
    """
    _check_k(k, chunk)
    _check_rows(query, "query", query_labels)
    _check_rows(gallery, "gallery", gallery_labels)
    _check_widths(query, gallery)
    query = _double(query)
    gallery = _double(gallery).to(query.device)
    query_labels, gallery_labels = query_labels.to(query.device), gallery_labels.to(query.device)
    index = torch.arange(len(gallery), device=query.device)
    k_used, hundred = min(k, len(gallery)), min(100, len(gallery))

    columns: list[Tensor] = []
    for rows, labels in zip(_split(query, chunk, len(gallery)), _split(query_labels, chunk, len(gallery)),
                            strict=True):
        order = _sort(_keys(squared_distances(rows, gallery), index)) & INDEX
        hits = gallery_labels[order] == labels[:, None]
        relevant, first = hits.sum(1), hits[:, :k_used]
        precisions = [hits[:, :cut].sum(1, dtype=torch.float64) / cut for cut in (k_used, hundred)]
        scores = [average_precision(first), average_precision(first, "relevant", relevant),
                  average_precision(hits)]
        columns.append(torch.stack([*scores, *precisions, relevant.double()]))
    ap, ap_relevant, ap_all, precision, precision_100, relevant = torch.cat(columns, dim=1).cpu()
    return {
        f"mAP@{k}": ap.mean().item(),
        f"mAP@{k}/relevant": ap_relevant.mean().item(),
        "Prec@100": precision_100.mean().item(),
        f"Prec@{k}": precision.mean().item(),
        "mAP@all": ap_all.mean().item(),
        "AP": ap,
        "AP@all": ap_all,
        "per_class": class_means(ap, query_labels),
        "per_class@all": class_means(ap_all, query_labels),
        "queries": len(query),
        "gallery": len(gallery),
        "no_relevant": int((relevant == 0).sum()),
        "k": k,
        "k_used": k_used,
    }


def average_precision(hits: Tensor, divisor: str = "retrieved", relevant: Tensor | None = None) -> Tensor:
    """AP@k = sum over hits i <= k of (hits up to i) / i, over the divisor; 0 where that is 0.

    hits [..., k] (true where the item at that rank is relevant) -> [...] float64. `divisor`: "retrieved"
    divides by the hits within the list (published tables), "relevant" by min(relevant, k), with `relevant`
    [...] the number of items of the query's class in the gallery.
    """
    hits = hits.bool()
    k = hits.shape[-1]
    if divisor == "retrieved":
        count = hits.sum(-1)
    elif divisor == "relevant" and relevant is not None:
        count = relevant.clamp(max=k)
    else:
        raise ValueError(f'divisor must be "retrieved", or "relevant" with the counts `relevant`; got '
                         f'{divisor!r}.')
    ranks = torch.arange(1, k + 1, device=hits.device, dtype=torch.int32)
    precision_at_hits = hits.cumsum(-1, dtype=torch.int32) / ranks * hits
    return precision_at_hits.sum(-1, dtype=torch.float64) / count.clamp(min=1)


def class_means(values: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean of values [q] over the queries of each class in labels [q]: {label: mean}, labels ascending."""
    classes, position, count = labels.to(values.device).unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(classes)).index_add_(0, position, values)
    return dict(zip(classes.tolist(), (sums / count).tolist(), strict=True))


def search(query: Tensor, gallery: Tensor | np.ndarray, k: int,
           chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of each query, exactly, with the gallery read `chunk` rows at a time.

    query [q, e]; gallery [g, e], a tensor or an array such as a memory map larger than memory: O(q * chunk)
    memory whatever g is. Returns (Euclidean distances [q, k] float32, gallery indices [q, k]) on the query's
    device, nearest first, equal squared distances by index; k is cut to g. Raises ValueError as `retrieval`
    does.

    On the CPU a float32 scan (`_candidates`) first leaves out the rows that provably are among nobody's k
    nearest.
    """
    _check_k(k, chunk)
    _check_rows(query, "query")
    if len(gallery) == 0:
        raise ValueError("The gallery is empty; give at least one row.")
    _check_widths(query, gallery)
    home, query, k = query.device, _double(query.detach()), min(k, len(gallery))
    q, e = query.shape
    block = max(1, SCAN_BYTES // (4 * e))
    usual = max(1, MEMORY_BUDGET // (BYTES_PER_PAIR * q + 16 * e))
    on_cpu = query.device.type == "cpu" and (not isinstance(gallery, Tensor) or gallery.device.type == "cpu")
    scan = on_cpu and q * k < min(chunk or usual,
                                  len(gallery)) and e <= WIDEST_SCAN and _multiplies_in_float32(q, block, e)
    if chunk is None:  # few rows of a scanned chunk are turned to float64
        chunk = max(1, MEMORY_BUDGET // (BYTES_PER_PAIR * q + 4 * e)) if scan else usual

    best = torch.empty(q, 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(gallery), chunk):
        rows = gallery[start : start + chunk]
        index = torch.arange(start, start + len(rows), device=query.device)
        if scan and k <= len(rows):
            products, norms = _scan(query, rows, block)
            # a number below the squared limit of _check_rows; NaN compares false
            if not bool((norms < 7e37).all()):
                _check_rows(_tensor(rows), "gallery", offset=start)
            chosen = _candidates(query, products, norms, k, best)
            rows, index = rows[chosen if isinstance(rows, Tensor) else chosen.numpy()], index[chosen]
            if len(chosen) == 0:
                continue
        else:
            rows = _tensor(rows)
            _check_rows(rows, "gallery", offset=start)
        new = _keys(squared_distances(query, _tensor(rows).to(query.device)), index)
        best = torch.cat([best, new], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1, largest=False, sorted=True).values
    return _squares(best).sqrt().to(home), (best & INDEX).to(home)


def _candidates(query: Tensor, products: Tensor, norms: Tensor, k: int, best: Tensor) -> Tensor:
    """Positions, ascending, of the rows that may be among the k nearest of some query [q, e] (float64).

    products [q, c] and norms [c] are those of `_scan`, best [q, <= k] the keys of the nearest earlier rows.

    With c and tiny of `_scan_error`, Q = |q|^2, G = |g|^2 and low = (1 - c)G - 2 q.g, the defined distance D
    of a pair is
        low - cQ - tiny < D - Q < low + 2cG + cQ + tiny,
    so a row above the right-hand side of k others, or above the D of k earlier rows, is not among the k
    nearest.
    """
    c, tiny = _scan_error(query.shape[1])
    query_sq = (query**2).sum(1)
    low = torch.add(norms * (1 - c), products, alpha=-2)
    smallest, position = low.topk(k, dim=1, largest=False, sorted=False)
    limit = (smallest.double() + 2 * c * norms[position]).amax(1)
    if best.shape[1] == k:
        limit = torch.minimum(limit, _squares(best[:, -1]) * (1 + c) - query_sq)
    limit = (limit + 2 * c * query_sq + tiny).float()
    return ((low - limit[:, None]).amin(0) <= 0).nonzero()[:, 0]


def _scan_error(e: int) -> tuple[float, float]:
    """(c, tiny) of `_candidates`, for features of e numbers.

    Let u = 2^-24. Products and norms are sums of e float32 terms: rounding the two inputs costs a term 2u,
    multiplying u, and adding (e - 1)u, in whatever order, with or without FMA. So, by Cauchy-Schwarz, 2 q.g
    is off by at most 2(e + 3)u |q||g| <= (e + 3)u (Q + G), and G by (e + 3)u G. Forming `low` takes three
    roundings, of numbers of at most 2(Q + G). In all, G - 2 q.g is off by at most 2(e + 7)u (Q + G). c is
    twice that and 36u more: what is left, at least c(Q + G) / 2, is more than the roundings of `limit` and of
    D, of u times at most 3(Q + G) each. Products of the small terms are left out; e <= WIDEST_SCAN keeps them
    below a fiftieth. `tiny` is more than float32's underflow costs: 2^-126 (1 + |q| + |g|) for each of e
    terms.
    """
    return 4 * (e + 16) * 2.0**-24, e * 2.0**-100


def _scan(query: Tensor, rows: Tensor | np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """Products [q, c] and squared norms [c] in float32, `size` rows at a time: the norms read them from the
    cache.
    """
    left = query.float()
    products, norms = torch.empty(len(query), len(rows)), np.empty(len(rows), np.float32)
    copy = torch.empty(size, query.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # such rows get their own error
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            if isinstance(block, Tensor):
                block = block.detach().float()
            else:
                np.copyto(copy.numpy()[: len(block)], block, casting="unsafe")
                block = copy[: len(block)]
            torch.mm(left, block.T, out=products[:, start : start + size])
            block = block.numpy()
            if hasattr(np, "vecdot"):  # numpy 2: twice as fast
                np.vecdot(block, block, out=norms[start : start + size])
            else:
                np.einsum("ij,ij->i", block, block, out=norms[start : start + size])
    return products, torch.from_numpy(norms)


def _multiplies_in_float32(q: int, size: int, e: int) -> bool:
    """False where autocast or a precision setting makes `_scan`'s products bfloat16 or TF32: asked by an
    example.

    (1 + 2^-12)(1 + 2^-11) needs all 24 bits of a float32; the other terms are zero, so no order of addition
    matters.
    """
    left, rows = torch.zeros(q, e), torch.zeros(size, e)
    left[:, 0], rows[:, 0] = 1 + 2**-12, 1 + 2**-11
    products = torch.mm(left, rows.T, out=torch.empty(q, 2 * size)[:, :size])
    return bool((products == (1 + 2**-12) * (1 + 2**-11)).all())


def _tensor(rows: Tensor | np.ndarray) -> Tensor:
    return rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def squared_distances(query: Tensor, gallery: Tensor) -> Tensor:
    """||query_i - gallery_j||^2 as float32: [q, e], [g, e] -> [q, g], the same bits for a pair in whatever
    company.

    One float64 matrix product gives q^2 + g^2 - 2qg, whose last digits depend on how the BLAS blocks the sum.
    They matter only where the error bound spans two float32 values: those pairs (about one in 100,000) get
    the reference sum `_halving_sum` instead, and all others provably round to what it would have given.
    """
    query, gallery = query.double(), gallery.double()
    query_sq, gallery_sq = torch.linalg.vector_norm(query,
                                                    dim=1) ** 2, torch.linalg.vector_norm(gallery, dim=1) ** 2
    # |error| <= (e + 3) u (|q| + |g|)^2 <= (e + 3) eps (q^2 + g^2); 16 covers the reference sum's, and 2 is
    # for safety.
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

    The index is in the low 32 bits, the distance's own bits above it: float32 >= 0 are ordered like their
    bits.
    """
    return (distances.view(torch.int32).to(torch.int64) << 32) | index


def _squares(keys: Tensor) -> Tensor:
    """The squared distances in keys."""
    return (keys >> 32).to(torch.int32).view(torch.float32)


def _sort(keys: Tensor) -> Tensor:
    """Sorts each row. On the CPU by numpy, whose integer sort is vectorised and ten times as fast as
    PyTorch's.
    """
    return torch.from_numpy(np.sort(keys.numpy(),
                                    axis=1)) if keys.device.type == "cpu" else keys.sort(dim=1).values


def _halving_sum(x: Tensor) -> Tensor:
    """Row sums [rows, e] -> [rows] by adding halves: elementwise additions, so no library chooses another
    order.
    """
    x = torch.nn.functional.pad(x, (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))
    while x.shape[1] > 1:
        left, right = x.chunk(2, dim=1)
        x = left + right
    return x[:, 0]


def _double(x: Tensor) -> Tensor:
    """float64 on the tensor's own device, or on the CPU where the device (Apple's GPU) has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _split(x: Tensor, chunk: int | None, gallery_size: int) -> tuple[Tensor, ...]:
    return x.split(chunk or max(1, MEMORY_BUDGET // (BYTES_PER_PAIR * gallery_size)))


def _check_k(k: int, chunk: int | None) -> None:
    if k < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"k and chunk must be at least 1; got k = {k}, chunk = {chunk}.")


def _check_widths(query: Tensor, gallery: Tensor | np.ndarray) -> None:
    if gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"Query features {tuple(query.shape)} and gallery features {tuple(gallery.shape)} must be [q, e] "
            f"and "
            "[g, e] of one width e; encode both with the same model."
        )


def _check_rows(x: Tensor, name: str, labels: Tensor | None = None, offset: int = 0) -> None:
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"The {name} features must be a non-empty [rows, e] matrix; got shape "
                         f"{tuple(x.shape)}.")
    if labels is not None and labels.shape != x.shape[:1]:
        raise ValueError(f"{len(x)} {name} features need labels of shape [{len(x)}]; got "
                         f"{list(labels.shape)}.")
    # Two lengths below 9e18 add up to a distance whose square still fits float32. NaN compares false.
    bad = (~(torch.linalg.vector_norm(x.float(), dim=1) < 9e18)).nonzero()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(x)} {name} feature rows hold NaN, infinite or overflowing values (first: "
            f"row "
            f"{offset + int(bad[0])}); a rank would mean nothing, so check the images and the model's "
            f"precision."
        )


def zero_shot_accuracy(logits: Tensor, labels: Tensor,
                       unseen_ids: Sequence[int] | Tensor) -> dict[str, dict[str, float]]:
    """ZSL and generalised ZSL accuracy, in 0..1, of logits [b, c] and labels [b].

    `zsl`: unseen-class images among unseen classes; `unseen`, `seen`: images of these classes among all
    classes; `h` = 2US / (U + S). Under `instance` averaged over images, under `class` over the classes that
    have images. NaN where there is no image.
    """
    is_unseen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    is_unseen[torch.as_tensor(unseen_ids, dtype=torch.long)] = True
    among_unseen = logits.masked_fill(~is_unseen, -torch.inf).argmax(dim=1)
    return predicted_accuracy(logits.argmax(dim=1), among_unseen, labels, is_unseen)


def predicted_accuracy(everywhere: Tensor, among_unseen: Tensor, labels: Tensor,
                       is_unseen: Tensor) -> dict[str, dict[str, float]]:
    """`zero_shot_accuracy` of predictions: the class of each image among all classes [b] and among the unseen
    ones [b], labels [b], and which classes are unseen [c].
    """
    everywhere, among_unseen, labels, is_unseen = (part.cpu()
                                                   for part in (everywhere, among_unseen, labels, is_unseen))
    of_unseen, c = is_unseen[labels], len(is_unseen)

    def accuracy(predicted: Tensor, images: Tensor, by_class: bool) -> float:
        hits, classes = (predicted == labels)[images].double(), labels[images]
        if not by_class:
            return float(hits.mean())
        counts = torch.bincount(classes, minlength=c)
        right = torch.bincount(classes, weights=hits, minlength=c)
        return float((right[counts > 0] / counts[counts > 0]).mean())

    result = {}
    for name, by_class in (("instance", False), ("class", True)):
        u, s = accuracy(everywhere, of_unseen, by_class), accuracy(everywhere, ~of_unseen, by_class)
        result[name] = {"zsl": accuracy(among_unseen, of_unseen, by_class), "unseen": u, "seen": s,
                        "h": 2 * u * s / (u + s) if u + s else 0.0}
    return result
