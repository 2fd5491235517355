"""--precision and --compile: what stays float32, and that a compiled tower is the same one."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import train
from tests.helpers import tiny_state_dict
from ucdr_ref.clip.model import CLIP, LayerNorm, Transformer
from ucdr_ref.machine.processes import autocast
from ucdr_ref.ucdr import losses
from ucdr_ref.ucdr.prompts import TextTemplate

CPU = torch.device("cpu")


@pytest.fixture
def clip() -> CLIP:
    return CLIP.from_state_dict(tiny_state_dict())


def test_tf32_is_on_only_when_asked_for():
    for precision, matmul in (("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")):
        with autocast(precision, CPU):
            assert torch.get_float32_matmul_precision() == matmul
            assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    autocast("fp32", CPU)


def test_losses_and_layer_norm_are_float32_under_bf16():
    f, t = (nn.functional.normalize(torch.randn(9, 32), dim=1) for _ in range(2))
    norm, labels = LayerNorm(32), torch.arange(9)
    expected = losses.image_text_contrast(f, t, labels, 0.07), norm(f)
    with autocast("bf16", CPU):
        assert (f @ t.T).dtype == torch.bfloat16
        torch.testing.assert_close((losses.image_text_contrast(f, t, labels, 0.07), norm(f)), expected, rtol=0, atol=0)


def test_both_towers_run_in_bf16(clip):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    template = TextTemplate(clip, ["cat", "sea_turtle"], 4)
    whole = clip.encode_image(images), template(clip)
    with autocast("bf16", CPU):
        half = clip.encode_image(images), template(clip)
    assert half[1].dtype == torch.float32
    for a, b in zip(half, whole):
        assert not torch.equal(a.float(), b) and nn.functional.cosine_similarity(a.float(), b).min() > 0.999


def test_compiling_changes_neither_names_nor_features(clip):
    images, names = torch.randn(2, 3, 32, 32), list(clip.state_dict())
    plain = clip.encode_image(images)
    clip.visual.transformer.compile(backend="eager")  # traced, without the need of a C++ compiler
    torch.testing.assert_close(clip.encode_image(images), plain)
    assert list(clip.state_dict()) == names


def test_the_flag_compiles_the_vision_blocks(world, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    flags = ["--dataset", "folder", "--data-root", str(world / "data"), "--weights", str(world / "clip.pt"), "--run",
             str(tmp_path / "run"), "--class-split", str(world / "split.json"), "--device", "cpu", "--dry-run"]
    assert train.main(flags) == 0 and not compiled
    assert train.main([*flags, "--compile", "1"]) == 0
    assert [(type(module), module.resblocks[0].attn.in_proj_weight.shape[1]) for module in compiled] == [(Transformer, 64)]
