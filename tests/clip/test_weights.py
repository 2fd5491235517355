"""Weight files of every format, and what is none: one sentence, nothing executed."""
import argparse
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import tiny_state_dict, to_hugging_face
from ucdr_ref.clip.weights import OPENAI_SHA256, file_digest, load_clip

SMALL = dict(vocab_size=40, context_length=8, vision_layers=1, text_layers=1, image_size=16)
KINDS = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.int64: "Long"}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def save_torchscript(sd: dict[str, Tensor], path: Path) -> None:
    """The layout of `torch.jit.save`, by hand: a tree of modules, each tensor a view of a member of the archive."""
    def tensor(value: Tensor) -> bytes:
        size, stride = (b"(" + b"".join(map(number, values)) + b"t" for values in (value.shape, value.stride()))
        archive.writestr(f"{path.name}/data/{len(archive.namelist())}", value.reshape(-1).view(torch.uint8).numpy().tobytes())
        claim = (text("storage") + f"ctorch\n{KINDS[value.dtype]}Storage\n".encode() + text(str(len(archive.namelist()) - 1))
                 + text("cuda:0") + number(value.numel()))  # OpenAI's were saved on a GPU
        return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + claim + b"tQ" + number(0) + size + stride
                + b"\x89ccollections\nOrderedDict\n)RtR")

    def module(entries: dict[str, Tensor]) -> bytes:
        children = {key.partition(".")[0]: key for key in entries}
        values = text("training") + b"\x89"
        for name, key in children.items():
            below = {k.removeprefix(f"{name}."): v for k, v in entries.items() if k.startswith(f"{name}.")}
            values += text(name) + (module(below) if below else tensor(entries[key].contiguous()))
        return b"c__torch__.multimodal.model\nTransformer\n)\x81}(" + values + b"ub"

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.name}/data.pkl", b"\x80\x02" + module(sd) + b".")
        archive.writestr(f"{path.name}/code/__torch__.py", "raise SystemExit('code of the file was executed')")
        archive.writestr(f"{path.name}/constants.pkl", b"\x80\x02).")


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = {"torchscript": save_torchscript, "zip": torch.save, "legacy": save_legacy, "safetensors": save_file,
           "hugging_face": lambda sd, path: save_file(to_hugging_face(sd), path)}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tiny_state_dict(**SMALL)


def equal(model: nn.Module, sd: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == sd.keys() and all(torch.equal(found[key], sd[key].float()) for key in sd)


def refusal(path: Path) -> str:
    """The sentence with which `load_clip` refuses a file."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_clip(path)
    message = str(caught.value)
    assert str(path) in message and "weights/README.md" in message and "\n" not in message and len(message) < 2000
    return message


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_every_format_gives_the_same_model(form, stored, weights, tmp_path):
    sd = {key: value.to(stored) for key, value in weights.items()}
    WRITERS[form](sd, tmp_path / "any.name")
    assert equal(load_clip(tmp_path / "any.name"), sd)


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("names", [dict, to_hugging_face])
def test_wrapped_state_dicts(wrap, prefix, names, weights, tmp_path):
    sd = {prefix + key: value for key, value in names(weights).items()}
    torch.save({"epoch": 3, wrap: sd, "optimizer": {"state": {0: torch.zeros(3)}, "lr": [0.1]}}, tmp_path / "model.pt")
    assert equal(load_clip(tmp_path / "model.pt"), weights)


def test_constants_and_parameters(weights, tmp_path):
    constants = {"input_resolution": torch.tensor(16), "vocab_size": torch.tensor(40), "attn_mask": torch.zeros(8, 8)}
    save_torchscript({**weights, **constants}, tmp_path / "a")
    torch.save({**{key: nn.Parameter(value) for key, value in weights.items()}, **constants, "context_length": 8}, tmp_path / "b")
    save_file({**to_hugging_face(weights), "vision_model.embeddings.position_ids": torch.arange(5).view(1, -1)},
              tmp_path / "c", metadata={"format": "pt"})
    torch.save(load_clip(tmp_path / "a").state_dict(), tmp_path / "d")  # an OrderedDict with `_metadata`
    assert all(equal(load_clip(tmp_path / name), weights) for name in "abcd")


def test_a_width_without_whole_heads(tmp_path):
    torch.save(tiny_state_dict(**SMALL, vision_width=96), tmp_path / "a.pt")
    assert "width of 96 is no multiple of 64" in refusal(tmp_path / "a.pt")


def test_a_file_named_as_openais_has_its_digest(tmp_path, weights):
    torch.save(weights, tmp_path / "ViT-B-16.pt")
    message = refusal(tmp_path / "ViT-B-16.pt")
    assert file_digest(tmp_path / "ViT-B-16.pt") in message and OPENAI_SHA256["ViT-B-16.pt"] in message and "rename" in message
    assert equal(load_clip((tmp_path / "ViT-B-16.pt").rename(tmp_path / "mine.pt")), weights)
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_missing_and_unexpected_keys_are_listed(weights, tmp_path):
    sd = {key: value for key, value in weights.items() if key not in ("ln_final.bias", "visual.ln_pre.weight")}
    torch.save({**sd, "classifier.weight": torch.zeros(3), "visual.class_embedding": torch.zeros(3)}, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt")
    assert all(key in message for key in ("Missing", "ln_final.bias", "visual.ln_pre.weight", "Unexpected", "classifier.weight",
                                          "visual.class_embedding: copying a param with shape torch.Size([3])"))
    hf = to_hugging_face(weights)
    del hf["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    save_file(hf, tmp_path / "b")
    assert "vision_model.encoder.layers.0.self_attn.k_proj.bias" in refusal(tmp_path / "b")


def test_values_that_no_training_leaves_behind(weights, tmp_path):
    for key, value in (("visual.ln_post.bias", float("nan")), ("visual.proj", 0.0)):
        save_file({**weights, key: torch.full_like(weights[key], value)}, tmp_path / "a")
        assert f"{key} is all zero or not finite" in refusal(tmp_path / "a")
    save_file({**weights, "visual.conv1.weight": torch.zeros(1280, 3, 14, 14)}, tmp_path / "ViT-H")
    assert "vision width 1280" in refusal(tmp_path / "ViT-H")


def test_other_files(weights, tmp_path):
    contents = {"empty": b"", "page.pt": b"<!DOCTYPE html><html>404</html>", "a.pkl": pickle.dumps({"a": 1})}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    for name, content in {"tensor": torch.zeros(3), "number": {"epoch": 3}, "nothing": {},
                          "ints": {key: value.long() for key, value in weights.items()}}.items():
        torch.save(content, tmp_path / name)
    expected = {"empty": "begins with b''", "page.pt": "begins with b'<!DOCTYPE html>", "a.pkl": r"begins with b'\x80\x04",
                "a.zip": "not in a subdirectory", "tensor": "'Tensor'",
                "number": "entry 'epoch' is not a", "nothing": "no ViT CLIP (ViT-B/32, B/16, L/14; a ResNet?)",
                "ints": "is not a floating-point tensor", ".": "is no file", "absent": "does not exist"}
    for name, part in expected.items():
        assert part in refusal(tmp_path / name), name


class Trap:
    """Pickles as a call of `os.mkdir`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_nothing_is_executed(weights, tmp_path):
    marker = tmp_path / "executed"
    content, program = {"visual.conv1.weight": torch.zeros(2), "x": Trap(marker)}, pickle.dumps(Trap(marker), 2)
    torch.save(content, tmp_path / "zip")
    save_legacy(content, tmp_path / "legacy")
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": weights}, tmp_path / "namespace")
    with zipfile.ZipFile(tmp_path / "torchscript", "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    for name in ("zip", "legacy", "namespace"):
        assert "other things than weights" in refusal(tmp_path / name)
    assert "mkdir" in refusal(tmp_path / "torchscript")
    (tmp_path / "plain").write_bytes(program)
    refusal(tmp_path / "plain")
    assert not marker.exists()
    pickle.loads(program)
    assert marker.exists()
