"""Several ranks that must do the same: join, agree on a number, reduce the same gradients."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def process_state() -> PartialState:
    """This process's rank. The first call joins the group that a launcher such as torchrun made, if there is one.

    The group's timeout is long: the other ranks wait while the first measures samples or encodes images. While it
    trains, `training.stalls` ends a process that hangs.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave() -> None:
    """End this process's part in the group, if it has one: under DeepSpeed it would not end otherwise."""
    if several_ranks():
        torch.distributed.destroy_process_group()


def largest(number: int, device: torch.device) -> int:
    """The largest number that any rank gives; the same answer on all."""
    if not several_ranks():
        return number
    found = torch.tensor(number, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def from_first(value: T) -> T:
    """The first rank's value, on all ranks."""
    found = [value]
    if several_ranks():
        torch.distributed.broadcast_object_list(found)
    return found[0]


def is_shard(parameter: torch.Tensor) -> bool:
    """Whether FSDP version 2 or ZeRO-3 gathers it from all ranks where it is used."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def touched(x: torch.Tensor, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """``x``; each of ``parameters`` that trains gets a gradient of zero through it, if it gets no other.

    Shards are left alone: the module that gathers them reduces them.
    """
    # One element of each parameter is enough, and its product cannot overflow.
    zeros = [0.0 * p.reshape(-1)[:1].sum() for p in parameters if p.requires_grad and not is_shard(p)]
    return x + torch.stack([zero.to(x) for zero in zeros]).sum() if zeros else x
