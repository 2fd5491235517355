"""A closed form in place of training: the domains' shifts removed, the spread within classes whitened.

Not published: what a trained method must be shown beside. z [n, e]: image features; N(v) = v / |v|.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP

STRENGTHS = (3.0, 1.0, 10.0, 0.3, 0.1, 0.03)  # lambda; of equally good ones the first is taken
ROUND_OFF = 1e-12  # squared length that features of length 1 in float32 cannot tell from 0


def feature_mean(z: Tensor) -> Tensor:
    """Mean of N(z): [e]"""
    return F.normalize(z.float(), dim=1).mean(dim=0, dtype=torch.float64).float()


def center(z: Tensor, mean: Tensor | None = None) -> Tensor:
    """N(N(z) - mean) [n, e]; mean: another set's `feature_mean`, or z's own (transductive)."""
    mean = feature_mean(z) if mean is None else mean
    return F.normalize(F.normalize(z.float(), dim=1) - mean, dim=1)


def units_by_class(z: Tensor, class_ids: Tensor) -> Iterator[Tensor]:
    """N(z) in float64 of one class after another, those without an image left out"""
    return (F.normalize(z[class_ids == k].double(), dim=1) for k in class_ids.unique())


def domain_mean(z: Tensor, class_ids: Tensor) -> Tensor:
    """m_d [e]: mean over the classes of one domain of the class's mean N(z)"""
    return torch.stack([rows.mean(dim=0) for rows in units_by_class(z, class_ids)]).mean(dim=0)


def remove(z: Tensor, mean: Tensor, subspace: Tensor) -> Tensor:
    """a = N((z - m)(I - U U^T)): z [n, e], m [e], U [e, s - 1] -> [n, e]"""
    z = z - mean
    return F.normalize(z - (z @ subspace) @ subspace.T, dim=1)


class ClosedForm(nn.Module):
    """z -> N(a W)"""

    mean: Tensor  # m [e]
    subspace: Tensor  # U [e, s - 1]
    whitening: Tensor  # W [e, e]

    def __init__(self, mean: Tensor, subspace: Tensor, whitening: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("subspace", subspace.float())
        self.register_buffer("whitening", whitening.float())

    def forward(self, z: Tensor) -> Tensor:
        """z [n, e] -> [n, e], L2-normalised"""
        with torch.autocast(z.device.type, enabled=False):
            a = remove(F.normalize(z.float(), dim=1), self.mean, self.subspace)
            return F.normalize(a @ self.whitening, dim=1)


class Measured(NamedTuple):
    mean: Tensor
    subspace: Tensor
    within: Tensor  # S_w [e, e]

    def form(self, strength: float) -> ClosedForm:
        """With W = (S_w + lambda tr(S_w) / e I)^(-1/2), lambda = strength."""
        values, vectors = torch.linalg.eigh(self.within)
        ridge = strength * values.mean() + ROUND_OFF  # S_w = 0 where images of a class are all alike
        whitening = (vectors * (values + ridge).rsqrt()) @ vectors.T
        return ClosedForm(self.mean, self.subspace, whitening)


def measure(z: Tensor, class_ids: Tensor, domain_ids: Tensor, s: int) -> Measured:
    """m, U and S_w, in float64, of source features z [n, e] with ids [n].

    m: mean of the m_d. U: orthonormal basis of the span of m_d - m, filled with zeros, which remove nothing.
    S_w = 1/n sum over images of d^T d, d = a - mean of a over all images of its class, in all domains.
    Raises ValueError for a domain without an image.
    """
    images = torch.bincount(domain_ids, minlength=s).tolist()
    if 0 in images:
        raise ValueError(f"source domains have {images} training images; each needs one or more")
    own = [domain_ids == d for d in range(s)]
    means = torch.stack([domain_mean(z[rows], class_ids[rows]) for rows in own])
    mean = means.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(means - mean, full_matrices=False)  # longest first
    subspace = (directions * (lengths ** 2 > ROUND_OFF)[:, None])[: s - 1].T

    within = torch.zeros_like(mean.outer(mean))
    for rows in units_by_class(z, class_ids):
        a = remove(rows, mean, subspace)
        d = a - a.mean(dim=0)
        within += d.T @ d / len(z)
    return Measured(mean, subspace, within)


class ClosedFormAdapter(nn.Module):
    """CLIP's features in closed form, as a method."""

    PHASES: tuple[str, ...] = ()

    def __init__(self, clip: CLIP, form: ClosedForm) -> None:
        super().__init__()
        self.clip, self.form = clip.requires_grad_(False), form

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> L2-normalised features [b, e]"""
        return self.form(self.clip.encode_image(images))
