import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import Width, tiny_state_dict
from ucdr_ref.clip.model import CLIP
from ucdr_ref.sre import adapter as sre_clip
from ucdr_ref.sre import losses
from ucdr_ref.sre.adapter import SRECLIP, Batch, TargetBank
from ucdr_ref.sre.graph import normalized_adjacency
from ucdr_ref.sre.options import Options


def small_method(**options: object) -> SRECLIP:
    e, c, nodes, w = 6, 7, 9, 5
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(nodes, w), dim=1)
    edges = [(k, c + k % (nodes - c)) for k in range(c)]
    return SRECLIP(Width(e), [f"class {k}" for k in range(c)], vectors, normalized_adjacency(edges, nodes), [1, 5],
                   Options(sre_hidden=8, **options))


def test_encoding_depends_neither_on_the_batch_nor_on_its_order():
    encode, x = small_method().encode_features, torch.randn(9, 6)
    together, order = encode(x), torch.randperm(9)
    assert_close(torch.cat([encode(row[None]) for row in x]), together)
    assert_close(encode(x[order]), together[order])
    encode = small_method(test_attention="batch").encode_features
    assert (encode(x[:4]) - encode(x)[:4]).abs().max() > 1e-3


def test_retention_compares_cosines_or_scaled_cosines():
    x, y = torch.randn(5, 6), torch.arange(5)
    for scale, divisor in (("cosine", 1.0), ("scaled", 0.05)):
        method = small_method(retention_scale=scale).eval()
        f, e = F.normalize(method.adapter(x), dim=1), method.class_embeddings()
        expected = losses.alignment_retention(f @ e.T / divisor, e)
        assert_close(method.source_step(Batch(x, y, x, 0))["retention"], expected)


def test_structure_classes_limits_the_loss_to_the_first(monkeypatch):
    seen = []

    def noted(x: Tensor, e: Tensor, permutation: Tensor) -> Tensor:
        seen.append((len(x), len(e), len(permutation)))
        return e.sum()

    monkeypatch.setattr(losses, "relation_structure", noted)
    x = torch.randn(4, 6)
    for limit in (0, 3, 100):
        small_method(structure_classes=limit).source_step(Batch(x, torch.arange(4), x, 0))
    assert seen == [(7, 7, 7), (3, 3, 3), (7, 7, 7)]


@pytest.mark.parametrize("seed", range(5))
def test_bank_equals_a_list_for_any_batch_and_size(seed):
    draw = random.Random(seed)
    size = draw.randint(1, 9)
    bank, plain, pointer = TargetBank(size, 2), [], 0
    for step in range(12):
        x = torch.randn(draw.randint(1, 14), 2, requires_grad=True)
        for row in x.detach():
            if len(plain) < size:
                plain.append(row)
            else:
                plain[pointer] = row
                pointer = (pointer + 1) % size
        bank.push(x)
        assert not bank.rows.requires_grad
        assert_close(bank.rows, torch.stack(plain), rtol=0, atol=0)
        assert bank.full == (len(plain) == size)
        if step == 5:  # a bank comes back from its state
            state, bank = bank.state_dict(), TargetBank(size, 2)
            bank.load_state_dict(state)


def test_released_bank_leaves_rows_stale():
    bank = TargetBank(5, 1, "released")
    for k in range(6):
        bank.push(torch.full((2, 1), float(k)))
    # Three batches make six rows; the pointer turns back at 4, so the rows of batch 2 stay for ever.
    assert bank.rows[:, 0].tolist() == [5, 5, 4, 4, 2, 2]
    assert int(bank.pointer) == 2


@pytest.mark.parametrize("unseen", [[], [0, 1, 2], [3], [-1]])
def test_unseen_classes_are_checked(unseen):
    with pytest.raises(ValueError, match="expected indices of one or more of the 3 classes, not of all"):
        SRECLIP(Width(4), ["killer_whale", "cow", "horse"], torch.eye(3), normalized_adjacency([], 3), unseen, Options(sre_hidden=4))


def test_images_are_encoded_through_clip():
    clip = CLIP.from_state_dict(tiny_state_dict())
    adjacency = normalized_adjacency([(0, 3)], 4)
    method = SRECLIP(clip, ["a", "b", "c"], F.normalize(torch.randn(4, 5), dim=1), adjacency, [2], Options(sre_hidden=12)).eval()
    images = torch.randn(2, 3, 32, 32)
    features = method.encode(images)
    assert_close(features, F.normalize(method.adapter.value(clip.encode_image(images)), dim=1))
    assert not any(p.requires_grad for p in clip.parameters())
    assert not any(name.startswith("clip") for name in method.trainable("sre"))


def test_a_checkpoint_does_not_overwrite_the_caller_s_class_vectors():
    vectors = torch.ones(3, 5)
    SRECLIP(Width(6), ["a", "b", "c"], vectors, torch.eye(3), [1], Options(sre_hidden=8)).class_vectors.zero_()
    assert torch.equal(vectors, torch.ones(3, 5))


def test_dropout_is_pytorch_s_own_on_a_cpu():
    p = 0.3
    gcn, x = sre_clip.GCN(5, 8, p), torch.randn(40, 5)
    torch.manual_seed(1)
    expected, state = F.dropout(x, p, True), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(gcn.drop(x), expected) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(gcn.eval().drop(x), x)
