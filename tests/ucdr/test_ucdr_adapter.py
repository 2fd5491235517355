"""The method against the released code's numbers and against a plain transcription; its switches, queues and errors."""
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import fill, golden_clip_state_dict, tiny_state_dict
from tests.plain import PlainAdapter
from ucdr_ref.clip.model import CLIP
from ucdr_ref.clip.tokenizer import tokenize
from ucdr_ref.config import resolve
from ucdr_ref.ucdr.adapter import Batch, ClassQueues, UCDRAdapter
from ucdr_ref.ucdr.options import Options

CLASSES, DOMAINS = ["cat", "alarm_clock", "The_Eiffel_Tower", "dog"], ["clipart", "real", "sketch"]


class Small(Options):
    queue_size, momentum = 3, 0.9  # queues overflow, averages move


def small(clip: CLIP | None = None, *anchors: Tensor, kind: type = UCDRAdapter, **options: Any) -> Any:
    torch.manual_seed(0)
    clip = clip or CLIP.from_state_dict(tiny_state_dict())
    return kind(clip, CLASSES, DOMAINS, Small(**{"context_vectors": 4, "prompt_length": 2, **options}), *anchors)


def batch_of(b: int = 6, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, 3, 32, 32, generator=generator)
    return Batch(images, (torch.arange(b) ** 2 + seed) % 4, (torch.arange(b) + seed) % 3)


# golden numbers of the released code

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "ucdr_released.json").read_text())
RELEASED = {"specific_domain_prompts": "domain_prompts", "specific_class_prompts": "class_prompts", "ctx": "template.ctx",
            "feature_template": "class_token", "feature_proj": "proj", "W_image": "generator.W_i", "W_prompt": "generator.W_p",
            "prompt_proj": "generator.W_o", "layer_norm2": "generator.norm"}


def our_name(released: str) -> str:
    module, dot, rest = released.partition(".")
    return RELEASED[module] + dot + rest


def golden_batch(step: int) -> Batch:
    c = GOLDEN["config"]
    images = fill(f"images.{step}", (c["batch"], 3, c["image_size"], c["image_size"]), 2.0)
    return Batch(images, torch.tensor(c["class_ids"][step]), torch.tensor(c["domain_ids"][step]))


def golden_adapter() -> UCDRAdapter:
    c = GOLDEN["config"]
    options = resolve({"variant": "released", "context_vectors": c["n_ctx"], "dataset": "folder"})
    method = UCDRAdapter(CLIP.from_state_dict(golden_clip_state_dict(c)), c["classes"], c["domains"], options)
    for name, value in method.state_dict().items():
        if name == "template.ctx" or name.startswith(("generator", "domain_prompts", "class_prompts", "momentum")):
            source = name.removeprefix("template.").removeprefix("generator.").replace("norm", "LN").replace("momentum_", "momentum.")
            scale = 0.04 if source == "ctx" else 0.1 if source.endswith("weight") else 0.05
            value.copy_(fill(source, value.shape, scale) + (source == "LN.weight"))
    return method


def assert_near(value: Tensor, golden: list[float]) -> None:
    expected = torch.tensor(golden)
    error = (value.detach().flatten() - expected).abs().max() / max(1.0, expected.abs().max())
    assert error <= 2e-5, f"largest error {error:.2e}"


def assert_step(method: UCDRAdapter, phase: str, record: dict, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    terms = method.step(batch, phase)
    for name in {"align", "triplet"} & record.keys():
        assert terms[name].item() == pytest.approx(record[name], abs=2e-5, rel=2e-5)
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()
    parameters = method.trainable(phase)
    assert set(map(our_name, record["grads"])) == set(parameters)
    for name, gradient in record["grads"].items():
        value, after = parameters[our_name(name)], record["params_after"][name]
        assert value.grad.norm().item() == pytest.approx(gradient["norm"], rel=1e-4), name
        assert_near(value.grad.flatten()[:4], gradient["head"])
        assert (value.flatten()[:4] - torch.tensor(after["head"])).abs().max() <= record["lr"], name
        assert value.double().norm().item() == pytest.approx(after["norm"], abs=record["lr"]), name


def picked(queues: ClassQueues, picks: list[list[int]] | None) -> Any:
    """A `draw` that takes the released code's picks [p1, n1, p2, n2] of each image from lists."""
    def draw(class_ids: Tensor, *_: int) -> tuple[Tensor, Tensor, Tensor]:
        labels, pairs = queues.labels, []
        for label, numbers in zip(class_ids, torch.tensor(picks)):
            own, others = queues.features[labels == label], queues.features[(labels != label) & (labels != queues.c)]
            pairs.append((own[numbers[0::2]], others[numbers[1::2]]))
        positives, negatives = map(torch.stack, zip(*pairs))
        return positives, negatives, torch.ones(len(class_ids), dtype=torch.bool)

    return draw


def test_released_variant_equals_the_golden_numbers():
    method = golden_adapter()
    assert [row[:row.argmax() + 1].tolist() for row in method.template.ids] == GOLDEN["template_tokens"]
    assert_near(method.encode(golden_batch(0).images), GOLDEN["stage4_initial_features"])
    for phase in ("source", "target"):
        method.start(phase)
        optimizer = method.optimizer(phase)
        for k, record in enumerate(GOLDEN["stage1" if phase == "source" else "stage2"]):
            method.queues.draw = picked(method.queues, record.get("draws_p1_n1_p2_n2"))
            assert_step(method, phase, record, optimizer, golden_batch(k))
            assert phase == "target" or method.queues.counts.tolist() == record["queue_sizes"]
    assert_near(method.encode(golden_batch(0).images), GOLDEN["stage4_final_features"])


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_losses_and_gradients_equal_the_plain_transcription():
    """Three steps of each phase, so that the queues fill and overflow and the averages move."""
    ours, plain = small(), small(kind=PlainAdapter)
    with torch.no_grad():
        for phase in ours.PHASES:
            for name, value in ours.trainable(phase).items():  # away from their initial values
                value += 0.3 * value.std().nan_to_num(0).clamp(min=0.1) * torch.randn(value.shape)
                plain.trainable(phase)[name].copy_(value)
        ours.momentum_domain_prompts.copy_(ours.domain_prompts)
        ours.momentum_class_prompts.copy_(ours.class_prompts)
    plain.momentum.load_state_dict(plain.image.state_dict())
    for phase in ours.PHASES:
        ours.start(phase)
        before = {name: value.clone() for name, value in ours.named_parameters()}
        models = {model: model.trainable(phase) for model in (ours, plain)}
        optimizers = [torch.optim.SGD(trained.values(), lr=0.01) for trained in models.values()]  # Adam blows up round-off
        for k in range(3):
            terms = []
            for model, optimizer in zip(models, optimizers):
                torch.manual_seed(k)
                terms.append(model.step(batch_of(7, k), phase))
                optimizer.zero_grad()
                terms[-1]["loss"].backward()
            for name, value in terms[0].items():
                assert value.item() == pytest.approx(terms[1][name].item(), rel=1e-5), (phase, k, name)
            assert phase == "target" or k == 0 or terms[0]["triplet"] > 0.01
            for name, parameter in models[ours].items():
                assert parameter.grad.abs().max() > 1e-6, name
                assert near(parameter.grad, models[plain][name].grad), (phase, k, name)
            for optimizer in optimizers:
                optimizer.step()
        for name, value in ours.named_parameters():
            assert torch.equal(value, before[name]) == (name not in models[ours]), name
        if phase == "source":
            assert near(ours.momentum_class_prompts, plain.momentum.class_prompts)
            assert ours.queues.counts.tolist() == [len(queue) for queue in plain.queues]
    assert near(ours.encode(batch_of().images), plain.encode(batch_of().images))


def test_initial_values():
    method = small(prompt_length=8)
    bound = (6 / (3 * 8 ** 2 + 64)) ** 0.5
    prompts = torch.cat([method.domain_prompts, method.class_prompts]).detach()
    assert prompts.abs().max() <= bound and prompts.std() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
    assert method.template.ctx.detach().std() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(method.momentum_class_prompts, method.class_prompts)  # D9
    assert not torch.equal(small(momentum_start="random").momentum_class_prompts, method.class_prompts)


def test_ledger_switches_change_what_they_name():
    images = batch_of(2).images
    reference = small().target_features(images)
    for options in ({"feature_token": 1}, {"query_feature": "patch"}, {"target_epochs": 0}):  # D2, D6
        assert not torch.allclose(small(**options).target_features(images), reference, atol=1e-4), options
    assert torch.allclose(small().encode(images).norm(dim=1), torch.ones(2))
    assert torch.equal(small(evaluation_features="raw").encode(images), reference)  # D3


def test_schedule():
    method = small(target_lr=3e-4)
    assert method.learning_rate("source", 9, 0) == 1e-4
    assert [method.learning_rate("target", epoch, 0) for epoch in (0, 5)] == pytest.approx([3e-4, 3e-4 * 10 ** -0.75])  # D11
    assert small().learning_rate("target", 19, 0) == 1e-6
    assert small(target_lr=1e-7).learning_rate("target", 19, 0) == 1e-7
    assert [method.optimizer(phase).defaults["lr"] for phase in method.PHASES] == [1e-4, 3e-4]


def test_phase_two_is_started_and_needs_no_text_tower():
    method, batch = small(), batch_of()
    with pytest.raises(ValueError, match=r'call start\("target"\) first'):  # its anchors are zeros: nothing would be learnt
        method.step(batch, "target")
    method.start("target")
    assert torch.equal(method.anchors, method.text_features())
    method.clip.encode_text = method.template.forward = None
    method.step(batch, "target")["loss"].backward()
    assert method.encode(batch.images).shape == (6, 32)


def test_class_anchors_can_be_given_or_plain():
    image_only = CLIP.from_state_dict({k: v for k, v in tiny_state_dict().items() if k.startswith("visual.")})
    given = small(image_only, torch.randn(4, 32))
    assert given.template is None and set(given.trainable("source")) == {"domain_prompts", "class_prompts"}  # D13
    assert torch.allclose(given.text_features().norm(dim=1), torch.ones(4))
    with pytest.raises(ValueError, match="image tower alone"):
        small(image_only)
    plain = small(class_features="plain")
    expected = F.normalize(plain.clip.encode_text(tokenize(["a photo of a The Eiffel Tower"])), dim=-1)
    assert torch.allclose(plain.text_features()[2], expected[0], atol=1e-6)
    with pytest.raises(ValueError, match="class_features 'prototypes' are not given"):
        small(class_features="prototypes")


@pytest.mark.parametrize("c", [1, 5])  # one class alone never has a pair
def test_queues_equal_lists_of_the_last_features(monkeypatch, c):
    """Pushes, and every pair that a draw can give, beside lists; two processes draw their parts of one batch."""
    generator = torch.Generator().manual_seed(0)
    queues, lists = ClassQueues(c, 3, 2), [[] for _ in range(c)]
    for size in (0, 1, 4, 9, 2, 20, 7):
        labels, features = torch.randint(0, max(1, c - 1), (size,), generator=generator), torch.randn(size, 2, generator=generator)
        queues.push(features, labels)
        for label, feature in zip(labels.tolist(), features):
            lists[label] = (lists[label] + [feature])[-3:]
        assert queues.counts.tolist() == [len(rows) for rows in lists]
        u = torch.rand(2, c, 8, dtype=torch.float64, generator=generator)
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **_: u)
        parts = [queues.draw(torch.arange(c)[first:last], 8, first, c) for first, last in ((0, c // 2), (c // 2, c))]
        positives, negatives, valid = map(torch.cat, zip(*parts))
        monkeypatch.undo()
        for label, own in enumerate(lists):
            others = [feature for k, rows in enumerate(lists) if k != label for feature in rows]
            assert valid[label] == bool(own and others)
            for j in range(8 if valid[label] else 0):
                assert torch.equal(positives[label, j], own[int(u[0, label, j] * len(own))])
                assert torch.equal(negatives[label, j], others[int(u[1, label, j] * len(others))])


def test_pushes_come_after_the_loss_unless_released():
    first = small()
    assert first.step(batch_of(4), "source")["triplet"].item() == 0  # D12: the queues are still empty
    assert first.queues.counts.sum() == 4
    assert small(queue_push="before").step(batch_of(4), "source")["triplet"].item() > 0
    without = small(triplet_pairs=0)
    assert set(without.step(batch_of(), "source")) == {"loss", "align"} and without.queues.counts.sum() == 0
