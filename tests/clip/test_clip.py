"""The towers beside open_clip's and the golden numbers, their parts, and models from shapes."""
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import fill, golden_clip_state_dict, tiny_state_dict
from ucdr_ref.clip.model import CLIP, infer_architecture
from ucdr_ref.clip.tokenizer import tokenize
from ucdr_ref.clip.zero_shot import class_text_features

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 600


def close(found: Tensor, expected: Tensor, fraction: float = 1e-5) -> bool:
    """Equal within a fraction of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) <= fraction * float(expected.abs().max())


def inputs(image_size: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Random images, and ids whose end-of-text (the largest id) stands at different places."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, vocabulary - 1, (2, 77), generator=generator)
    for row, end in enumerate((76, 37)):
        ids[row, end] = vocabulary - 1
        ids[row, end + 1:] = 0
    return torch.randn(2, 3, image_size, image_size, generator=generator), ids


@pytest.fixture(scope="module")
def tiny() -> CLIP:
    return CLIP.from_state_dict(tiny_state_dict(vocab_size=VOCABULARY))


def test_towers_equal_open_clip():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(value, std=0.1)  # they start at zero, which would hide a missing one
    model.eval()
    ours, (images, ids) = CLIP.from_state_dict(model.state_dict()), inputs(224, 49408)
    with torch.inference_mode():
        assert close(ours.encode_image(images), model.encode_image(images))
        assert close(ours.encode_text(ids), model.encode_text(ids))


def test_golden_numbers():
    golden = json.loads((ROOT / "tests" / "golden" / "ucdr_released.json").read_text())
    config, clip = golden["config"], golden["clip"]
    model = CLIP.from_state_dict(golden_clip_state_dict(config))
    images = fill("images.0", [config["batch"], 3, config["image_size"], config["image_size"]], 2.0)
    texts = tokenize([f"a photo of a {name.replace('_', ' ')}" for name in config["classes"]])
    for row, tokens in zip(texts, clip["tokens"], strict=True):
        assert row[:len(tokens)].tolist() == tokens and not row[len(tokens):].any()
    for found, name in ((model.encode_image(images), "image_features"), (model.encode_text(texts), "text_features")):
        assert torch.allclose(found, torch.tensor(clip[name]).view_as(found), rtol=0, atol=2e-5)


def test_pooled_token_equals_full_pass(tiny):
    tokens = torch.randn(3, 9, 64)
    full = tiny.visual.ln_pre(tokens)
    for block in tiny.visual.transformer.resblocks:
        full = block(full)
    for at in (0, 4, 8):
        assert torch.allclose(tiny.visual.blocks(tokens, at), full[:, at], atol=1e-5)


def test_text_reads_end_of_text_only(tiny):
    _, ids = inputs(32)
    features = tiny.encode_text(ids)
    changed = ids.clone()
    changed[1, 77 // 2:] = 7  # behind the end-of-text of row 1
    assert torch.allclose(tiny.encode_text(changed), features, atol=1e-5)
    for row, end, feature in zip(ids, (76, 37), features):  # and what precedes it, one row at a time, cut there
        assert torch.allclose(tiny.encode_text(row[None, :end + 1]), feature[None], atol=1e-5)


def test_layer_norm_in_float32():
    """float16 cannot hold the squares of these activations."""
    model = CLIP.from_state_dict(tiny_state_dict(vocab_size=50)).half()
    x = torch.randn(2, 64) * 3000
    found = model.visual.ln_post(x.half())
    assert found.dtype == torch.float16
    weight, bias = model.visual.ln_post.weight.float(), model.visual.ln_post.bias.float()
    exact = nn.functional.layer_norm(x.half().float(), (64,), weight, bias)
    assert torch.allclose(found.float(), exact, atol=4e-3)


def test_architecture_from_shapes():
    sd = tiny_state_dict(image_size=48, patch=16, vision_width=128, vision_layers=3, embed_dim=24, text_width=192, text_layers=1,
                         vocab_size=50, context_length=12)
    assert infer_architecture(sd) == dict(
        image_size=48, patch=16, vision_width=128, vision_layers=3, embed_dim=24, context_length=12, vocab_size=50,
        text_width=192, text_layers=1)
    model = CLIP.from_state_dict(sd)
    assert (model.image_size, model.embed_dim, model.context_length) == (48, 24, 12)
    assert (model.vision_width, model.text_width) == (128, 192)
    assert not any(value.requires_grad for value in model.parameters()) and not model.training
    sd["visual.proj"].zero_()
    assert model.visual.proj.any()  # a copy


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_images_of_another_size_or_kind_are_refused(tiny, images):
    with pytest.raises(ValueError, match=r"expected float \[b, 3, 32, 32\] as of clip.preprocess\(32\)"):
        tiny.encode_image(images)


@pytest.mark.parametrize("names", ["dog", []])
def test_one_text_is_no_list_of_names(tiny, names):
    with pytest.raises(ValueError, match="not a list of one or more"):
        class_text_features(tiny, names)
