"""A closed form beside SRE-CLIP: ridge regression from image features to class vectors, and calibration.

Not published: what a trained method must be shown beside. N(v) = v / |v|; features count at unit length, in
float64 only CHUNK rows at a time.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 4096
FOLDS = 5
STRENGTHS = tuple(10 ** (k / 2) for k in range(-4, 7))  # lambda, 0.01 to 1000
Take = Callable[[Tensor], Tensor]  # indices [b] -> features [b, e], from memory or from files


class Ridge(nn.Module):
    """Image features to the space of class vectors, and cosines there. Made by `fit`."""

    weights: Tensor  # W [e, w]
    anchors: Tensor  # N(a_c) [c, w], a_c centred over the classes

    def __init__(self, weights: Tensor, anchors: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights.float())
        self.register_buffer("anchors", anchors.float())

    def forward(self, features: Tensor) -> Tensor:
        """z [b, e] -> N(z W) [b, w], in float32 whatever the encoder's arithmetic"""
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(F.normalize(features.float(), dim=1) @ self.weights, dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Cosines [b, c] of z W and a_c for features z [b, e]."""
        return self(features) @ self.anchors.T


def fit(take: Take, labels: Tensor, class_vectors: Tensor,
        strength: float | None = None) -> tuple[Ridge, float]:
    """W = (Z^T Z + lambda I)^-1 Z^T A, and lambda: `strength`, or the one chosen on left-out seen classes.

    Z [n, e]: N(z) of the source images, z = take(indices); labels [n]: class indices; A [n, w]: each image's
    a_c, of class_vectors [c, w] less their mean over all c classes. Z is read once, and once more to choose.
    The seen classes are dealt, in order, into five groups (fewer if a group had less than two). Each group is
    left out in turn and its images classified among its classes; of STRENGTHS, the lambda with most hits, the
    larger of equals, is taken. Fewer than four seen classes leave nothing to choose by: 1.
    """
    a = class_vectors.double()
    a = a - a.mean(dim=0)
    anchors = F.normalize(a, dim=1)
    seen = labels.unique()
    count = max(1, min(FOLDS, len(seen) // 2))
    groups = [seen[k::count] for k in range(count)]
    folds = [torch.isin(labels, group).nonzero().squeeze(1) for group in groups]
    parts = [moments(take, labels, a, images) for images in folds]
    square, cross = (torch.stack(part).sum(dim=0) for part in zip(*parts))
    if strength is None and count == 1:
        strength = 1.0
    elif strength is None:
        found = torch.zeros(len(STRENGTHS), dtype=torch.long, device=labels.device)
        for group, images, (own_square, own_cross) in zip(groups, folds, parts):
            w = solve(square - own_square, cross - own_cross, STRENGTHS)  # from all other classes
            scorers = w @ anchors[group].T  # of cosines times |z W|, which is the same for every class
            for part, z in chunks(take, images):
                found += (group[(z @ scorers).argmax(dim=2)] == labels[part]).sum(dim=1)
        strength = max(zip(found.tolist(), STRENGTHS))[1]
    return Ridge(solve(square, cross, [strength])[0], anchors), strength


def chunks(take: Take, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices [b] of the images and their N(z) [b, e] in float64, part by part."""
    for part in images.split(CHUNK):
        yield part, F.normalize(take(part).double(), dim=1)


def moments(take: Take, labels: Tensor, a: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Z^T Z [e, e] and Z^T A [e, w] over `images`, indices into labels."""
    e = take(images[:1]).shape[1]
    square, cross = a.new_zeros(e, e), a.new_zeros(e, a.shape[1])
    for part, z in chunks(take, images):
        square.addmm_(z.T, z)
        cross.addmm_(z.T, a[labels[part]])
    return square, cross


def solve(square: Tensor, cross: Tensor, strengths: Sequence[float]) -> Tensor:
    """W for every lambda, [strengths, e, w], by one decomposition of Z^T Z."""
    values, vectors = torch.linalg.eigh(square)
    turned = vectors.T @ cross
    values = values.clamp(min=0)
    return torch.stack([vectors @ (turned / (values + strength)[:, None]) for strength in strengths])


def calibrated(scores: Tensor, unseen_ids: Sequence[int] | Tensor, kappa: float) -> Tensor:
    """scores [n, c], float64, less one number for the seen classes: a share kappa of predictions is unseen.

    As transductive as L-bias, whose prior it is. The number is between two images' margins, best seen - best
    unseen; equal margins fall to one side together. Where kappa n images cannot be had, the nearest count is,
    the smaller of equals.
    Raises ValueError for kappa outside 0..1, no image, or margins that are not finite.
    """
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa is {kappa}; a share of images is a number from 0 to 1")
    scores = scores.double()
    unseen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    unseen[torch.as_tensor(unseen_ids, dtype=torch.long, device=scores.device)] = True
    margins = scores[:, ~unseen].amax(dim=1) - scores[:, unseen].amax(dim=1)
    if len(margins) == 0 or not margins.isfinite().all():
        raise ValueError(f"calibration of {len(margins)} images: expected one or more, each with a finite "
                         "score of a seen and of an unseen class")
    edges, counts = margins.unique(return_counts=True)
    reached = F.pad(counts.cumsum(0), (1, 0))  # unseen predictions for a number below edge 0, 1, ...
    edges = torch.cat([edges[:1] - 1, edges, edges[-1:] + 1])
    k = int((reached - kappa * len(scores)).abs().argmin())
    return torch.where(unseen, scores, scores - edges[k:k + 2].mean())
