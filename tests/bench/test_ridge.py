"""Ridge regression against least squares and a literal choice of lambda; calibration by every threshold."""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ucdr_ref.bench.ridge import STRENGTHS, calibrated, ridge_scores

C, E, W = 14, 9, 5
SEEN = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13]


def world(seed: int = 0, noise: float = 0.3, n: int = 90, ids: list[int] = SEEN) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, e] that are a linear picture of the class vectors [c, w], labels [n] among ids."""
    torch.manual_seed(seed)
    vectors = F.normalize(torch.rand(C, W), dim=1)
    picture = torch.randn(W, E)
    labels = torch.tensor(ids)[torch.randint(len(ids), (n,))]
    return (vectors - vectors.mean(0))[labels] @ picture + noise * torch.randn(n, E), labels, vectors


def least_squares(z: Tensor, targets: Tensor, strength: float) -> Tensor:
    rows = torch.cat([z, strength ** 0.5 * torch.eye(E, dtype=z.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([targets, targets.new_zeros(E, W)])).solution


def test_ridge_equals_least_squares_on_augmented_rows() -> None:
    """Of fewer images than dimensions."""
    z, labels, vectors = world(n=5)
    scores, strength = ridge_scores(z, labels, 3 * z, vectors, 0.5)
    a, z = vectors.double() - vectors.double().mean(0), F.normalize(z.double(), dim=1)
    w = least_squares(z, a[labels], 0.5)
    expected = torch.stack([F.cosine_similarity(z @ w, a[k][None], dim=1) for k in range(C)], dim=1)
    assert strength == 0.5
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)


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
    assert ridge_scores(z, labels, z, vectors)[1] == max(s for s, h in zip(STRENGTHS, hits) if h == max(hits))
    few = labels < 3
    assert ridge_scores(z[few], labels[few], z, vectors)[1] == 1.0  # nothing to choose by


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_share_is_the_nearest_that_any_threshold_gives(kappa: float, ties: bool) -> None:
    torch.manual_seed(3)
    unseen, seen = [1, 4], [0, 2, 3, 5]

    def unseen_count(scores: Tensor) -> int:
        return sum(int(k) in unseen for k in scores.argmax(dim=1))

    for n in (1, 2, 10, 37):
        scores = torch.randint(3, (n, 6)).float() if ties else torch.randint(2 ** 20, (n, 6)) / 1024
        margins = sorted({float(row[seen].max() - row[unseen].max()) for row in scores})
        reachable = set()
        for threshold in (-1e6, *((a + b) / 2 for a, b in zip(margins, margins[1:])), 1e6):
            moved = scores.double()
            moved[:, seen] -= threshold
            reachable.add(unseen_count(moved))
        out = calibrated(scores, unseen, kappa)
        assert unseen_count(out) == min((abs(count - kappa * n), count) for count in reachable)[1], n
        assert torch.equal(out[:, unseen], scores[:, unseen].double())
        shifts = (scores - out)[:, seen]
        torch.testing.assert_close(shifts, shifts[:1, :1].expand_as(shifts))  # one number for all
