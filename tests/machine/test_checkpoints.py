"""Checkpoints of runs and atomic files."""
from __future__ import annotations

import errno
import os
import random
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from ucdr_ref.machine import files as checkpoint
from ucdr_ref.machine.files import load_state, save_atomic, write_text_atomic


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
