from __future__ import annotations

import errno
import os
import random
import resource
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import helpers
from tests.helpers import tiny_state_dict, to_hugging_face
from tests.weight_files import SMALL, WRITERS, Tree, equal, refusal, rewrite, save_legacy
from ucdr_ref.clip.load import load_clip
from ucdr_ref.clip.tensorfile import file_digest
from ucdr_ref.machine import files as checkpoint
from ucdr_ref.machine.files import load_state, save_atomic, write_text_atomic


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tiny_state_dict(**SMALL)


# ---- the same tensors from every format

@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_formats_agree(form, stored, weights, tmp_path):
    sd = {key: value.to(stored) for key, value in weights.items()}
    path = tmp_path / "any.name"
    WRITERS[form](sd, path)
    assert equal(load_clip(path), sd)
    assert equal(load_clip(path, dtype=torch.float16), sd, torch.float16)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("names", [dict, to_hugging_face])
def test_wrapped_state_dicts(wrap, prefix, names, weights, tmp_path):
    sd = {prefix + key: value for key, value in names(weights).items()}
    content = sd if wrap is None else {"epoch": 3, wrap: sd, "optimizer": {"state": {0: torch.zeros(3)}, "lr": [0.1]}}
    for writer in (torch.save, save_legacy):
        writer(content, tmp_path / "model.pt")
        assert equal(load_clip(tmp_path / "model.pt"), weights)


def test_constants_and_parameters(weights, tmp_path):
    """Scalars that OpenAI's files carry, constants of other writers, parameters and shared storages do not disturb."""
    sd = {**{key: nn.Parameter(value) for key, value in weights.items()}, "input_resolution": torch.tensor(16),
          "context_length": 8, "vocab_size": torch.tensor(40), "attn_mask": torch.zeros(8, 8)}
    torch.save(sd, tmp_path / "a.pt")
    assert equal(load_clip(tmp_path / "a.pt"), weights)
    block = torch.cat([value.flatten() for value in weights.values()])
    views, start = {}, 0
    for key, value in weights.items():
        views[key] = block[start:start + value.numel()].view(value.shape)
        start += value.numel()
    views["visual.proj"] = weights["visual.proj"].t().contiguous().t()
    for writer in (torch.save, save_legacy):
        writer(views, tmp_path / "b.pt")
        assert equal(load_clip(tmp_path / "b.pt"), weights)
    hf = {**to_hugging_face(weights), "vision_model.embeddings.position_ids": torch.arange(5).view(1, -1),
          "text_model.embeddings.position_ids": torch.arange(8).view(1, -1)}
    save_file(hf, tmp_path / "c", metadata={"format": "pt"})
    assert equal(load_clip(tmp_path / "c"), weights)


def test_state_dict_of_a_module(weights, tmp_path):
    """`state_dict()` is an OrderedDict with `_metadata`."""
    torch.save(load_clip_from(weights, tmp_path).state_dict(), tmp_path / "b.pt")
    assert equal(load_clip(tmp_path / "b.pt"), weights)


def load_clip_from(weights, folder):
    torch.save(weights, folder / "a.pt")
    return load_clip(folder / "a.pt")


def test_image_tower_alone(weights, tmp_path):
    visual = {key: value for key, value in weights.items() if key.startswith("visual.")}
    for form in WRITERS:
        WRITERS[form](visual, tmp_path / form)
        model = load_clip(tmp_path / form)
        assert not model.has_text and all(torch.equal(model.state_dict()[key], value) for key, value in visual.items())


def test_heads(tmp_path):
    torch.save(tiny_state_dict(**SMALL, vision_width=96), tmp_path / "a.pt")
    assert "give the number of heads" in refusal(tmp_path / "a.pt")
    assert load_clip(tmp_path / "a.pt", heads=(3, 2)).visual.transformer.resblocks[0].attn.heads == 3


def on_gpu(data: bytes) -> bytes:
    """OpenAI's archives were saved on a GPU."""
    assert b"X\x03\0\0\0cpu" in data
    return data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")


@pytest.mark.parametrize("half", [False, True])
def test_torchscript_equals_jit_load(half, tmp_path):
    """A traced open_clip model: the reader finds what `torch.jit.load` finds."""
    open_clip_model = pytest.importorskip("open_clip.model")
    model = open_clip_model.CLIP(32, dict(layers=2, width=64, patch_size=8, image_size=32, head_width=64),
                                 dict(context_length=77, vocab_size=100, width=64, heads=1, layers=2), quick_gelu=True).eval()
    model.load_state_dict(tiny_state_dict(vocab_size=100))
    model.register_buffer("input_resolution", torch.tensor(32))
    path = tmp_path / "traced"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long)), check_trace=False)
        (traced.half() if half else traced).save(str(path))
        rewrite(path, lambda name, data: on_gpu(data) if name.endswith("data.pkl") else data)
        reference = {key: value for key, value in traced.state_dict().items() if key in model.state_dict()}
    reference.pop("input_resolution"), reference.pop("attn_mask", None)
    assert len(reference) == len(helpers.clip_shapes())
    loaded = load_clip(path)
    assert equal(loaded, reference)
    assert not any(value.requires_grad for value in loaded.parameters())


def test_scripted_module(weights, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Tree({**weights, "input_resolution": torch.tensor(16)})).save(str(tmp_path / "s"))
        reference = torch.jit.load(str(tmp_path / "s")).state_dict()
    model = load_clip(tmp_path / "s")
    assert all(torch.equal(model.state_dict()[key], reference[key]) for key in weights)


# ---- digests and keys

def test_digest(tmp_path, weights):
    path = tmp_path / "ViT-B-16.pt"
    torch.save(weights, path)
    message = refusal(path)
    assert file_digest(path) in message and "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f" in message
    assert equal(load_clip(path, verify=False), weights)
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_missing_and_unexpected_keys(weights, tmp_path):
    sd = {key: value for key, value in weights.items() if key not in ("ln_final.bias", "visual.ln_pre.weight")}
    torch.save({**sd, "classifier.weight": torch.zeros(3)}, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt")
    assert "missing keys [ln_final.bias, visual.ln_pre.weight]; unexpected keys [classifier.weight]" in message
    assert "weights/README.md" in message
    hf = to_hugging_face(weights)
    del hf["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    save_file(hf, tmp_path / "b")
    assert "missing keys vision_model.encoder.layers.0.self_attn.k_proj.bias" in refusal(tmp_path / "b")
    hf = to_hugging_face(weights)
    del hf["vision_model.encoder.layers.0.self_attn.q_proj.bias"]
    save_file(hf, tmp_path / "c")
    assert "missing keys vision_model.encoder.layers.0.self_attn.q_proj.bias" in refusal(tmp_path / "c")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite(value, weights, tmp_path):
    sd = {key: tensor.clone() for key, tensor in weights.items()}
    sd["visual.ln_post.bias"][3] = value
    save_file(sd, tmp_path / "a")
    assert "visual.ln_post.bias holds values that are not finite" in refusal(tmp_path / "a")


# ---- checkpoints of runs

def test_state_roundtrip(tmp_path):
    state = {"version": "1", "step": 12, "rate": 1e-4, "none": None, "flag": True, "long": 2**70, "text": "é\n",
             "tuple": (1, 2.5, "x"), "list": [1, [2, {"a": torch.arange(3)}]], "rng": torch.get_rng_state(),
             "python": random.getstate(), "size": torch.zeros(2, 3).shape,
             "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
             "half": torch.randn(3, 4).half(), "empty": torch.empty(0, 3), "bool": torch.tensor([True, False]),
             "model": nn.Linear(2, 3).state_dict()}
    save_atomic(state, tmp_path / "a.pt")
    found, reference = load_state(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True)
    assert found.keys() == state.keys()
    for key in ("version", "step", "rate", "none", "flag", "long", "text", "tuple", "python", "size"):
        assert found[key] == reference[key] == state[key]
    for key in ("rng", "half", "empty", "bool"):
        assert torch.equal(found[key], state[key]) and found[key].dtype == state[key].dtype
    assert torch.equal(found["list"][1][1]["a"], torch.arange(3)) and found["optimizer"]["state"][0]["step"] == 3
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    nn.Linear(2, 3).load_state_dict(found["model"])
    found["half"].add_(1)  # a copy: the file stays as it is
    assert torch.equal(load_state(tmp_path / "a.pt")["half"], state["half"])
    assert os.listdir(tmp_path) == ["a.pt"]


def test_broken_state(tmp_path):
    save_atomic({"a": torch.randn(100), "b": list(range(50))}, tmp_path / "a.pt")
    good = (tmp_path / "a.pt").read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        (tmp_path / "a.pt").write_bytes(good[:rng.randrange(len(good))])
        with pytest.raises(ValueError, match="a.pt .*expected a checkpoint"):
            load_state(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        load_state(tmp_path / "absent")
    torch.save([1], tmp_path / "b")
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        load_state(tmp_path / "b")


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_full_disk(tmp_path):
    """A write that the system refuses in the middle: the old file survives, one sentence, no temporary file."""
    path = tmp_path / "a.pt"
    save_atomic({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*a\.pt \(File too large\)") as caught:
            save_atomic({"step": 2, "x": torch.randn(1 << 20)}, path)
        with pytest.raises(ValueError, match="could not write"):
            write_text_atomic(tmp_path / "log", "x" * (2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert load_state(path) == {"step": 1} and not leftovers(tmp_path) and not (tmp_path / "log").exists()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failing_system_call(function, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    save_atomic({"step": 1}, tmp_path / "a.pt")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(checkpoint.WriteError, match="Read-only file system"):
            save_atomic({"step": 2}, tmp_path / "a.pt")
    assert load_state(tmp_path / "a.pt") == {"step": 1} and not leftovers(tmp_path)


def test_unwritable_places(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent" / "a.pt", tmp_path / "file" / "a.pt", tmp_path):
        with pytest.raises(checkpoint.WriteError, match="could not write"):
            save_atomic({}, path)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_text_and_stale_temporary_files(tmp_path):
    stale, other, fresh = (tmp_path / f".{name}.tmp" for name in ("log.txt.123", "other.txt.123", "log.txt.456"))
    for path in (stale, other, fresh):
        path.touch()
    for path in (stale, other):
        os.utime(path, (0, 0))
    write_text_atomic(tmp_path / "log.txt", "é\n")
    assert (tmp_path / "log.txt").read_bytes() == "é\n".encode()
    assert not stale.exists() and other.exists() and fresh.exists()
    assert (tmp_path / "log.txt").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
