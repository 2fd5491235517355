"""Files that are written in place or replaced: never through a link, never a special file; the run's own device in the record."""
from __future__ import annotations

import errno
import os
import stat

import pytest
import torch
from torch.cuda._utils import _get_device_index  # of `torch.cuda.set_device`: wants a number

from ucdr_ref.experiments.run_folder import versions
from ucdr_ref.machine import processes
from ucdr_ref.machine.files import in_place, write_text_atomic

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and special files of POSIX")


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "fifo"])
def test_nothing_is_appended_to_a_file_of_another_name(tmp_path, kind):
    victim, path = tmp_path / "victim", tmp_path / "log.jsonl"
    victim.write_text("precious")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(victim, path)
    else:
        path.symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    with pytest.raises((ValueError, OSError)):
        open(path, "ab", opener=in_place)
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_new_file_and_an_old_one_are_appended_to(tmp_path):
    for _ in range(2):
        with open(tmp_path / "log", "ab", opener=in_place) as file:
            file.write(b"x")
    assert (tmp_path / "log").read_bytes() == b"xx"


def test_a_link_at_the_temporary_name_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(victim)
    (tmp_path / ".a.json.1.tmp").symlink_to("nowhere")  # its age cannot be asked of what it leads to
    write_text_atomic(tmp_path / "a.json", "new")
    assert victim.read_text() == "precious" and (tmp_path / "a.json").read_text() == "new"
    assert not (tmp_path / "a.json").is_symlink()


def test_a_link_at_the_target_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.json").symlink_to(victim)
    write_text_atomic(tmp_path / "a.json", "new")
    assert victim.read_text() == "precious" and (tmp_path / "a.json").read_text() == "new"


def test_a_file_system_that_cannot_sync_a_folder_is_good_enough(tmp_path, monkeypatch):
    sync = os.fsync

    def refuses(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    write_text_atomic(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.mark.parametrize("name", ["meta", "cuda:99", "hpu:0", "tpu9"])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(ValueError, match=f"--device {name} is not usable .*; try --device cpu"):
        processes.pick_device(name)


def test_the_gpu_that_is_recorded_is_the_run_s_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"card {device}")
    assert versions(torch.device("cuda:1"))["gpu"] == "card cuda:1"
    assert versions(torch.device("cpu"))["gpu"] == "none", "a run on the CPU of a machine that has a GPU"


def test_every_process_takes_its_own_gpu_for_what_names_none(monkeypatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device("cuda", _get_device_index(device))))
    one = torch.ones(1)
    monkeypatch.setattr(torch, "ones", lambda count, dtype, device: one)
    for name, number in (("auto", 0), ("cuda", 0), ("cuda:2", 2)):  # a process alone
        assert processes.pick_device(name) == torch.device("cuda", number)
    chosen.clear()
    monkeypatch.setattr(processes, "world", lambda: 4)
    for local in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert processes.pick_device("auto") == processes.pick_device("cuda") == torch.device("cuda", local)
    assert chosen == [torch.device("cuda", local) for local in range(4) for _ in range(2)]
    with pytest.raises(ValueError, match="each process needs a GPU of its own: give --device cuda"):
        processes.pick_device("cuda:2")


def test_peak_memory_is_that_of_the_run_s_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {1: 3 << 30}[device.index])
    assert processes.memory_gib(torch.device("cuda:1")) == 3.0
