"""The closed form against literal loops, and on features whose domain shift is known."""
from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ucdr_ref.ucdr import closed_form
from ucdr_ref.ucdr.closed_form import (
    ClosedForm,
    ClosedFormAdapter,
    center,
    feature_mean,
    measure,
)

S, C, E = 3, 4, 7


def source() -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, e], ids of class and domain; domain 1 lacks class 2, and groups differ in size."""
    torch.manual_seed(0)
    present = [(k, d) for k, d in product(range(C), range(S)) if (k, d) != (2, 1)]
    groups = [(k, d) for k, d in present for _ in range(5 - k + d)]
    class_ids, domain_ids = torch.tensor(groups).T
    z = torch.randn(C, E)[class_ids] + torch.randn(S, E)[domain_ids] + 0.5 * torch.randn(len(groups), E)
    return z, class_ids, domain_ids


def removed_by_hand(z: Tensor, class_ids: Tensor, domain_ids: Tensor) -> tuple[Tensor, Tensor]:
    """m [e] and a [n, e]: means in loops, Gram-Schmidt in place of the SVD."""
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
    return m, torch.stack(rows)


@pytest.mark.parametrize("strength", [0.03, 3.0])
def test_every_equation_equals_literal_loops(strength):
    z, class_ids, domain_ids = source()
    m, a = removed_by_hand(z, class_ids, domain_ids)
    measured = measure(z, class_ids, domain_ids, S)
    form = measured.form(strength)
    torch.testing.assert_close(form.mean, m.float(), atol=1e-6, rtol=0)
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
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(form(z), measured.form(strength)(z.clone()))


def test_a_domain_without_images_is_an_error():
    z, class_ids, domain_ids = source()
    kept = domain_ids != 1
    with pytest.raises(ValueError, match=r"source domains have \[\d+, 0, \d+\] training images"):
        measure(z[kept], class_ids[kept], domain_ids[kept], S)


def test_one_domain_or_equal_domains_lose_no_direction():
    z, class_ids, domain_ids = source()
    assert measure(z, class_ids, domain_ids * 0, 1).subspace.shape == (E, 0)
    equal = measure(torch.cat([z, z]), class_ids.repeat(2), torch.arange(2).repeat_interleave(len(z)), 2)
    assert equal.subspace.shape == (E, 1) and not equal.subspace.any()


def test_images_that_are_all_alike_leave_whitening_out():
    rows = torch.eye(3).repeat_interleave(2, dim=0)
    measured = measure(rows, torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3), 2)
    removed = ClosedForm(measured.mean, measured.subspace, torch.eye(3))
    torch.testing.assert_close(measured.form(3.0)(rows), removed(rows))


def test_the_strength_is_the_best_one_and_of_equals_the_nearest_to_three():
    measured = measure(*source(), S)
    roots = {strength: measured.form(strength).whitening for strength in closed_form.STRENGTHS}

    def chosen(**scores: float) -> float:
        return closed_form.choose_strength(measured, lambda form: next(
            scores.get(f"s{strength}".replace(".", "_"), 0) for strength, root in roots.items() if torch.equal(form.whitening, root)))

    assert chosen(s0_03=4, s3_0=3) == 0.03 and chosen(s1_0=2, s3_0=2, s10_0=2) == 3 and chosen(s0_3=5, s1_0=5) == 1


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
    assert list(blank.state_dict()) == ["form.mean", "form.subspace", "form.whitening"]
    blank.load_state_dict(method.state_dict())
    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(blank.encode(images), method.form(images.flatten(1)[:, :E]))
