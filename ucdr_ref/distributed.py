"""Device, precision, seeds, and several processes, started by `torchrun`, that compute what one would.

Each takes its share of every batch; rows are joined in the order of the ranks.
"""
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .cli import as_value_error, is_main, several_processes

JOIN_SECONDS = 60


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, while the block runs; ValueError where some are missing."""
    if not several_processes():
        yield
        return
    # Numbers on the CPU go by gloo, so that they never wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with as_value_error(f"WORLD_SIZE is {os.environ['WORLD_SIZE']},", "but so many processes did not meet",
                        "start with torchrun, or unset it"):
        store, number, total = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        dist.init_process_group(backend, store=store, rank=number, world_size=total)
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    yield
    dist.destroy_process_group()  # not after an exception: others may wait, and so would this


def exchange() -> AbstractContextManager[None]:
    """Around an exchange: ValueError when another process is gone."""
    return as_value_error(f"process {rank()}", "lost another one", "the same command goes on")


def local_shard(items: list[Any]) -> list[Any]:
    """This process's part of a list, contiguous."""
    start, end = (len(items) * n // world_size() for n in (rank(), rank() + 1))
    return items[start:end]


def all_gather(items: list[Any]) -> list[Any]:
    """The items of all processes, in every process."""
    if world_size() == 1:
        return items
    parts: list[Any] = [None] * world_size()
    with exchange():
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def batch_offset(count: int) -> tuple[int, int]:
    """For `count` rows in this process: those of the processes before it, and of all."""
    counts = all_gather([count])
    return sum(counts[:rank()]), sum(counts)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [count, ...] of all processes, [total, ...]; counts may differ."""
    return rows if world_size() == 1 else torch.cat(all_gather([rows.detach().cpu()])).to(rows.device)


@torch.no_grad()
def average(tensors: Sequence[Tensor], weight: int) -> None:
    """Puts the processes' mean, weighted, in place of the tensors."""
    if world_size() == 1:
        return
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_ones(1)])
    flat = flat * weight if weight else torch.zeros_like(flat)  # the mean over an empty share is NaN
    with exchange():
        dist.all_reduce(flat)
    means = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means):
        tensor.copy_(mean.view_as(tensor))


def barrier() -> None:
    """Waits for all processes."""
    all_gather([])


def one_process(what: str) -> None:
    if several_processes():
        raise ValueError(f"{what} needs one process: start it without torchrun, or unset WORLD_SIZE")


def pick_device(name: str) -> torch.device:
    """cpu, cuda, ... or auto; each of several processes takes its own GPU. ValueError when there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" or name.startswith("cuda") and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with as_value_error(f"--device {name}", "is not usable", "take another one, or cpu"):
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for what names no device, such as NCCL
        torch.ones(1, dtype=torch.float64, device=device).item()  # evaluation needs it; Apple's GPU has none
    return device


def set_precision(precision: str) -> None:
    """TF32 on or off, for the whole process."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def derive_seed(*parts: object) -> int:
    """A seed from everything that identifies a draw, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
