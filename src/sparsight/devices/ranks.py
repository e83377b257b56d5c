"""Several ranks that must do the same: reduce the same gradients, gather the same shards."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor


def process_state() -> PartialState:
    """This process's place in its group, which is joined on the first call, if a launcher such as torchrun made one.

    Its patience is long: while the first rank measures samples or encodes images, the others wait for it.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def several_ranks() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def largest(number: int, device: torch.device) -> int:
    """The largest number that any rank gives; the same answer on all."""
    if not several_ranks():
        return number
    found = torch.tensor(number, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so; the same answer on all."""
    return bool(largest(int(flag), device))


def touched(x: torch.Tensor, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """``x``, through which each of ``parameters`` that trains gets a gradient of zero, if it gets no other.

    Shards (FSDP) are left alone: they are reduced by the module that gathers them, where it runs.
    """
    # One element says as little as all of them, and cannot overflow.
    zeros = [0.0 * p.reshape(-1)[:1].sum() for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    return x + torch.stack([zero.to(x) for zero in zeros]).sum() if zeros else x
