"""Device, precision, seeds, and several processes, started by `torchrun`, that compute what one would.

Each takes its share of every batch; in a single process every function on that does nothing. Rows of
processes are joined in the order of their ranks.
"""
from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..clip.weights import one_line

Items = TypeVar("Items", bound=Sequence[Any])


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; the step was finished and saved, in every process."""


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, for as long as the block runs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # Numbers on the CPU go by gloo, so that they never wait for a GPU.
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    try:
        yield
    except Stopped:  # after any other exception some process may wait, and so would parting in good order
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Around every exchange: when another process is gone, says so before torchrun ends this one too."""
    try:
        yield
    except RuntimeError as error:
        print(f"error: process {rank()} could not exchange with another one ({one_line(error)}); what was "
              "saved is intact: run the same command to go on", file=sys.stderr)
        sys.exit(2)


def share(items: Items) -> Items:
    """This process's part of a list: contiguous, as even as can be."""
    start, end = (len(items) * n // world() for n in (rank(), rank() + 1))
    return items[start:end]  # type: ignore[return-value]


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, in every process."""
    if world() == 1:
        return items
    parts: list[list[Any]] = [[]] * world()
    with together():
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def place(count: int) -> tuple[int, int]:
    """For `count` rows in this process: the rows of the processes before it, and the rows of all."""
    counts = gather([count])
    return sum(counts[:rank()]), sum(counts)


def gather_rows(rows: Tensor) -> Tensor:
    """[count, ...] of all processes joined, [total, ...], on each one's device; counts may differ."""
    if world() == 1:
        return rows
    counts = gather([len(rows)])
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    with together():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


@torch.no_grad()
def average(tensors: Sequence[Tensor], weight: int) -> None:
    """Puts the processes' mean, each counted `weight` times, in place of the tensors, by one exchange.

    Means over shares of a batch, weighted by the shares' sizes, become means over the batch.
    """
    if world() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors] + [tensors[0].new_ones(1)])
    flat = flat * weight if weight else torch.zeros_like(flat)  # the mean over an empty share is NaN
    with together():
        dist.all_reduce(flat)
    *means, _ = (flat / flat[-1]).split([*(tensor.numel() for tensor in tensors), 1])
    for tensor, mean in zip(tensors, means):
        tensor.copy_(mean.view_as(tensor))


def one_process(what: str) -> None:
    """ValueError where there are more."""
    if world() > 1:
        raise ValueError(f"{what} needs one process: start it without torchrun")


def wait() -> None:
    """Until every process is here."""
    gather([])


@contextmanager
def main_first() -> Iterator[None]:
    """The block runs in the writing process, and then, when its files are there, in the others."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def pick_device(name: str) -> torch.device:
    """cpu, cuda, ... or auto; a GPU without a number is the process's own. ValueError when there is none."""
    if name.startswith("cuda:") and world() > 1:
        raise ValueError(f"--device {name}: each process needs a GPU of its own: give --device cuda")
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device == torch.device("cuda"):
            own = int(os.environ["LOCAL_RANK"]) if world() > 1 else torch.cuda.current_device()
            device = torch.device("cuda", own)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for what names no device, such as the peak memory or NCCL
        torch.ones(1, dtype=torch.float64, device=device).item()  # evaluation needs it; Apple's GPU has none
    except (RuntimeError, AssertionError, ImportError, ValueError, KeyError, TypeError) as error:
        reason = shorten(one_line(error), 200)
        raise ValueError(f"--device {name} is not usable ({reason}); try --device cpu") from None
    return device


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The arithmetic of --precision: bf16 inside the block; tf32, a switch of the process, from here on."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU where `device` is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, else in KiB
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)


def fold(*parts: object) -> int:
    """A seed from everything that identifies a draw, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
