"""Kills trainings at random moments; what the same command then makes of them must be the same to the last bit.

    python -m tests.killtest --rounds 50 --seed 0

Rounds take turns: SIGKILL at any moment, every other time on a slow disk, where most moments fall into a writing; SIGINT or
SIGTERM to all processes.
A training is a fork of this process, which never used PyTorch.
"""
import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import train
from tests.helpers import LONGER, flags, same_runs, write_world
from ucdr_ref import training
from ucdr_ref.cli import load_state

KINDS = ("moment", "signal")


def forked(work: Callable[[], int | None], output: Path) -> BaseProcess:
    """Starts `work` in a process group of its own, with what it prints in `output`; its result is the exit code."""
    def child() -> None:
        os.setpgid(0, 0)
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.exit(work())

    process = get_context("fork").Process(target=child)
    process.start()
    with suppress(OSError):  # the child may have been faster
        os.setpgid(process.pid, process.pid)
    return process


def result(process: BaseProcess) -> int:
    process.join()
    return process.exitcode


def do(work: Callable[[], int | None], output: Path) -> None:
    """`work` in a process of its own, so that this one stays fit to be forked."""
    code = result(forked(work, output))
    assert code == 0, f"exit code {code}\n{output.read_text()}"


def slow_training(arguments: list[str]) -> int:
    """The same training on a slow disk."""
    sync = os.fsync
    os.fsync = lambda file: (time.sleep(0.05), sync(file))
    return train.main(arguments)


def whole(run: Path) -> None:
    """Every file that is not a temporary one can be read."""
    for path in run.glob("[!.]*"):
        if path.suffix == ".pt":
            load_state(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def same(ours: Path, theirs: Path) -> None:
    """Two runs are equal, and nothing else is left."""
    names = [{path.name for path in run.glob("[!.]*")} for run in (ours, theirs)]
    assert names[0] == names[1], names
    same_runs(ours, theirs, ignored=("workers",))
    assert (ours / "per_class.csv").read_bytes() == (theirs / "per_class.csv").read_bytes()


class KillTest:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.output = folder / "output"
        do(lambda: write_world(folder / "world") and 0, self.output)
        start = time.monotonic()
        do(lambda: train.main(self.arguments(folder / "whole", 0)), self.output)
        self.seconds = time.monotonic() - start
        self.lines = logged(folder / "whole")
        self.kills = dict.fromkeys(KINDS, 0)

    def arguments(self, run: Path, workers: int) -> list[str]:
        return flags(self.folder / "world", run, *LONGER, "--device", "cpu", "--workers", str(workers))

    def round(self, number: int) -> str:
        kind, run = KINDS[number % len(KINDS)], self.folder / f"run{number}"
        workers, slow = int(kind == "signal" or number % 8 == 6), number % 4 == 0
        call = self.arguments(run, workers)
        for _ in range(1 if kind == "signal" else self.random.randint(1, 3)):
            process = forked(lambda: (slow_training if slow else train.main)(call), self.output)
            self.wait(kind, run, process)
            time.sleep(self.random.uniform(0, 0.02))
            (self.stop if kind == "signal" else self.kill)(kind, process)
            do(lambda: whole(run), self.folder / "whole-output")
        do(lambda: train.main(call), self.output)
        do(lambda: same(run, self.folder / "whole"), self.output)
        return f"{kind}, {workers} workers: identical"

    def wait(self, kind: str, run: Path, process: BaseProcess) -> None:
        """Until the moment to strike, or until there is nothing left to strike."""
        start, delay = time.monotonic(), self.random.uniform(0, self.seconds)
        lines, in_training = self.random.randint(1, self.lines * 2 // 3), kind == "signal" or self.random.random() < 0.5
        while process.is_alive():
            if logged(run) >= lines if in_training else time.monotonic() - start > delay:
                return
            time.sleep(0.0005)

    def kill(self, kind: str, process: BaseProcess) -> None:
        with suppress(ProcessLookupError):  # finished already
            (os.kill if self.random.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
        code = result(process)
        assert code in (0, -signal.SIGKILL), f"exit code {code}\n{self.output.read_text()}"
        self.kills[kind] += code != 0

    def stop(self, kind: str, process: BaseProcess) -> None:
        number = self.random.choice((signal.SIGINT, signal.SIGTERM))
        os.killpg(process.pid, number)
        code, text = result(process), self.output.read_text()
        assert code == 130 and "Traceback" not in text, f"exit code {code}\n{text}"
        assert text.splitlines()[-1].startswith(f"stopped by {number.name} in phase"), text
        assert text.count("stopped by") == 1, text
        self.kills[kind] += 1


def logged(run: Path) -> int:
    return (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    training.SAVE_EVERY = 2
    with TemporaryDirectory(prefix="killtest.") as folder:
        test = KillTest(Path(folder), args.seed)
        print(f"uninterrupted: {test.seconds:.1f} s, {test.lines} lines", flush=True)
        for number in range(args.rounds):
            print(f"round {number + 1}/{args.rounds}: {test.round(number)}", flush=True)
    assert args.rounds < 20 or all(test.kills.values()), test.kills  # a few rounds may miss one kind
    print(f"{args.rounds} rounds, all bit-identical to the uninterrupted run; {test.kills}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
