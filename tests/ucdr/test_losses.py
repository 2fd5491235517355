"""Every loss against an obvious loop."""
import math

import pytest
import torch
import torch.nn.functional as F

from ucdr_ref.ucdr import losses


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def test_image_text_contrast():
    torch.manual_seed(0)
    f, t, labels = unit(5, 8), unit(3, 8), [0, 2, 1, 1, 0]
    slow = 0.0
    for i, label in enumerate(labels):
        scores = [float(f[i] @ t[c]) / 0.07 for c in range(3)]
        slow -= math.log(math.exp(scores[label]) / sum(math.exp(score) for score in scores)) / 5
    assert losses.image_text_contrast(f, t, torch.tensor(labels), 0.07).item() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("valid", [[True, False, True, True, False], [False] * 5])
def test_triplet(power, valid):
    torch.manual_seed(0)
    f, positives, negatives, flags = unit(5, 8), unit(5, 3, 8), unit(5, 3, 8), torch.tensor(valid)
    slow = 0.0
    for i in range(5):
        for j in range(3):
            d_p, d_n = math.dist(f[i], positives[i, j]) ** power, math.dist(f[i], negatives[i, j]) ** power
            slow += valid[i] * max(0, d_p - d_n + 0.2) / 3
    squared = power == 2
    assert losses.triplet(f, positives, negatives, flags, 0.2, squared).item() == pytest.approx(slow / 5, rel=1e-5)
    paired = [losses.triplet(f[part], positives[part], negatives[part], flags[part], 0.2, squared, all_valid=flags)
              for part in (slice(0, 2), slice(2, 5))]  # D17: two processes, whose values count 2 and 3 times
    assert (2 * paired[0] + 3 * paired[1]).item() / 5 == pytest.approx(slow / max(1, sum(valid)), rel=1e-5)


def test_plain_triplet_has_a_finite_gradient_at_distance_zero():
    f = unit(1, 8).requires_grad_()
    losses.triplet(f, f.detach()[:, None], unit(1, 1, 8), torch.tensor([True]), 5.0, squared=False).backward()
    assert torch.isfinite(f.grad).all() and f.grad.abs().sum() > 0
