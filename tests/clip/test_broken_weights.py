"""Weight files that are broken, hostile or something else: one sentence, nothing executed, memory bounded."""
from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_state_dict
from tests.weight_files import (
    SMALL,
    WRITERS,
    equal,
    hostile_archives,
    hostile_safetensors,
    refusal,
    rewrite,
    save_legacy,
    with_pickle,
)
from ucdr_ref.clip.load import load_clip
from ucdr_ref.machine.files import load_state

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tiny_state_dict(**SMALL)


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory) -> dict[str, bytes]:
    """The same CLIP as the bytes of a file of each format."""
    folder = tmp_path_factory.mktemp("formats")
    for name, writer in WRITERS.items():
        writer(weights, folder / name)
    return {name: (folder / name).read_bytes() for name in WRITERS}


def test_other_files(weights, tmp_path):
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "empty").touch()
    (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (tmp_path / "lfs.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "a.json").write_text('{"abc": {"d": 1}}')
    (tmp_path / "random").write_bytes(bytes(range(200, 250)))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    torch.save({"epoch": 3}, tmp_path / "number")
    torch.save({}, tmp_path / "nothing")
    torch.save({key: value.long() for key, value in weights.items()}, tmp_path / "ints")
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(3), "visual.conv1.weight": torch.zeros(4, 3, 3, 3)},
               tmp_path / "resnet")
    os.mkfifo(tmp_path / "fifo")
    os.symlink("loop", tmp_path / "loop")
    expected = {"a.png": "is a PNG image", "empty": "is empty", "page.pt": "is a web page", "lfs.pt": "is a Git LFS pointer",
                "a.gz": "is a gzip archive", "a.json": "is JSON text", "random": "unknown kind (its first bytes are c8 c9",
                "a.pkl": "a pickle that torch.save did not write", "a.zip": "not one that PyTorch wrote",
                "tensor": "holds a Tensor",
                "number": "an entry epoch that is a int", "nothing": "holds nothing", "ints": "of type torch.int64",
                "resnet": "ResNet CLIP; only the ViT family", "fifo": "is not a regular file", "loop": "cannot be read",
                ".": "is a directory", "absent": "does not exist", "empty/below": "does not exist"}
    for name, text in expected.items():
        assert text in refusal(tmp_path / name), name
    with pytest.raises(FileNotFoundError, match="weights/README.md"):
        load_clip(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"a\\nb\.pt"):  # a name that would break the line
        (tmp_path / "a\nb.pt").touch()
        load_clip(tmp_path / "a\nb.pt")
    with pytest.raises(ValueError, match="null"):
        load_clip("a\0b")


class Run:
    """Pickles as a call of `os.mkdir`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_nothing_is_executed(files, tmp_path):
    marker = tmp_path / "executed"
    program = pickle.dumps({"a": Run(marker)}, 2)
    torch.save({"visual.conv1.weight": torch.zeros(2), "x": Run(marker)}, tmp_path / "zip")
    save_legacy({"visual.conv1.weight": torch.zeros(2), "x": Run(marker)}, tmp_path / "legacy")
    with_pickle(program, files["torchscript"], tmp_path / "torchscript")
    (tmp_path / "plain").write_bytes(program)
    magic = files["legacy"][:15]
    (tmp_path / "magic").write_bytes(magic + program)
    for name in ("zip", "legacy", "torchscript", "magic"):
        assert "asks for posix.mkdir" in refusal(tmp_path / name)
        assert "nothing was executed" in refusal(tmp_path / name)
    refusal(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"asks for posix\.mkdir"):
        load_state(tmp_path / "zip")
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # the trap does work
        os.mkdir(marker)
        pickle.loads(program)
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": {}}, tmp_path / "namespace")
    assert "asks for argparse.Namespace" in refusal(tmp_path / "namespace")


def test_hostile_archives(files, tmp_path):
    """Each is refused in one sentence, for the right kind of reason."""
    for path in hostile_archives(tmp_path, files["torchscript"]):
        message = refusal(path)
        assert "MemoryError" not in message, message
        try:
            assert load_state(path) == {}  # of the few that are well-formed
        except ValueError as error:
            assert str(path) in str(error) and "expected a checkpoint" in str(error)


@pytest.mark.parametrize("name", hostile_safetensors())
def test_hostile_safetensors(name, tmp_path):
    data, text = hostile_safetensors()[name]
    (tmp_path / "a").write_bytes(data)
    message = refusal(tmp_path / "a")
    assert text in message and "\x1b" not in message


def test_many_layers_and_shared_tensors(tmp_path):
    """Key names alone cannot make the model large."""
    many = {f"transformer.resblocks.{i}.x": torch.zeros(1) for i in range(2000)}
    torch.save({**tiny_state_dict(**SMALL), **many}, tmp_path / "a")
    assert "2000 layers" in refusal(tmp_path / "a")
    sd = tiny_state_dict(**SMALL)
    for i in range(40):
        sd.update({key.replace(".0.", f".{i}."): value for key, value in sd.items() if "resblocks.0." in key})
    torch.save(sd, tmp_path / "b")
    assert "they share their storage" in refusal(tmp_path / "b")


def test_compressed_copy_and_checksum(files, weights, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(files["zip"])
    rewrite(path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    assert "compressed member" in refusal(path)
    rewrite(path, lambda name, data: data)  # stored again, but unaligned
    assert equal(load_clip(path), weights)
    data = bytearray(files["zip"])
    data[data.index(struct.pack("<f", float(weights["visual.proj"][0, 0])))] ^= 1
    path.write_bytes(data)
    assert "does not match the stored checksum" in refusal(path)


def child(code: str, *arguments: object) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PEAK = """
import os, sys
from ucdr_ref.clip.load import load_clip
def memory(field):
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith(field))
load_clip(sys.argv[1])  # warm up
sys.stdout.flush()
for path in sys.argv[2:]:
    if (pid := os.fork()) == 0:  # the child's peak starts at what it uses now
        before = memory("VmRSS")
        try:
            load_clip(path)
        except ValueError:
            pass
        print(memory("VmHWM") - before, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
def test_memory(files, tmp_path):
    """Loading takes at most about twice the model. Hostile files take little."""
    sd = tiny_state_dict(vision_width=768, vision_layers=2, text_width=512, text_layers=1, embed_dim=512)
    size = sum(value.nbytes for value in sd.values()) / 2**20
    assert size > 150
    for form in WRITERS:
        WRITERS[form](sd, tmp_path / form)
    (tmp_path / "tiny").write_bytes(files["zip"])
    hostile = hostile_archives(tmp_path, files["torchscript"])
    peaks = [int(line) for line in child(PEAK, tmp_path / "tiny", *(tmp_path / form for form in WRITERS), *hostile).split()]
    large, small = peaks[:len(WRITERS)], peaks[len(WRITERS):]
    assert len(small) == len(hostile)
    assert size < max(large) < 2.3 * size, dict(zip(WRITERS, large, strict=True))
    assert max(small) < 170, dict(zip([path.name for path in hostile], small, strict=True))


SHRINK = """
import sys, torch
from pathlib import Path
from ucdr_ref.clip import tensorfile
path, original = Path(sys.argv[1]), tensorfile.read_safetensors
def shrunk(*arguments):
    with open(path, "r+b") as file:
        file.truncate(100)
    return original(*arguments)
tensorfile.read_safetensors = shrunk
try:
    tensorfile.read_any(path)
except tensorfile.FormatError as error:
    print(error)
"""


def test_a_file_that_shrinks_while_it_is_copied_ends_in_a_sentence(tmp_path):
    """Pages beyond its new end would kill the process by SIGBUS."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", SHRINK, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "became shorter while it was read\n", done.stderr
