"""Stops processes that read images with workers: all of them must end.

    python -m tests.interrupts --rounds 50 --seed 0

Each round forks a reader and strikes it soon after a point. A pipe that it and its workers hold open tells when the last is gone.
"""
import argparse
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from itertools import product
from tempfile import mkdtemp

import torch
from PIL import Image

from ucdr_ref.data.images import Files, ImageDataset, load_batches

SECONDS = 60  # a generous bound for what takes one or two
POINTS = ("starting", "reading", "idle")
STRIKES = ("SIGINT to all", "SIGINT to main", "SIGTERM to all", "SIGTERM to main", "SIGKILL to main")
kept: list[Iterator] = []  # so that only the end of the interpreter closes a generator


def slow(image: Image.Image) -> torch.Tensor:
    time.sleep(0.005)
    return torch.zeros(3, 200, 200, dtype=torch.uint8)


def read(path: str, point: str, reached: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    data = ImageDataset(Files([path] * 4, ["a"] * 4, ["a"] * 4), slow, ())
    batches = load_batches(data, [range(4)] * 10 ** 4, 2)
    kept.append(batches)
    if point == "starting":
        os.write(reached, b"x")
    for n, _ in enumerate(batches):
        if n == 1 and point != "starting":
            os.write(reached, b"x")
        if point == "idle":
            time.sleep(0.5)


def strike(path: str, point: str, kind: str, delay: float) -> None:
    (held, holding), (reached, reaching) = os.pipe(), os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for end in (held, reached):
            os.close(end)
        read(path, point, reaching)
        sys.exit()  # as a script ends: with all that is registered for an exit
    for end in (holding, reaching):
        os.close(end)
    assert os.read(reached, 1) == b"x"
    time.sleep(delay)
    (os.kill if kind.endswith("main") else os.killpg)(pid, signal.Signals[kind.split()[0]])
    over, _, _ = select.select([held], [], [], SECONDS)
    if not over:
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert over, f"{kind}, {point}: some process did not end within {SECONDS} seconds"
    for end in (held, reached):
        os.close(end)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    folder = mkdtemp(prefix="interrupts.")  # not a context: the readers leave by this function too
    path = os.path.join(folder, "a.png")
    Image.new("RGB", (8, 8)).save(path)
    cases = [*product(POINTS, STRIKES)]
    chance.shuffle(cases)
    for n in range(args.rounds):
        strike(path, *cases[n % len(cases)], chance.uniform(0, 0.15))
    shutil.rmtree(folder)
    print(f"{args.rounds} rounds, no process left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
