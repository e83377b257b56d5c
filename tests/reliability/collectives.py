"""What a rank asks of the others: its collectives, recorded while it runs alone under torch's fake process group.

A fake group hands back what it is given. Where ranks go by what they hear (a maximum, or what the first rank
broadcasts), `every_rank` runs them again with what they would have heard.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup, _create_work_from_future
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

OPERATIONS = ("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce")
OPERATIONS += ("allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "reduce")
OPERATIONS += ("_reduce_scatter_base", "reduce_scatter", "reduce_scatter_tensor_coalesced", "scatter")
NEWER = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}  # from torch 2.13 on
ROUNDS = 5  # of runs, until every rank has heard what the others say


@dataclass(frozen=True)
class Call:
    """A collective: the operation, size and type of each tensor, and the ranks of the group."""

    operation: str
    tensors: tuple[tuple[int, torch.dtype], ...]
    group: tuple[int, ...]


@dataclass
class Record:
    """What one rank did: its calls; what it said in those by which ranks decide, and heard; the error it ended in."""

    calls: list[Call] = field(default_factory=list)
    said: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    heard: list[torch.Tensor] = field(default_factory=list)
    error: str = ""


def _tensors(given: Any) -> list[torch.Tensor]:
    if isinstance(given, (list, tuple)):
        return [tensor for each in given for tensor in _tensors(each)]
    return [given] if isinstance(given, torch.Tensor) else []


class Recorder(dist.ProcessGroup):
    """torch's fake process group; notes what it is called with."""

    record = Record()
    others: Sequence[torch.Tensor] = ()  # what is to be heard, one after the other

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.fake, self.ranks = FakeProcessGroup._create_internal(rank, size), size
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, self.fake)

    def size(self) -> int:
        return self.ranks

    def getBackendName(self) -> str:
        return "recorder"

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    group_name = pg_name

    def call(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        tensors, record = _tensors(args), self.record
        asked = getattr(args[-1], "reduceOp", None) if args else None
        reduction = next((name for name in ("SUM", "AVG", "MAX", "MIN") if asked == getattr(dist.ReduceOp, name)), "")
        sizes = tuple((tensor.numel(), tensor.dtype) for tensor in tensors)
        group = tuple(dist.distributed_c10d._world.pg_group_ranks[self])
        record.calls.append(Call(f"{operation} {reduction}".strip(), sizes, group))
        getattr(self.fake, operation)(*args, **kwargs)
        decides = operation == "broadcast" or (operation == "allreduce" and reduction == "MAX")
        if decides and not tensors[0].is_floating_point():
            own = tensors[0].clone()
            heard = next(iter(self.others[len(record.heard) :]), own)
            record.said.append((operation, own))
            if heard.shape == own.shape:
                tensors[0].copy_(torch.maximum(heard, own) if operation == "allreduce" else heard)
            record.heard.append(tensors[0].clone())
        future: Future = Future()
        future.set_result(args[0] if args else None)
        return _create_work_from_future(future)


def _operation(name: str) -> Callable[..., Any]:
    return lambda group, *args, **kwargs: group.call(name, *args, **kwargs)


for _name in (*OPERATIONS, *NEWER):
    setattr(Recorder, _name, _operation(NEWER.get(_name, _name)))
dist.Backend.register_backend("recorder", lambda store, rank, size, timeout: Recorder(rank, size), devices=["cpu"])


@contextmanager
def rank_of(rank: int, ranks: int, others: Sequence[torch.Tensor] = ()) -> Iterator[Record]:
    """Be this rank of so many."""
    Recorder.record, Recorder.others = Record(), others
    dist.init_process_group("recorder", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield Recorder.record
    finally:
        dist.destroy_process_group()


def every_rank(ranks: int, run: Callable[[int], None], alike: Callable[[int], Hashable] = int) -> list[Record]:
    """What each rank does in ``run(rank)``, one after the other in this process. Ranks for which ``alike`` gives the
    same do the same: the first of them runs for all, and they share its record."""
    firsts = {alike(rank): rank for rank in reversed(range(ranks))}
    found: dict[int, Record] = {}
    due, others = sorted(firsts.values()), list[torch.Tensor]()
    for _ in range(ROUNDS):
        for rank in due:
            others = _said_by_all([found[rank].said for rank in found])
            with rank_of(rank, ranks, others) as record:
                try:
                    run(rank)
                except Exception as error:  # a rank that ends while others go on is a divergence like any other
                    record.error = f"{type(error).__name__}: {error}"
            found[rank] = record
        others = _said_by_all([found[rank].said for rank in found])
        due = [rank for rank in found if not _same(found[rank].heard, others)]
        if not due:
            break
    return [found[firsts[alike(rank)]] for rank in range(ranks)]


def _said_by_all(said: Sequence[Sequence[tuple[str, torch.Tensor]]]) -> list[torch.Tensor]:
    """What ranks hear; up to where they diverge."""
    heard = []
    for each in zip(*said, strict=False):
        operations, values = {operation for operation, _ in each}, [value for _, value in each]
        if len(operations) > 1 or len({value.shape for value in values}) > 1:
            break
        heard.append(values[0] if operations == {"broadcast"} else torch.stack(values).amax(0))
    return heard


def _same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=False))


def divergence(records: Sequence[Record]) -> str:
    """Where ranks part, in words; empty if all of them do the same."""
    first = records[0]
    for rank, other in enumerate(records):
        for number, (one, two) in enumerate(zip(first.calls, other.calls, strict=False)):
            if one != two:
                return f"call {number}: {one} on rank 0, {two} on rank {rank}"
        if len(first.calls) != len(other.calls):
            return f"{len(first.calls)} calls on rank 0, {len(other.calls)} on rank {rank}, {other.error}"
        if other.error:
            return f"rank {rank}: {other.error}"
    return ""
