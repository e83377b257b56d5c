"""Which samples make which batch, and which share a row.

What an optimizer step learns from follows from the seed alone; lengths only settle how its samples are dealt out to
micro-batches, ranks and rows. All of it is a function of numbers: to resume is to count.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

Step = list[list[int]]  # micro-batches of sample indices, over all ranks


def plan_steps(
    samples: int,
    seed: int,
    parts: int,
    batch_size: int,
    lengths: np.ndarray | None = None,
    batch_tokens: int | None = None,
    packing: bool = False,
    largest_second: bool = False,
) -> list[Step]:
    """Deal ``samples`` out to optimizer steps of ``parts`` micro-batches each, every sample once.

    Args:
        parts: micro-batches of a step, over all ranks; each gets a sample at least, so the last step may repeat some.
        batch_size: samples of a step, unless ``batch_tokens`` is given.
        lengths: positions of each sample, visual tokens included. With them, a micro-batch holds samples of like
            length (packed: of all lengths, so that micro-batches weigh the same).
        batch_tokens: as many samples in a micro-batch as have so many positions, padding included.
        largest_second: the step with the longest sample (packed: with most positions) comes second, where optimizer
            states exist too: memory runs out at once or never.

    Raises:
        ValueError: a sample alone is longer than ``batch_tokens``.
    """
    order = np.random.default_rng(seed).permutation(samples).tolist()
    if batch_tokens is not None:
        assert lengths is not None
        batches = _by_tokens(order, lengths, batch_tokens, packing)
        steps = [batches[start : start + parts] for start in range(0, len(batches), parts)]
        steps[-1] = _split(steps[-1], parts)
    else:
        groups = [order[start : start + batch_size] for start in range(0, samples, batch_size)]
        steps = [_deal(group, parts, lengths, packing) for group in groups]
    if largest_second and lengths is not None and len(steps) > 1:
        # Of whole steps, so that their order does not depend on ranks and micro-batches.
        sizes = [lengths[sorted({index for batch in step for index in batch})] for step in steps]
        worst = max(range(len(steps)), key=lambda n: sizes[n].sum() if packing else sizes[n].max())
        steps[1], steps[worst] = steps[worst], steps[1]
    return steps


def _positions(batch: Sequence[int], lengths: np.ndarray, packing: bool) -> int:
    own = lengths[list(batch)]
    return int(own.sum() if packing else own.max() * len(own))


def _deal(group: list[int], parts: int, lengths: np.ndarray | None, packing: bool) -> Step:
    group = (group * -(-parts // len(group)))[: max(parts, len(group))]
    if lengths is not None:
        group = sorted(group, key=lambda index: -lengths[index])
    if packing:
        return [group[part::parts] for part in range(parts)]
    edges = [part * len(group) // parts for part in range(parts + 1)]
    return [group[start:end] for start, end in itertools.pairwise(edges)]


def _by_tokens(order: list[int], lengths: np.ndarray, batch_tokens: int, packing: bool) -> list[list[int]]:
    longest = int(lengths.argmax())
    if lengths[longest] > batch_tokens:
        raise ValueError(
            f"batch_tokens {batch_tokens}: sample {longest} alone has {lengths[longest]} positions, visual tokens "
            "included; expected room for the longest"
        )
    batches: list[list[int]] = [[]]
    for index in order:
        if batches[-1] and _positions([*batches[-1], index], lengths, packing) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _split(step: Step, parts: int) -> Step:
    """The last step, brought to as many micro-batches as the others: by halves, then by repeating samples."""
    step = list(step)
    while len(step) < parts:
        step.sort(key=len)
        batch = step.pop()
        step += [batch[::2], batch[1::2] or batch]
    return step


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one rank, in order: a DataLoader's batch sampler."""

    def __init__(self, steps: Sequence[Step], rank: int = 0, ranks: int = 1) -> None:
        self.batches = [batch for step in steps for batch in step[rank::ranks]]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most ``capacity`` positions: first fit, the longest samples first; in a row by their number."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((number for number, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)
