"""A closed form in place of training: the domains' shifts removed, the spread within classes whitened.

Not published: what a trained method must be shown beside. It takes one pass of labelled source images and two
decompositions. Features z [n, e] count at unit length; N(v) = v / |v|; float64, CHUNK rows at a time.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP

CHUNK = 4096
STRENGTHS = (0.3, 1.0, 3.0, 10.0)  # lambda
ROUND_OFF = 1e-12  # squared length that features of length 1 in float32 cannot tell from 0


def chunks(z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """N(z) of z [n, e] in float64, part by part, and where each part stands."""
    for start in range(0, len(z), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, F.normalize(z[rows].double(), dim=1)


def domain_means(z: Tensor, class_ids: Tensor, domain_ids: Tensor, s: int) -> Tensor:
    """m_d [s, e], float64: over the classes that domain d has, the mean of the class's mean in d; ids [n].

    Every class counts once, so that other class frequencies in a domain do not pass for its shift.
    Raises ValueError for a domain without an image.
    """
    images = torch.bincount(domain_ids, minlength=s)
    if len(images) != s or not images.all():
        raise ValueError(f"{s} source domains have {images.tolist()} training images; each needs one or more")
    c = int(class_ids.max()) + 1
    groups = domain_ids * c + class_ids
    sums = z.new_zeros(s * c, z.shape[1], dtype=torch.float64)
    for rows, part in chunks(z):
        sums.index_add_(0, groups[rows], part)
    counts = torch.bincount(groups, minlength=s * c)[:, None]
    class_means = (sums / counts.clamp(min=1)).view(s, c, -1)
    return class_means.sum(dim=1) / (counts.view(s, c) > 0).sum(dim=1, keepdim=True)


def remove(z: Tensor, mean: Tensor, subspace: Tensor) -> Tensor:
    """a = N((z - m)(I - U U^T)): z [b, e], m [e], U [e, s - 1] -> [b, e]"""
    z = z - mean
    return F.normalize(z - (z @ subspace) @ subspace.T, dim=1)


class ClosedForm(nn.Module):
    """z -> N(a W). Made by `measure` and `form`; one of zeros in these shapes can load a checkpoint."""

    mean: Tensor  # m [e]
    subspace: Tensor  # U [e, s - 1]
    whitening: Tensor  # W [e, e]

    def __init__(self, mean: Tensor, subspace: Tensor, whitening: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("subspace", subspace), ("whitening", whitening)):
            self.register_buffer(name, value.float().contiguous())

    def forward(self, z: Tensor) -> Tensor:
        """z [b, e] -> [b, e], L2-normalised, in float32 whatever the encoder's arithmetic"""
        with torch.autocast(z.device.type, enabled=False):
            a = remove(F.normalize(z.float(), dim=1), self.mean, self.subspace)
            return F.normalize(a @ self.whitening, dim=1)


class Measured(NamedTuple):
    """Everything of a ClosedForm but lambda, float64: one decomposition of S_w serves every lambda."""

    mean: Tensor  # m [e]
    subspace: Tensor  # U [e, s - 1]
    values: Tensor  # [e], and
    vectors: Tensor  # [e, e]: S_w = vectors diag(values) vectors^T

    def form(self, strength: float | None) -> ClosedForm:
        """With W = (S_w + lambda tr(S_w) / e I)^(-1/2), lambda = strength; None, removal alone: W = I.

        So is W where images of a class are all alike, S_w = 0. Raises ValueError unless lambda is positive.
        """
        if strength is not None and not 0 < strength < math.inf:
            raise ValueError(f"whitening strength {strength}: expected a positive number, such as 3")
        trace = self.values.sum()
        whitening = torch.eye(len(self.mean), device=self.mean.device)
        if strength is not None and trace > ROUND_OFF:
            shrunk = self.values.clamp(min=0) + strength * trace / len(self.values)
            whitening = self.vectors * shrunk.rsqrt() @ self.vectors.T
        return ClosedForm(self.mean, self.subspace, whitening)


def measure(z: Tensor, class_ids: Tensor, domain_ids: Tensor, s: int) -> Measured:
    """m, U and S_w of source features z [n, e] with ids [n] of class and domain.

    m: mean of the m_d. U: orthonormal basis of the span of m_d - m; where that has under s - 1 dimensions,
    columns of zeros, which remove nothing, keep the shape of a checkpoint.
    S_w = 1/n sum over images of d^T d, d = a - mean of a over all images of its class: what still differs
    between domains counts as spread within the class. Raises ValueError as `domain_means` does.
    """
    means = domain_means(z, class_ids, domain_ids, s)
    mean = means.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(means - mean, full_matrices=False)  # longest first
    subspace = (directions * (lengths ** 2 > ROUND_OFF)[:, None])[: s - 1].T

    counts = torch.bincount(class_ids)[:, None]
    sums, squares = mean.new_zeros(len(counts), len(mean)), mean.new_zeros(len(mean), len(mean))
    for rows, part in chunks(z):
        a = remove(part, mean, subspace)
        sums.index_add_(0, class_ids[rows], a)
        squares.addmm_(a.T, a)
    within = (squares - sums.T @ (sums / counts.clamp(min=1))) / len(z)
    return Measured(mean, subspace, *torch.linalg.eigh(within))


def choose_strength(measured: Measured, score: Callable[[ClosedForm], float]) -> float:
    """The lambda of STRENGTHS whose form scores best on validation classes; of equals, the nearest to 3."""
    nearest_first = sorted(STRENGTHS, key=lambda strength: abs(math.log(strength / 3)))
    return max(nearest_first, key=lambda strength: score(measured.form(strength)))


def center(z: Tensor) -> Tensor:
    """Mean [e] of N(z) over a set z [n, e], float64"""
    return torch.stack([part.sum(dim=0) for _, part in chunks(z)]).sum(dim=0) / len(z)


def centred(z: Tensor, mean: Tensor | None = None) -> Tensor:
    """N(N(z) - mean) [n, e], float32; mean: another set's `center`, or z's own. Transductive.

    Equal images, or one alone, are their own mean: what is left of them is zero or round-off.
    """
    mean = center(z) if mean is None else mean
    return torch.cat([F.normalize(part - mean, dim=1).float() for _, part in chunks(z)])


class ClosedFormAdapter(nn.Module):
    """A closed form behind a method's `encode`; `base` is that of `ZeroShot`, or of a trained adapter.

    The state is the form's alone, m, U and W: a trained adapter has its own checkpoint.
    """

    PHASES: tuple[str, ...] = ()

    def __init__(self, clip: CLIP, base: Callable[[Tensor], Tensor], form: nn.Module) -> None:
        super().__init__()
        self.clip, self.base, self.form = clip.requires_grad_(False), base, form

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> L2-normalised features [b, e]"""
        return self.form(self.base(images))
