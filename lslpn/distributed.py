"""Training in several processes: `torchrun --nproc_per_node=N -m lslpn train ...`.

`joined` connects the processes that torchrun has started; `world` returns their number and this
one's rank. Without torchrun there is one process, and `joined` does nothing.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError

_T = TypeVar("_T")
# How long one process waits for another: reading many scans takes minutes.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes that train together."""

    rank: int = 0  # of this process
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of range(count); `count` is a multiple of the size."""
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes; `value` is not modified."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def from_first(self, value: _T) -> _T:
        """The value of the first process, unpickled in the others, so it must be trusted."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def agree(self, value: Any, what: str) -> None:
        """Refuse values that differ between processes."""
        if self.size == 1:
            return
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        if any(other != held[0] for other in held):
            raise InputError(
                f"{what}: the {self.size} processes were given different ones; give every "
                "machine the same files and options"
            )


def world() -> World:
    """The processes that were `joined`, or this one."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process as one of several."""
    named = all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return named and int(environment["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def joined(device: str, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Connect the processes that torchrun started; does nothing for a single process.

    On GPUs the processes communicate through NCCL and use one GPU each, on CPUs through gloo.
    Only the first process issues warnings. If one fails, the others end as well; only the first to
    fail raises its error, the others raise SystemExit.

    Yields:
        the device of this process; for a single one it is `device` itself.

    Raises:
        InputError: `device` has a number, or there are fewer GPUs than processes.
    """
    if not launched(environment):
        yield device
        return
    from torch.distributed.rendezvous import rendezvous

    local = int(environment.get("LOCAL_RANK", "0"))
    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    # torchrun may restart all processes with the same store.
    attempt = f"lslpn/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    failures = dist.PrefixStore(f"{attempt}/failures", store)
    try:
        own = _own(device, local)
        if own != "cpu":
            torch.cuda.set_device(own)
        dist.init_process_group(
            "gloo" if own == "cpu" else "nccl",
            store=dist.PrefixStore(f"{attempt}/group", store),
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
        )
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore")
            yield own
    except BaseException as error:
        if _failed_first(failures):
            raise
        raise SystemExit(1) from error
    # Not after an error, when it might wait for processes that have ended.
    dist.destroy_process_group()


def _own(device: str, local: int) -> str:
    """The device of process number `local` of this machine."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"device: expected auto, cpu or cuda under torchrun, got {device!r}; every process "
            "uses a GPU of its own"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if local >= torch.cuda.device_count():
        raise InputError(
            f"torchrun: process {local} of this machine has no GPU, torch finds "
            f"{torch.cuda.device_count()}; start no more processes than that"
        )
    return f"cuda:{local}"


def _failed_first(failures: Any) -> bool:
    """Whether this process is the first to fail, so that the others fail because of it."""
    try:
        return int(failures.add("count", 1)) == 1
    except Exception:  # the store ended with the process that failed
        return False
