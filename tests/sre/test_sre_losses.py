import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ucdr_ref.sre import losses


def slow_structure(x: Tensor, e: Tensor, permutation: list[int]) -> float:
    c, violations = len(permutation), []
    for a in range(c):
        for i in range(c):
            for j in range(c):
                u, v = permutation[i], permutation[j]
                if i + j <= c - 1 and (x[a] - x[u]).norm() < (x[a] - x[v]).norm():
                    violations.append(max(0.0, float((e[a] - e[u]).norm() - (e[a] - e[v]).norm())))
    return sum(violations) / len(violations) if violations else 0.0


@pytest.mark.parametrize("c", [1, 2, 3, 8, 11])
def test_structure_loss_equals_a_slow_loop(c):
    torch.manual_seed(c)
    x, e, permutation = torch.randn(c, 4).double(), torch.randn(c, 3).double(), torch.randperm(c)
    if c > 3:
        x[2], x[3] = x[0], x[1]  # ties in D0 are in no pair
    assert float(losses.relation_structure(x, e, permutation)) == pytest.approx(slow_structure(x, e, permutation.tolist()))


def test_structure_loss_of_many_classes_has_the_same_mean():
    torch.manual_seed(0)
    x, e = torch.randn(12, 5), torch.randn(12, 5)
    whole = torch.stack([losses.relation_structure(x, e, torch.randperm(12)) for _ in range(400)])
    part = torch.stack([losses.relation_structure(x, e, torch.randperm(12), limit=150) for _ in range(2000)])
    assert part.std() > whole.std()  # fewer pairs a step
    assert abs(float(part.mean() - whole.mean())) < 4 * float((part.var() / 2000 + whole.var() / 400).sqrt())
    assert float(part.mean()) > 0.1


def test_other_losses_equal_slow_loops():
    torch.manual_seed(1)
    logits, e = torch.randn(5, 4).double() * 3, F.normalize(torch.randn(4, 6).double(), dim=1)
    p = [[float(v.exp() / row.exp().sum()) for v in row] for row in logits]
    retain = [(float(row[a]) - float(e[int(row.argmax())] @ e[a])) ** 2 for row in logits for a in range(4)]
    assert float(losses.alignment_retention(logits, e)) == pytest.approx(np.mean(retain))
    assert float(losses.entropy(logits)) == pytest.approx(np.mean([-sum(v * np.log(v) for v in row) for row in p]))
    m = [np.mean([row[a] for row in p]) for a in range(4)]
    assert float(losses.bank_diversity(logits)) == pytest.approx(sum(v * np.log(v) for v in m))
    u = np.mean([row[1] + row[3] for row in p])
    assert float(losses.seen_bias(logits, torch.tensor([1, 3]), 0.3)) == pytest.approx(u + 0.09 / u)


def test_diversity_stays_finite_where_probabilities_underflow():
    logits = torch.tensor([[200.0, 0.0], [190.0, 0.0]], requires_grad=True)
    loss = losses.bank_diversity(logits)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6) and bool(logits.grad.isfinite().all())
