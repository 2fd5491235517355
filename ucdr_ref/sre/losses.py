"""The losses of SRE-CLIP (arXiv 2510.21808), a pure function per equation. Imports nothing of the package."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relation_structure(class_vectors: Tensor, embeddings: Tensor, permutation: Tensor,
                       limit: int = 2**23) -> Tensor:
    """L-structure: where class vectors have anchor a nearer to class u than to v, so should the embeddings.

    Mean over { D0(a, u) < D0(a, v) } of relu(D(a, u) - D(a, v)), 0 when there is none. D0, D: Euclidean
    distances between class vectors [c, w] and between embeddings E [c, h]; a: every class; (u, v): classes at
    positions (i, j) of `permutation` [c] with i + j <= k - 1, k = c. That makes c k^2 / 2 triples (a, u, v);
    where they pass `limit` (beyond 256 classes), k is lowered: the pairs are a sample (S8).
    """
    c = len(permutation)
    k = c if c ** 3 <= 2 * limit else max(2, int((2 * limit / c) ** 0.5))  # S8
    exact = "donot_use_mm_for_euclid_dist"  # a matrix product would blur small distances and ties
    d0, d = (torch.cdist(x, x[permutation[:k]], compute_mode=exact) for x in (class_vectors, embeddings))
    position = torch.arange(k, device=permutation.device)
    # S1: the released code takes D's diagonal in place of these pairs of columns.
    i, j = (position[:, None] + position < k).nonzero().unbind(dim=1)
    nearer = d0[:, i] < d0[:, j]
    violation = F.relu(d[:, i] - d[:, j]) * nearer
    return violation.sum() / nearer.sum().clamp(min=1)


def alignment_retention(similarity: Tensor, embeddings: Tensor) -> Tensor:
    """L-retain: mean over images and classes of (P_ba - <E_yhat, E_a>)^2, yhat = argmax_a P_ba.

    similarity P [b, c]: cosines of images and classes, or these over the temperature (S3); embeddings E
    [c, h], L2-normalised. Both have a gradient.
    """
    predicted = embeddings[similarity.argmax(dim=1)]
    return F.mse_loss(similarity, predicted @ embeddings.T)


def entropy(logits: Tensor) -> Tensor:
    """L-ent: - sum_c p ln p with p = softmax(logits [b, c]), mean over the batch."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def bank_diversity(bank_logits: Tensor) -> Tensor:
    """L-div: sum_c m ln m, m = mean over rows of softmax(bank_logits [rows, c]); least for a uniform m."""
    log_m = F.log_softmax(bank_logits, dim=1).logsumexp(dim=0) - math.log(len(bank_logits))
    return (log_m.exp() * log_m).sum()


def seen_bias(logits: Tensor, unseen: Tensor, kappa: float) -> Tensor:
    """L-bias: u + kappa^2 / u, least at u = kappa; u: total probability of the unseen classes, batch mean.

    logits [b, c], unseen: their class indices.
    """
    u = logits.softmax(dim=1)[:, unseen].sum(dim=1).mean()
    return u + kappa ** 2 / u
