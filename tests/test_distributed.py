"""Device, precision, and two processes that compute what one does, through a crash and a stop."""
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import retrieve
import train
from tests.helpers import flags, logged, refused
from ucdr_ref import distributed, training
from ucdr_ref.cli import load_state
from ucdr_ref.ucdr import losses

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# train.py, but process 1 sends itself the signal `number` in step `at`. Without torchrun two forks, quicker to start.
DRIVER = """
import os, socket, sys
import train
from ucdr_ref import training
from ucdr_ref.ucdr.adapter import UCDRAdapter
number, at = map(int, sys.argv[1:3])
training.SAVE_EVERY = 2
step, calls = UCDRAdapter.step, []
def interrupted(self, batch, phase):
    calls.append(len(batch.images))
    os.write(2, f"\\nbatch {os.environ['RANK']} {len(batch.images)}\\n".encode())  # in one piece
    if number and len(calls) == at and os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)
    return step(self, batch, phase)
UCDRAdapter.step = interrupted
if "RANK" not in os.environ:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    os.environ["RANK"] = "0" if os.fork() else "1"
sys.exit(train.main(sys.argv[3:]))
"""


def uneven(world: Path, run: Path, *more: str) -> list[str]:
    """The released grouping makes batches of 7, and last ones of 1, which two processes cannot halve."""
    return flags(world, run, "--source-batch", "7", "--target-batch", "7", "--target-lr", "3e-4", "--balance", "released",
                 "--triplet-mean", "paired", "--device", "cpu", *more)


def launch(driver: Path, number: int, at: int, arguments: list[str], torchrun: bool = False) -> subprocess.CompletedProcess:
    driver.write_text(DRIVER)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    runner = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--local-addr=127.0.0.1", "--"] * torchrun
    return subprocess.run([sys.executable, *runner, str(driver), str(number), str(at), *arguments],
                          capture_output=True, text=True, env=env, timeout=300)


def test_two_processes_equal_one_through_a_stop(world, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    assert train.main(uneven(world, tmp_path / "one")) == 0
    driver, two = tmp_path / "driver.py", tmp_path / "two"

    stopped = launch(driver, 15, 6, uneven(world, two), torchrun=True)  # SIGTERM
    assert stopped.returncode != 0 and "stopped by another process in phase" in stopped.stderr, stopped.stderr
    assert "stopped by SIGTERM in phase" in stopped.stderr and len(logged(two)) == 6
    # Batches of 7 and one of 1 as shares: even one that is empty changes nothing.
    for rank, sizes in (("0", [3, 3, 3, 3, 3, 0]), ("1", [4, 4, 4, 4, 4, 1])):
        assert [int(size) for size in re.findall(rf"batch {rank} (\d+)", stopped.stderr)] == sizes
    finished = launch(driver, 0, 0, uneven(world, two, "--micro-batch", "2"))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("zero-shot ") == 3  # one of them prints

    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_state(folder / name)["method"] for folder in (two, tmp_path / "one"))
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for ours, theirs in zip(logged(two), logged(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (two, tmp_path / "one")]
    assert rows[0] == [pytest.approx(row, abs=1e-5) for row in rows[1]]


def test_a_process_notices_that_another_one_is_gone(world, tmp_path):
    killed = launch(tmp_path / "driver.py", 9, 4, uneven(world, tmp_path / "two"))  # SIGKILL
    assert killed.returncode != 0 and "error: process 0 lost another one" in killed.stderr, killed.stderr
    assert load_state(tmp_path / "two" / "last.pt")["progress"]["step"] == 2


@pytest.mark.parametrize(("more", "text"), [
    ({}, "RANK expected"), ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE is 2")])
def test_processes_that_never_come_are_not_waited_for(monkeypatch, capsys, tmp_path, more, text):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "MASTER_PORT": port, **more}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 1)
    start = time.monotonic()
    refused(capsys, train.main(["--run", str(tmp_path / "run")]), text, "start with torchrun, or unset it")
    assert time.monotonic() - start < 30 and not (tmp_path / "run").exists()


def test_sre_clip_and_a_search_want_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "processes", nullcontext)
    refused(capsys, train.main(["--method", "sre-clip", "--run", str(tmp_path / "sre"), "--data-root", str(tmp_path / "data")]), "without torchrun")
    refused(capsys, retrieve.main(["--weights", "x", "--gallery", str(tmp_path), "--query", "a.png"]), "a search needs one process")


@pytest.mark.parametrize("name", ["meta", "cuda:99", "hpu:0", "tpu9"])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(ValueError, match=f"--device {name} is not usable .*"):
        distributed.pick_device(name)


def test_every_process_takes_its_own_gpu(monkeypatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "ones", lambda count, dtype, device: torch.zeros(count))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for local in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert distributed.pick_device("auto") == distributed.pick_device("cuda:2") == torch.device("cuda", local) == chosen[-1]


def test_precision():
    for precision, matmul in (("tf32", "high"), ("bf16", "highest")):
        distributed.set_precision(precision)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (matmul, precision == "tf32")
    f, t = (torch.nn.functional.normalize(torch.randn(9, 32), dim=1) for _ in range(2))
    expected = losses.image_text_contrast(f, t, torch.arange(9), 0.07)
    with distributed.autocast("bf16", CPU):
        assert (f @ t.T).dtype == torch.bfloat16
        assert torch.equal(losses.image_text_contrast(f, t, torch.arange(9), 0.07), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["ucdr-adapter", "sre-clip", "closed-form"])
def test_a_gpu_computes_what_a_cpu_does(method, tmp_path):
    rows = []
    for device in ("cpu", "cuda"):
        run, data = tmp_path / device, tmp_path / method
        assert train.main(["--fast", "--method", method, "--run", str(run), "--data-root", str(data), "--device", device]) == 0
        rows.append(json.loads((run / "results.json").read_text())["rows"])
    for ours, theirs in zip(*rows, strict=True):
        assert ours == {key: pytest.approx(value, abs=0.03) if isinstance(value, float) else value for key, value in theirs.items()}
