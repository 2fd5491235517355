"""SRE-CLIP, variant `released`, against the numbers of the authors' code."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import Width
from ucdr_ref.sre import adapter as sre_clip
from ucdr_ref.sre.adapter import SRECLIP, Batch
from ucdr_ref.sre.graph import normalized_adjacency
from ucdr_ref.sre.options import Options

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = {f"adapter.fc{part[0]}.{kind}": f"adapter.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")}
NAMES |= {"gcn.conv1.w": "gcn.w1", "gcn.conv1.b": "gcn.b1", "gcn.conv-last.w": "gcn.w2", "gcn.conv-last.b": "gcn.b2"}
RELEASED = dict(test_attention="batch", retention_scale="scaled", bank_ring="released")


class SmallBank(Options):
    sre_bank = 24


class Golden(dict):
    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / name) as stored:
            super().__init__({key: torch.from_numpy(stored[key]) for key in stored.files})


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("sre_released_tiny.npz")


def golden_method(golden: Golden, **options: object) -> SRECLIP:
    adjacency = normalized_adjacency([tuple(edge) for edge in golden["edges"].tolist()], 14)
    method = SRECLIP(Width(16), [f"class {k}" for k in range(10)], golden["word_vectors"], adjacency, golden["unseen_ids"],
                     SmallBank(**{"sre_hidden": 32, "sre_dropout": 0.0, **RELEASED, **options}))
    method.load_state_dict({ours: golden[f"param.{theirs}"] for theirs, ours in NAMES.items()}, strict=False)
    return method


def check_gradients(method: SRECLIP, loss: Tensor, golden: Golden, name: str) -> None:
    parameters = dict(method.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[ours] for ours in NAMES.values()], retain_graph=True, allow_unused=True)
    for theirs, gradient in zip(NAMES, gradients):
        if theirs != "adapter.fck.bias":  # softmax ignores a shift of its scores, so its true gradient is zero
            expected = golden[f"grad.{name}.{theirs}"]
            gradient = torch.zeros_like(expected) if gradient is None else gradient
            assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item() + 1e-9, msg=f"{name} {theirs}")


def check_loss(value: Tensor, expected: Tensor | float) -> None:
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


def test_forward_equals_released(golden):
    method = golden_method(golden)
    assert_close(method.adjacency.to_dense(), golden["adj"])
    x = golden["x_source"]
    tolerance = dict(rtol=1e-5, atol=1e-5)
    assert_close(method.adapter(x), golden["adapter.out"], **tolerance)
    assert_close(method.adapter(x, self_only=True), golden["adapter.out.one_by_one"], **tolerance)
    assert_close(method.gcn(method.class_vectors, method.adjacency), golden["gcn.out"], **tolerance)
    assert_close(method.logits(x), golden["logits"], **tolerance)


def test_source_losses_and_gradients_equal_released(golden, monkeypatch):
    method = golden_method(golden)
    monkeypatch.setattr(torch, "randperm", lambda c: golden["perm"])
    batch = Batch(golden["x_source"], golden["y_source"], golden["x_target.0"], 0)
    terms = method.source_step(batch)
    for ours, theirs in (("ce", "ce"), ("retention", "img2cls"), ("structure", "srs_intended"), ("source", "source_fixed")):
        check_loss(terms[ours], golden[f"loss.{theirs}"])
        check_gradients(method, terms[ours], golden, theirs)
    effective = golden_method(golden, structure_pairs="diagonal")
    terms = effective.source_step(batch)
    check_loss(terms["source"], golden["loss.source_effective"])
    check_gradients(effective, terms["source"], golden, "source_effective")


@pytest.mark.parametrize("ring", ["released", "exact"])  # the same where the bank is a multiple of the batch
def test_target_steps_equal_released(golden, ring):
    method = golden_method(golden, bank_ring=ring)
    for k, (total, entropy, diversity, bias, rows, pointer) in enumerate(golden["target.steps"].tolist()):
        terms = method.target_step(golden[f"x_target.{k}"])
        for name, expected in (("target", total), ("entropy", entropy), ("diversity", diversity), ("bias", bias)):
            check_loss(terms[name], expected)
        assert len(method.bank.rows) == rows
        assert not method.bank.full or method.bank.pointer == pointer
        assert_close(method.bank.rows, golden[f"warehouse.after.{k}"], rtol=1e-5, atol=1e-4)
        if k == 3:
            for ours, theirs in (("target", "target_total"), *((name, name) for name in ("entropy", "diversity", "bias"))):
                check_gradients(method, terms[ours], golden, f"{theirs}.3")


@pytest.mark.parametrize("name", ["fixed", "effective"])
def test_trajectory_equals_released(golden, name, monkeypatch):
    method = golden_method(golden, structure_pairs="pairs" if name == "fixed" else "diagonal")
    sgd = method.optimizer("sre")
    for k, row in enumerate(golden[f"traj.{name}.rows"].tolist()):
        i, adapter_rate, gcn_rate, source, target, entropy, diversity, bias, loss = row
        for group in sgd.param_groups:
            group["lr"] = method.learning_rate("sre", int(i) // sre_clip.EPOCH, int(i) % sre_clip.EPOCH) * group["factor"]
        assert [group["lr"] for group in sgd.param_groups] == pytest.approx([adapter_rate, gcn_rate], rel=1e-9)
        monkeypatch.setattr(torch, "randperm", lambda c, k=k: golden[f"traj.{name}.perms"][k])
        step = k % 6
        batch = Batch(golden[f"x_source.{step}"], golden[f"y_source.{step}"], golden[f"x_target.{step}"], int(i))
        terms = method.step(batch, "sre")
        for key, value in dict(source=source, target=target, entropy=entropy, diversity=diversity, bias=bias, loss=loss).items():
            check_loss(terms[key], value)
        sgd.zero_grad()
        terms["loss"].backward()
        sgd.step()
    parameters = dict(method.named_parameters())
    for theirs, ours in NAMES.items():
        assert_close(parameters[ours].detach(), golden[f"traj.{name}.{theirs}"], rtol=1e-4, atol=1e-5)


def test_graph_head_under_given_dropout_masks_equals_released(golden, monkeypatch):
    stored = Golden("sre_released_tiny_dropout.npz")
    inputs: list[Tensor] = []

    def drop(gcn: sre_clip.GCN, x: Tensor) -> Tensor:
        assert gcn.dropout == 0.5 and gcn.training
        inputs.append(x)
        return x * stored[f"mask.{len(inputs) - 1}"]

    method = golden_method(golden, sre_dropout=0.5)
    monkeypatch.setattr(sre_clip.GCN, "drop", drop)
    out = method.gcn(method.class_vectors, method.adjacency)
    assert_close(out, stored["gcn.out.train"], rtol=1e-5, atol=1e-5)
    for k in range(2):
        assert_close(inputs[k], stored[f"in.{k}"], rtol=1e-5, atol=1e-5)
