"""The closed form against literal loops, and on features whose domain shift is known."""
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ucdr_ref.ucdr.closed_form import ClosedForm, ClosedFormAdapter, center, feature_mean, measure

S, C, E = 3, 4, 7


def source() -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, e], ids of class and domain; domain 1 lacks class 2, and groups differ in size."""
    torch.manual_seed(0)
    present = [(k, d) for k, d in product(range(C), range(S)) if (k, d) != (2, 1)]
    groups = [(k, d) for k, d in present for _ in range(5 - k + d)]
    class_ids, domain_ids = torch.tensor(groups).T
    z = torch.randn(C, E)[class_ids] + torch.randn(S, E)[domain_ids] + 0.5 * torch.randn(len(groups), E)
    return z, class_ids, domain_ids


def removed_by_hand(z: Tensor, class_ids: Tensor, domain_ids: Tensor) -> Tensor:
    """a [n, e]: means in loops, Gram-Schmidt in place of the SVD."""
    z, means = z.double() / z.double().norm(dim=1, keepdim=True), []
    for d in range(S):
        classes = [k for k in range(C) if ((class_ids == k) & (domain_ids == d)).any()]
        means.append(sum(z[(class_ids == k) & (domain_ids == d)].mean(0) for k in classes) / len(classes))
    m, basis = sum(means) / S, []
    for mean in means[:-1]:
        v = mean - m
        for u in basis:
            v = v - (v @ u) * u
        basis.append(v / v.norm())
    rows = []
    for row in z - m:
        for u in basis:
            row = row - (row @ u) * u
        rows.append(row / row.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("strength", [0.03, 3.0])
def test_every_equation_equals_literal_loops(strength):
    z, class_ids, domain_ids = source()
    a = removed_by_hand(z, class_ids, domain_ids)
    measured = measure(z, class_ids, domain_ids, S)
    form = measured.form(strength)
    removed = ClosedForm(measured.mean, measured.subspace, torch.eye(E))
    torch.testing.assert_close(removed(z), a.float(), atol=2e-6, rtol=0)

    within, w = torch.zeros(E, E).double(), form.whitening.double()
    for row, k in zip(a, class_ids):
        d = row - a[class_ids == k].mean(0)
        within += d.outer(d) / len(a)
    shrunk = within + strength * within.trace() / E * torch.eye(E)
    torch.testing.assert_close(w @ shrunk @ w, torch.eye(E).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(w, w.T, atol=1e-5, rtol=0)
    assert torch.linalg.eigvalsh(w).min() > 0  # the symmetric root, not one with another sign
    torch.testing.assert_close(form(z), F.normalize(a @ w, dim=1).float(), atol=2e-5, rtol=0)
    expected = form(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(form(z), expected)  # float32 all the same


def test_a_domain_without_images_is_an_error():
    with pytest.raises(ValueError, match=r"source domains have \[.*, 0\] training images"):
        measure(*source(), S + 1)


def test_equal_domains_lose_no_direction_and_images_that_are_all_alike_are_not_whitened():
    z, class_ids, domain_ids = source()
    assert measure(z, class_ids, domain_ids * 0, 1).subspace.shape == (E, 0)
    rows = torch.eye(3).repeat_interleave(2, dim=0)
    measured = measure(rows, torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3), 2)
    assert measured.subspace.shape == (3, 1) and not measured.subspace.any()
    removed = ClosedForm(measured.mean, measured.subspace, torch.eye(3))
    torch.testing.assert_close(measured.form(3.0)(rows), removed(rows))


def test_centring_equals_a_loop_and_takes_another_set_s_mean():
    z = source()[0]
    units = [row / row.norm() for row in z]
    mean = sum(units) / len(z)
    torch.testing.assert_close(feature_mean(3 * z), mean)
    rows = torch.stack([(row - mean) / (row - mean).norm() for row in units])
    torch.testing.assert_close(center(z), rows)
    torch.testing.assert_close(center(z[:2], feature_mean(z)), rows[:2])
    assert center(z[:1]).norm() == 0  # its own mean


def test_the_method_s_own_state_is_the_form_s():
    class Tower(nn.Module):
        def encode_image(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :E]

    method = ClosedFormAdapter(Tower(), measure(*source(), S).form(3.0))
    blank = ClosedFormAdapter(Tower(), ClosedForm(torch.zeros(E), torch.zeros(E, S - 1), torch.zeros(E, E)))
    blank.load_state_dict(method.state_dict())
    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(blank.encode(images), method.form(images.flatten(1)[:, :E]))
