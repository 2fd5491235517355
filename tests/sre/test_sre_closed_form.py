"""Ridge regression against least squares and a literal choice of lambda; calibration by every threshold."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ucdr_ref.sre import closed_form
from ucdr_ref.sre.closed_form import STRENGTHS, Ridge, Take, calibrated, fit

C, E, W = 14, 9, 5
SEEN = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "CHUNK", 7)


def world(seed: int = 0, noise: float = 0.3, n: int = 90,
          ids: list[int] = SEEN) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, e] that are a linear picture of the class vectors [c, w], labels [n] among ids."""
    torch.manual_seed(seed)
    vectors = F.normalize(torch.rand(C, W), dim=1)
    picture = torch.randn(W, E)
    labels = torch.tensor(ids)[torch.randint(len(ids), (n,))]
    return (vectors - vectors.mean(0))[labels] @ picture + noise * torch.randn(n, E), labels, vectors


def least_squares(z: Tensor, targets: Tensor, strength: float) -> Tensor:
    rows = torch.cat([z, strength ** 0.5 * torch.eye(E, dtype=z.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([targets, targets.new_zeros(E, W)])).solution


@pytest.mark.parametrize("n", [90, 5])
def test_ridge_equals_least_squares_on_augmented_rows(n: int) -> None:
    """n = 5: fewer images than dimensions."""
    z, labels, vectors = world(n=n)
    ridge, strength = fit(z.__getitem__, labels, vectors, 0.5)
    a = vectors.double() - vectors.double().mean(0)
    expected = least_squares(F.normalize(z.double(), dim=1), a[labels], 0.5)
    assert strength == 0.5
    torch.testing.assert_close(ridge.weights, expected.float(), atol=1e-5, rtol=1e-5)
    for row, scores in zip(F.normalize(z.double(), dim=1), ridge.logits(z)):
        for k in range(C):
            cosine = F.cosine_similarity(row @ expected, a[k], dim=0)
            assert float(scores[k]) == pytest.approx(float(cosine), abs=1e-5)


@pytest.mark.parametrize("seed, noise", [(0, 0.1), (1, 0.3), (2, 0.6)])
def test_lambda_is_the_one_that_tells_left_out_classes_apart(seed: int, noise: float) -> None:
    z, labels, vectors = world(seed, noise)
    a, z64 = vectors.double() - vectors.double().mean(0), F.normalize(z.double(), dim=1)
    hits = []
    for strength in STRENGTHS:
        hits.append(0)
        for fold in range(5):
            left_out = [k for i, k in enumerate(SEEN) if i % 5 == fold]
            kept = torch.tensor([int(label) not in left_out for label in labels])
            w = least_squares(z64[kept], a[labels[kept]], strength)
            for row, label in zip(z64[~kept], labels[~kept].tolist()):
                cosines = {k: float(F.cosine_similarity(row @ w, a[k], dim=0)) for k in left_out}
                hits[-1] += max(cosines, key=cosines.__getitem__) == label
    assert len(set(hits)) > 1  # otherwise any choice would do
    best = max(s for s, h in zip(STRENGTHS, hits) if h == max(hits))
    chosen, strength = fit(z.__getitem__, labels, vectors)
    assert strength == best
    assert torch.equal(chosen.weights, fit(z.__getitem__, labels, vectors, best)[0].weights)


def test_unseen_classes_are_recognised_without_an_image_of_them() -> None:
    ridge, _ = fit(*world_of(SEEN), strength=0.01)
    take, labels, _ = world_of([3, 7, 11])
    assert len(labels.unique()) == 3
    assert torch.equal(ridge.logits(take(torch.arange(len(labels)))).argmax(dim=1), labels)


def world_of(ids: list[int]) -> tuple[Take, Tensor, Tensor]:
    z, labels, vectors = world(noise=0.0, n=300, ids=ids)
    return z.__getitem__, labels, vectors


def test_two_or_three_seen_classes_leave_no_choice() -> None:
    z, labels, vectors = world()
    few = labels < 3
    assert fit(z[few].__getitem__, labels[few], vectors)[1] == 1.0
    more = labels < 5
    assert fit(z[more].__getitem__, labels[more], vectors)[1] in STRENGTHS


def test_features_are_read_in_parts_and_in_any_precision() -> None:
    z, labels, vectors = world()
    sizes = []

    def take(indices: Tensor) -> Tensor:
        sizes.append(len(indices))
        return z[indices].half()

    half, _ = fit(take, labels, vectors, 1.0)
    whole, _ = fit((5 * z).__getitem__, labels, vectors, 1.0)
    assert max(sizes) == 7
    torch.testing.assert_close(half.logits(z), whole.logits(z), atol=0.01, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = whole(z)
    assert torch.equal(inside, whole(z)) and inside.dtype == torch.float32


def test_the_state_comes_back_to_the_bit() -> None:
    z, labels, vectors = world()
    ridge, _ = fit(z.__getitem__, labels, vectors)
    shapes = {name: value.shape for name, value in ridge.state_dict().items()}
    assert shapes == {"weights": (E, W), "anchors": (C, W)}
    blank = Ridge(torch.zeros(E, W), torch.zeros(C, W))
    blank.load_state_dict(ridge.state_dict())
    assert torch.equal(blank.logits(z), ridge.logits(z))


def unseen_count(scores: Tensor, unseen: list[int]) -> int:
    return sum(int(k) in unseen for k in scores.argmax(dim=1))


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_share_is_the_nearest_that_any_threshold_gives(kappa: float, ties: bool) -> None:
    torch.manual_seed(3)
    unseen, seen = [1, 4], [0, 2, 3, 5]
    for n in (1, 2, 10, 37):
        scores = torch.randint(3, (n, 6)).float() if ties else torch.randint(2 ** 20, (n, 6)) / 1024
        margins = sorted({float(row[seen].max() - row[unseen].max()) for row in scores})
        reachable = set()
        for threshold in (-1e6, *((a + b) / 2 for a, b in zip(margins, margins[1:])), 1e6):
            moved = scores.double()
            moved[:, seen] -= threshold
            reachable.add(unseen_count(moved, unseen))
        assert ties or len(reachable) == n + 1
        out = calibrated(scores, unseen, kappa)
        nearest = min((abs(count - kappa * n), count) for count in reachable)[1]
        assert unseen_count(out, unseen) == nearest, n
        assert torch.equal(out[:, unseen], scores[:, unseen].double())
        shifts = (scores - out)[:, seen]
        torch.testing.assert_close(shifts, shifts[:1, :1].expand_as(shifts))  # one number for all


def test_calibration_does_not_depend_on_scale_and_takes_neighbouring_floats_apart() -> None:
    torch.manual_seed(0)
    scores = torch.randn(40, 6)
    small, large = (calibrated(scale * scores, [1, 4], 0.3).argmax(dim=1) for scale in (1, 100))
    assert torch.equal(small, large)
    first = torch.tensor(100.0)
    close = torch.stack([first, torch.nextafter(first, torch.tensor(200.0))])
    out = calibrated(torch.stack([close, torch.zeros(2)], dim=1), [1], 0.5)
    assert out.argmax(dim=1).tolist() == [1, 0]


def test_what_calibration_cannot_do_is_said_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="kappa is 1.5"):
        calibrated(torch.randn(4, 3), [1], 1.5)
    with pytest.raises(ValueError, match="finite score"):
        calibrated(torch.tensor([[0.0, -torch.inf]]), [1], 0.5)
    with pytest.raises(ValueError, match="calibration of 0 images"):
        calibrated(torch.randn(0, 3), [1], 0.5)
