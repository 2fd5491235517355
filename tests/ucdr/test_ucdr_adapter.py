"""The method against the released code's numbers, and what the paper variant promises."""
from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import fill, golden_clip_state_dict, tiny_state_dict
from ucdr_ref.clip.model import CLIP
from ucdr_ref.clip.tokenizer import encode, tokenize
from ucdr_ref.clip.zero_shot import readable
from ucdr_ref.config import Config, resolve
from ucdr_ref.experiments.retrieval import cut
from ucdr_ref.ucdr.adapter import Batch, ClassQueues, UCDRAdapter
from ucdr_ref.ucdr.prompts import TextTemplate

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "ucdr_released.json").read_text())
RELEASED_NAMES = {"specific_domain_prompts": "domain_prompts", "specific_class_prompts": "class_prompts", "ctx": "template.ctx",
                  "feature_template": "class_token", "feature_proj": "proj", "W_image.weight": "generator.W_i.weight",
                  "W_image.bias": "generator.W_i.bias", "W_prompt.weight": "generator.W_p.weight",
                  "W_prompt.bias": "generator.W_p.bias", "prompt_proj.weight": "generator.W_o.weight",
                  "prompt_proj.bias": "generator.W_o.bias", "layer_norm2.weight": "generator.norm.weight",
                  "layer_norm2.bias": "generator.norm.bias"}


def golden_batch(step: int) -> Batch:
    c = GOLDEN["config"]
    images = fill(f"images.{step}", (c["batch"], 3, c["image_size"], c["image_size"]), 2.0)
    return Batch(images, torch.tensor(c["class_ids"][step]), torch.tensor(c["domain_ids"][step]))


def golden_adapter() -> UCDRAdapter:
    c = GOLDEN["config"]
    config = resolve({"variant": "released", "context_vectors": c["n_ctx"], "dataset": "folder"})
    method = UCDRAdapter(CLIP.from_state_dict(golden_clip_state_dict(c)), c["classes"], c["domains"], config)
    values = {"template.ctx": ("ctx", 0.04), "domain_prompts": ("domain_prompts", 0.05), "class_prompts": ("class_prompts", 0.05),
              "momentum_domain_prompts": ("momentum.domain_prompts", 0.05),
              "momentum_class_prompts": ("momentum.class_prompts", 0.05)}
    for letter in "ipo":
        values[f"generator.W_{letter}.weight"] = (f"W_{letter}.weight", 0.1)
        values[f"generator.W_{letter}.bias"] = (f"W_{letter}.bias", 0.05)
    values["generator.norm.bias"] = ("LN.bias", 0.05)
    state = method.state_dict()
    for name, (source, scale) in values.items():
        state[name].copy_(fill(source, state[name].shape, scale))
    state["generator.norm.weight"].copy_(1 + fill("LN.weight", (768,), 0.1))
    return method


def assert_near(value: torch.Tensor, golden: list[float], tolerance: float = 2e-5) -> None:
    golden_tensor = torch.tensor(golden)
    error = (value.detach().flatten() - golden_tensor).abs().max() / max(1.0, golden_tensor.abs().max())
    assert error <= tolerance, f"largest error {error:.2e}"


def assert_step(method: UCDRAdapter, phase: str, record: dict, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    terms = method.step(batch, phase)
    for name in ("align", "triplet"):
        if name in record:
            assert terms[name].item() == pytest.approx(record[name], abs=2e-5, rel=2e-5)
    optimizer.zero_grad()
    terms["loss"].backward()
    parameters = method.trainable(phase)
    assert {RELEASED_NAMES[name] for name in record["grads"]} == set(parameters)
    for name, golden in record["grads"].items():
        gradient = parameters[RELEASED_NAMES[name]].grad
        assert gradient.norm().item() == pytest.approx(golden["norm"], rel=1e-4), name
        assert_near(gradient.flatten()[:4], golden["head"])
    optimizer.step()
    for name, golden in record["params_after"].items():
        value = parameters[RELEASED_NAMES[name]]
        assert (value.flatten()[:4] - torch.tensor(golden["head"])).abs().max() <= record["lr"], name
        assert value.double().norm().item() == pytest.approx(golden["norm"], abs=record["lr"]), name


def replay(queues: ClassQueues, picks: torch.Tensor, labels: torch.Tensor, r: int, place: object) -> tuple[torch.Tensor, ...]:
    return *queues.pairs(labels, picks[:, 0::2], picks[:, 1::2]), torch.ones(len(labels), dtype=torch.bool)


def test_released_variant_equals_the_golden_numbers():
    method = golden_adapter()
    assert [encode(f"a photo of {readable(name)} from X X X X domain.") for name in GOLDEN["config"]["classes"]] \
        == GOLDEN["template_tokens"]
    assert_near(method.encode(golden_batch(0).images), GOLDEN["stage4_initial_features"])
    for phase in ("source", "target"):
        method.start(phase)
        for name, parameter in method.named_parameters():
            parameter.requires_grad_(name in method.trainable(phase))
        optimizer = torch.optim.Adam(method.trainable(phase).values(), lr=1e-4)
        for k, record in enumerate(GOLDEN["stage1" if phase == "source" else "stage2"]):
            batch = golden_batch(k)
            if "features" in record:
                patches = method.clip.visual.embed(batch.images)
                features = method.source_features(patches, *batch[1:]) if phase == "source" else \
                    F.normalize(method.target_features(*batch), dim=-1)
                assert_near(features, record["features"])
                assert_near(method.text_features(), record["text_features"])
            if phase == "source":
                picks = torch.tensor(record["draws_p1_n1_p2_n2"])
                method.queues.draw = partial(replay, method.queues, picks)
            assert_step(method, phase, record, optimizer, batch)
            if phase == "source":
                assert method.queues.counts.tolist() == record["queue_sizes"]
    assert_near(method.encode(golden_batch(0).images), GOLDEN["stage4_final_features"])


CLASSES, DOMAINS = ["cat", "alarm_clock", "The_Eiffel_Tower", "dog"], ["clipart", "real", "sketch"]


def small(clip: CLIP | None = None, anchors=None, **flags) -> UCDRAdapter:
    torch.manual_seed(0)
    clip = clip or CLIP.from_state_dict(tiny_state_dict())
    return UCDRAdapter(clip, CLASSES, DOMAINS, resolve({"dataset": "folder", "context_vectors": 4, "prompt_length": 2, **flags}),
                       anchors)


def batch_of(b: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randn(b, 3, 32, 32, generator=generator), torch.arange(b) % 4, torch.arange(b) % 3)


def test_trainable_counts_follow_the_formulae():
    sd = tiny_state_dict(vision_width=768, text_width=512, embed_dim=512, vision_layers=1, text_layers=1, image_size=64, patch=32)
    clip = CLIP.from_state_dict(sd)
    method = UCDRAdapter(clip, CLASSES, DOMAINS, Config())
    count = {phase: sum(p.numel() for p in method.trainable(phase).values()) for phase in method.PHASES}
    assert count == {"source": 16 * 512 + (3 + 4) * 1 * 768, "target": 2_167_296}


def test_initial_values():
    method = small(prompt_length=8)
    bound = (6 / (3 * 8 ** 2 + 64)) ** 0.5
    prompts = torch.cat([method.domain_prompts, method.class_prompts]).detach()
    assert prompts.abs().max() <= bound and prompts.std() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
    assert method.template.ctx.detach().std() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(method.momentum_class_prompts, method.class_prompts)  # D9
    assert not torch.equal(small(momentum_start="random").momentum_class_prompts, method.class_prompts)


def test_template_equals_the_full_sequence():
    """The constant prefix and the cut give the numbers, and the gradient, of all 77 tokens."""
    method = small()
    clip, ctx = method.clip, method.template.ctx
    rows = []
    for name in CLASSES:
        ids = tokenize([f"a photo of {readable(name)} from X X X X domain."])
        start = len(encode(readable(name))) - 2 + 5
        x = clip.token_embedding(ids)
        x = torch.cat([x[:, :start], ctx[None], x[:, start + 4:]], dim=1) + clip.positional_embedding
        x = clip.transformer(x, causal=True)[:, ids.argmax()]
        rows.append(F.normalize(clip.pool_text(x), dim=-1))
    full, ours = torch.cat(rows), method.text_features()
    assert (full - ours).abs().max() < 1e-5
    weight = torch.randn(full.shape, generator=torch.Generator().manual_seed(0))
    a, = torch.autograd.grad((full * weight).sum(), ctx)
    b, = torch.autograd.grad((ours * weight).sum(), ctx)
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_too_long_a_name_is_named():
    clip = CLIP.from_state_dict(tiny_state_dict(context_length=20))
    with pytest.raises(ValueError, match="'alarm_clock_with.*makes a prompt of .* tokens"):
        TextTemplate(clip, ["cat", "alarm_clock_with_a_very_long_name"], 8)


def naive_generator(generator, query, bank, own=None):
    """The equations of the paper, image by image, with a masked copy of the bank."""
    rows = []
    for i, q in enumerate(query):
        masked = bank.clone()
        if own is not None:
            masked[own[i]] = 0
        keys = generator.W_p(masked.reshape(-1, bank.shape[-1]))
        weights = (keys @ generator.W_i(q) / 0.75).softmax(0)
        prompt = (weights[:, None] * keys).sum(0)
        prompt = prompt + generator.norm(generator.W_o(prompt))
        rows.append(prompt / 33)
    return torch.stack(rows)[:, None]


@pytest.mark.parametrize("masked", [False, True])
def test_generator_equals_the_masked_copy(masked):
    method = small()
    query, own = torch.randn(5, 64), torch.tensor([0, 3, 1, 1, 2]) if masked else None
    ours = method.generator(query, method.class_prompts * 10, own)
    assert (ours - naive_generator(method.generator, query, method.class_prompts * 10, own)).abs().max() < 1e-6


def test_own_rows_have_no_influence_when_ids_are_given():
    method, images = small(), batch_of(1).images
    ids = torch.tensor([2]), torch.tensor([1])
    before, before_test = method.target_features(images, *ids), method.target_features(images)
    with torch.no_grad():
        method.class_prompts[2] += 5
        method.domain_prompts[1] -= 5
    assert torch.equal(method.target_features(images, *ids), before)
    assert not torch.allclose(method.target_features(images), before_test)
    with torch.no_grad():
        method.class_prompts[3] += 5
    assert not torch.allclose(method.target_features(images, *ids), before)
    released = small(mask="none")
    assert torch.equal(released.target_features(images, *ids), released.target_features(images))  # D1


def test_ledger_switches_change_what_they_name():
    images = batch_of(2).images
    reference = small().target_features(images)
    for flags in ({"feature_token": 1}, {"query_feature": "patch"}, {"target_epochs": 0}):  # D2, D6
        assert not torch.allclose(small(**flags).target_features(images), reference, atol=1e-4), flags
    assert torch.allclose(small().encode(images).norm(dim=1), torch.ones(2))
    assert torch.equal(small(evaluation_features="raw").encode(images), reference)  # D3
    assert small().learning_rate("target", 0, 0) == 1e-4 and small().learning_rate("source", 9, 0) == 1e-4
    assert small().learning_rate("target", 5, 0) == pytest.approx(1e-4 * 10 ** -0.75)  # D11
    assert small().learning_rate("target", 19, 0) == 1e-6
    for rate in (0.0, 1e-7):  # a smaller one is not raised to the floor
        assert small(target_lr=rate).learning_rate("target", 19, 0) == rate
    assert [small(target_lr=3e-4).optimizer(phase).defaults["lr"] for phase in ("source", "target")] == [1e-4, 3e-4]


@pytest.mark.parametrize("phase", ["source", "target"])
def test_frozen_parameters_do_not_change_by_one_bit(phase):
    method = small()
    method.start(phase)
    trained = method.trainable(phase)
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in trained)
    before = {name: value.clone() for name, value in method.named_parameters()}
    optimizer = method.optimizer(phase)
    for _ in range(3):
        optimizer.zero_grad()
        method.step(batch_of(), phase)["loss"].backward()
        optimizer.step()
    for name, value in method.named_parameters():
        assert (value.grad is not None) == (name in trained), name
        assert torch.equal(value, before[name]) == (name not in trained), name


def test_phase_two_uses_the_constant_text_features():
    method = small()
    method.start("target")
    assert torch.equal(method.anchors, method.text_features())
    method.clip.encode_text = method.template.forward = None  # phase 2 and testing need no text tower
    method.step(batch_of(), "target")["loss"].backward()
    assert method.encode(batch_of().images).shape == (6, 32)


@pytest.mark.parametrize("masked", ["own", "none"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_parts_of_a_phase_two_batch_add_up_to_it(masked, size):
    method, batch = small(mask=masked), batch_of(10)
    method.start("target")
    trained = list(method.trainable("target").values())
    whole = method.step(batch, "target")["loss"]
    parts = cut(batch, "target", Config(micro_batch=size))
    assert [len(part.images) for part, _ in parts] == [size] * (10 // size) + [10 % size] * (10 % size > 0)
    total = sum(share * method.step(part, "target")["loss"] for part, share in parts)
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    for ours, expected in zip(torch.autograd.grad(total, trained), torch.autograd.grad(whole, trained)):
        assert expected.abs().max() > 1e-5 and (ours - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_what_is_never_cut():
    batch = batch_of(25)
    assert [len(part.images) for part, _ in cut(batch, "target", Config())] == [10, 10, 5]  # this is a CPU
    assert [(part, share) for part, share in cut(batch, "target", Config(micro_batch=25))] == [(batch, 1.0)]
    assert cut(batch, "source", Config(micro_batch=1)) == [(batch, 1.0)]  # queues and momentum move once a batch
    empty = Batch(*(rows[:0] for rows in batch))
    assert cut(empty, "target", Config(micro_batch=1)) == [(empty, 1.0)]  # a process without a share


def test_class_anchors_can_be_given_or_plain():
    image_only = CLIP.from_state_dict({k: v for k, v in tiny_state_dict().items() if k.startswith("visual.")})
    given = small(image_only, torch.randn(4, 32))
    assert given.template is None and set(given.trainable("source")) == {"domain_prompts", "class_prompts"}  # D13
    assert torch.allclose(given.text_features().norm(dim=1), torch.ones(4))
    given.step(batch_of(), "source")["loss"].backward()
    with pytest.raises(ValueError, match="image tower alone"):
        small(image_only)
    plain = small(class_features="plain")
    expected = F.normalize(plain.clip.encode_text(tokenize(["a photo of a The Eiffel Tower"])), dim=-1)
    assert torch.allclose(plain.text_features()[2], expected[0], atol=1e-6)


def test_momentum_prompts_follow_the_average():
    method = small(momentum=0.9)
    start = method.class_prompts.detach().clone()
    with torch.no_grad():
        method.class_prompts += 1
    for k in (1, 2):
        method.step(batch_of(), "source")
        assert torch.allclose(method.momentum_class_prompts, start + 1 - 0.9 ** k, atol=1e-5)


def test_queues_equal_lists_of_the_last_features():
    generator = torch.Generator().manual_seed(0)
    queues, lists = ClassQueues(5, 3, 2), [[] for _ in range(5)]
    for size in (1, 4, 9, 2, 20, 7):
        labels, features = torch.randint(0, 4, (size,), generator=generator), torch.randn(size, 2, generator=generator)
        queues.push(features, labels)
        for label, feature in zip(labels.tolist(), features):
            lists[label] = (lists[label] + [feature])[-3:]
        assert queues.counts.tolist() == [len(rows) for rows in lists]
        for label in range(5):
            for index, feature in enumerate(lists[label]):
                assert torch.equal(queues.take(torch.tensor(label), torch.tensor(index)), feature)
        others = [feature for label, rows in enumerate(lists) if label != 2 for feature in rows]
        for index, feature in enumerate(others):
            got = queues.pairs(torch.tensor([2]), torch.tensor([[0]]), torch.tensor([[index]]))[1][0, 0]
            assert torch.equal(got, feature)


def test_draws_are_uniform_and_say_who_has_no_pair():
    queues = ClassQueues(4, 5, 1)
    _, _, valid = queues.draw(torch.tensor([0, 1]), 2)
    assert valid.tolist() == [False, False]
    queues.push(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1, 1, 1]))
    assert queues.draw(torch.tensor([0, 1]), 2)[2].tolist() == [False, False]  # no positive; no negative
    queues.push(torch.tensor([[3.0], [4.0]]), torch.tensor([2, 3]))
    torch.manual_seed(0)
    positives, negatives, valid = queues.draw(torch.tensor([1, 2]), 6000)
    assert valid.tolist() == [True, True]
    for row, expected in ((positives[0], {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}), (negatives[0], {3: 1 / 2, 4: 1 / 2}),
                          (positives[1], {3: 1}), (negatives[1], {0: 1 / 4, 1: 1 / 4, 2: 1 / 4, 4: 1 / 4})):
        values, counts = row.unique(return_counts=True)
        assert dict(zip(values.int().tolist(), (counts / 6000).tolist())) == pytest.approx(expected, abs=0.03)


def test_pushes_come_after_the_loss_unless_released():
    first = small()
    assert first.step(batch_of(), "source")["triplet"].item() == 0  # D12: the queues are still empty
    assert first.queues.counts.tolist() == [2, 2, 1, 1]
    assert small(queue_push="before").step(batch_of(), "source")["triplet"].item() > 0


def test_no_triplet_ablation():
    method = small(triplet_pairs=0)
    assert set(method.step(batch_of(), "source")) == {"loss", "align"} and method.queues.counts.sum() == 0


# what a library user may hand over

def test_a_phase_is_named_and_started():
    model, batch = small(), batch_of()
    for phase in ("sources", "target"):  # without `start` its anchors would be zeros, and nothing would be learnt
        with pytest.raises(ValueError, match=f"step of phase '{phase}': expected"):
            model.step(batch, phase)
    model.start("target")
    assert model.step(batch, "target")["loss"] > 0


def test_class_features_of_another_kind_are_refused():
    for kind in ("templates", "prototypes", "file.npy"):
        with pytest.raises(ValueError, match=f"class_features '{kind}': expected template or plain"):
            small(class_features=kind)
    with pytest.raises(ValueError, match="names are 'dog'"):
        UCDRAdapter(CLIP.from_state_dict(tiny_state_dict()), "dog", DOMAINS, resolve({}))


def test_a_method_can_be_pickled():
    model = small()
    assert torch.equal(pickle.loads(pickle.dumps(model)).encode(batch_of().images), model.encode(batch_of().images))
