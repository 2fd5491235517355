"""The closed form against literal loops, and on features whose domain shift is known."""
from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import Width
from ucdr_ref.metrics import retrieval
from ucdr_ref.ucdr import closed_form
from ucdr_ref.ucdr.closed_form import ClosedForm, ClosedFormAdapter, center, centred, domain_means, measure

S, C, E = 3, 4, 7


def source(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features [n, e], ids of class and domain; domain 1 lacks class 2, and groups differ in size."""
    torch.manual_seed(seed)
    present = [(k, d) for k, d in product(range(C), range(S)) if (k, d) != (2, 1)]
    groups = [(k, d) for k, d in present for _ in range(5 - k + d)]
    class_ids, domain_ids = torch.tensor(groups).T
    z = torch.randn(C, E)[class_ids] + torch.randn(S, E)[domain_ids] + 0.5 * torch.randn(len(groups), E)
    return F.normalize(z, dim=1), class_ids, domain_ids


def removed_by_hand(z: Tensor, class_ids: Tensor, domain_ids: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """m [e] and a [n, e]: means in loops, Gram-Schmidt in place of the SVD."""
    z, means = z.double(), []
    for d in range(s):
        classes = [k for k in range(C) if ((class_ids == k) & (domain_ids == d)).any()]
        means.append(sum(z[(class_ids == k) & (domain_ids == d)].mean(0) for k in classes) / len(classes))
    m, basis = sum(means) / s, []
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


def spread_by_hand(a: Tensor, class_ids: Tensor) -> Tensor:
    within = torch.zeros(E, E, dtype=torch.float64)
    for row, k in zip(a, class_ids):
        d = row - a[class_ids == k].mean(0)
        for i in range(E):
            for j in range(E):
                within[i, j] += d[i] * d[j] / len(a)
    return within


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "CHUNK", 7)


@pytest.mark.parametrize("strength", [0.3, 3.0])
def test_every_equation_equals_literal_loops(strength: float) -> None:
    z, class_ids, domain_ids = source()
    m, a = removed_by_hand(z, class_ids, domain_ids, S)
    form = measure(z, class_ids, domain_ids, S).form(strength)
    torch.testing.assert_close(form.mean, m.float(), atol=1e-6, rtol=0)
    alone = measure(z, class_ids, domain_ids, S).form(None)
    torch.testing.assert_close(alone(z), a.float(), atol=2e-6, rtol=0)

    within, w = spread_by_hand(a, class_ids), form.whitening.double()
    shrunk = within + strength * within.trace() / E * torch.eye(E)
    torch.testing.assert_close(w @ shrunk @ w, torch.eye(E).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(w, w.T, atol=1e-5, rtol=0)
    assert torch.linalg.eigvalsh(w).min() > 0  # the symmetric root, not one with another sign
    torch.testing.assert_close(form(z), F.normalize(a @ w, dim=1).float(), atol=5e-6, rtol=0)


def test_a_domain_with_many_images_of_one_class_has_no_other_mean() -> None:
    z, class_ids, domain_ids = source()
    group = ((class_ids == 1) & (domain_ids == 2)).nonzero().squeeze(1)
    more = torch.cat([torch.arange(len(z)), group.repeat(9)])
    torch.testing.assert_close(domain_means(z[more], class_ids[more], domain_ids[more], S),
                               domain_means(z, class_ids, domain_ids, S))


def test_a_domain_without_images_is_named_in_one_sentence() -> None:
    z, class_ids, domain_ids = source()
    kept = domain_ids != 1
    with pytest.raises(ValueError, match=r"3 source domains have \[\d+, 0, \d+\] training images"):
        measure(z[kept], class_ids[kept], domain_ids[kept], S)
    with pytest.raises(ValueError, match="each needs one or more"):
        measure(z[:0], class_ids[:0], domain_ids[:0], S)


def test_a_shift_of_each_domain_is_removed_exactly_and_retrieval_becomes_perfect() -> None:
    """Classes differ in five dimensions, domains in two others; train and test classes have mean zero."""
    torch.manual_seed(0)
    content = torch.linalg.qr(torch.randn(5, 5)).Q
    content = torch.cat([content, -content])  # ten classes, mean zero

    def images(classes: Tensor, shift: tuple[float, float]) -> Tensor:
        x = content[classes] * 0.5
        return F.normalize(torch.cat([x, torch.tensor(shift).expand(len(x), 2)], dim=1), dim=1)

    train, test = torch.tensor([0, 1, 2, 5, 6, 7]), torch.tensor([3, 4, 8, 9])
    shifts = ((2.0, 0.0), (0.0, 2.0), (-2.0, -1.0))
    z = torch.cat([images(train, shift) for shift in shifts])
    form = measure(z, train.repeat(3), torch.arange(3).repeat_interleave(6), 3).form(None)
    query, relevant = images(test, (2.0, 0.0)), images(test, (0.0, 2.0))
    gallery = torch.cat([relevant, images(train, (2.0, 0.0))])  # these share the query's domain
    labels = torch.cat([test, train])
    assert retrieval(query, test, gallery, labels)["mAP@all"] < 0.5
    assert retrieval(form(query), test, form(gallery), labels)["mAP@all"] == 1.0
    torch.testing.assert_close(form(query)[:, 5:], torch.zeros(4, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(form(query), form(relevant), atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [None, 3.0])
def test_one_source_domain_has_no_subspace(strength: float | None) -> None:
    z, class_ids, domain_ids = source()
    form = measure(z, class_ids, torch.zeros_like(domain_ids), 1).form(strength)
    assert form.subspace.shape == (E, 0)
    a = F.normalize(z - form.mean, dim=1)
    torch.testing.assert_close(form(z), F.normalize(a @ form.whitening, dim=1), atol=1e-5, rtol=0)


def test_domains_that_do_not_differ_lose_no_direction() -> None:
    z, class_ids, domain_ids = source()
    twice = torch.cat([z, z]), class_ids.repeat(2), torch.cat([domain_ids * 0, domain_ids * 0 + 1])
    measured = measure(*twice, 2)
    assert measured.subspace.shape == (E, 1) and not measured.subspace.any()
    third = torch.cat([z, z, -z]), class_ids.repeat(3), torch.arange(3).repeat_interleave(len(z))
    subspace = measure(*third, 3).subspace  # three means on one line
    assert subspace.shape == (E, 2)
    torch.testing.assert_close(subspace.T @ subspace, torch.tensor([[1.0, 0], [0, 0]]).double())


def test_fewer_images_than_dimensions_stay_finite_and_orthogonal_to_the_shifts() -> None:
    torch.manual_seed(0)
    form = measure(torch.randn(6, 64), torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6) % 2, 2).form(0.3)
    out = form(F.normalize(torch.randn(9, 64), dim=1))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(out @ form.subspace, torch.zeros(9, 1), atol=1e-5, rtol=0)


def test_images_that_are_all_alike_leave_whitening_out() -> None:
    torch.manual_seed(0)
    everywhere, in_a_class = torch.randn(1, 3).expand(6, -1), torch.randn(3, 3).repeat_interleave(2, dim=0)
    for rows in (everywhere, in_a_class):
        form = measure(rows, torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3), 2).form(3.0)
        assert torch.equal(form.whitening, torch.eye(3)) and form(rows).isfinite().all()


@pytest.mark.parametrize("strength", [0.0, -1.0, math.inf, math.nan])
def test_a_strength_that_is_not_positive_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        measure(*source(), S).form(strength)


def test_half_precision_and_lengths_do_not_matter() -> None:
    z, class_ids, domain_ids = source()
    whole = measure(z, class_ids, domain_ids, S)
    half = measure(z.half(), class_ids, domain_ids, S)
    assert half.values.dtype == torch.float64
    torch.testing.assert_close(half.form(3.0)(z.half()), whole.form(3.0)(z), atol=0.01, rtol=0)
    assert half.form(3.0)(z.half()).dtype == torch.float32
    torch.testing.assert_close(measure(5 * z, class_ids, domain_ids, S).form(3.0)(2 * z), whole.form(3.0)(z))
    with torch.autocast("cpu", torch.bfloat16):
        inside = whole.form(3.0)(z)
    assert torch.equal(inside, whole.form(3.0)(z))


def test_turning_all_features_turns_the_result() -> None:
    z, class_ids, domain_ids = source()
    turn = torch.linalg.qr(torch.randn(E, E)).Q
    form, turned = (measure(x, class_ids, domain_ids, S).form(3.0) for x in (z, z @ turn))
    torch.testing.assert_close(turned(z @ turn), form(z) @ turn, atol=1e-5, rtol=0)


def test_the_strength_is_the_best_one_and_of_equals_the_nearest_to_three() -> None:
    measured = measure(*source(), S)
    roots = {strength: measured.form(strength).whitening for strength in closed_form.STRENGTHS}

    def chosen(scores: dict[float, float]) -> float:
        def score(form: ClosedForm) -> float:
            return next(scores[k] for k, root in roots.items() if torch.equal(form.whitening, root))

        return closed_form.choose_strength(measured, score)

    assert chosen({0.3: 4, 1: 2, 3: 3, 10: 1}) == 0.3
    assert chosen({0.3: 1, 1: 2, 3: 2, 10: 2}) == 3
    assert chosen({0.3: 5, 1: 5, 3: 2, 10: 5}) == 1


def test_centring_equals_a_loop_and_takes_another_set_s_mean() -> None:
    z = source()[0]
    mean = sum(row.double() for row in z) / len(z)
    torch.testing.assert_close(center(3 * z), mean)
    rows = torch.stack([(row - mean) / (row - mean).norm() for row in z.double()]).float()
    torch.testing.assert_close(centred(z), rows)
    torch.testing.assert_close(centred(z[:2], center(z)), rows[:2])
    assert centred(z[:1]).isfinite().all()


def test_the_method_encodes_and_its_state_is_the_form_s_to_the_bit() -> None:
    z, class_ids, domain_ids = source()
    form = measure(z, class_ids, domain_ids, S).form(3.0)
    method = ClosedFormAdapter(Width(E), lambda images: images.flatten(1)[:, :E], form)
    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(method.encode(images), form(images.flatten(1)[:, :E]))
    state = method.state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == {
        "form.mean": [E], "form.subspace": [E, S - 1], "form.whitening": [E, E]}
    zeros = ClosedForm(torch.zeros(E), torch.zeros(E, S - 1), torch.zeros(E, E))
    blank = ClosedFormAdapter(Width(E), method.base, zeros)
    blank.load_state_dict(state)
    assert torch.equal(blank.encode(images), method.encode(images))
    assert not method.PHASES and not list(method.parameters())
