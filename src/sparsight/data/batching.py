"""Which samples make which batch, and which share a row.

The samples of an optimizer step follow from the seed alone; sizes only settle how they are dealt out to ranks,
micro-batches and rows. All of it is a function of numbers: to resume is to count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from sparsight.errors import UserError

Step = list[list[int]]  # micro-batches of sample indices; those of rank r of R are step[r::R]
LARGEST = 1, 2  # steps, from 0, in which memory is at its highest
WINDOW = 32  # micro-batches whose samples are sorted by length, where batch_tokens makes them


def micro_batches(
    ranks: int, batch_size: int, micro_batch_size: int | None = None, batch_tokens: int | None = None
) -> int:
    """Micro-batches of a step on each rank. Raises UserError if the batch cannot be dealt out evenly."""
    if batch_tokens is not None:
        return 1
    micro = micro_batch_size or max(1, batch_size // ranks)
    if batch_size % (micro * ranks):
        raise UserError(
            f"batch_size {batch_size} cannot be dealt out to {ranks} ranks in micro-batches of {micro}: expected a "
            f"multiple of {micro * ranks}"
        )
    return batch_size // (micro * ranks)


def plan_steps(
    samples: int,
    seed: int,
    ranks: int = 1,
    sizes: np.ndarray | None = None,
    *,
    batch_size: int = 1,
    micro_batch_size: int | None = None,
    batch_tokens: int | None = None,
    packing: bool = False,
    largest_first: bool = False,
) -> list[Step]:
    """Deal ``samples`` out to optimizer steps, every sample once; the last step may repeat some, so that each of its
    micro-batches has one.

    With ``batch_size``, a step has that many samples. Images are balanced over ranks, and micro-batches have samples of
    like length (packed: of all lengths, so that they weigh the same). With ``batch_tokens``, a micro-batch has as many
    samples of like length as fit into so many positions, padding included, and a step has one for each rank.

    Args:
        sizes: (samples, 2): positions of each sample, visual tokens included, and its images (at native resolution
            their patches). Needed if there is anything to deal out.
        largest_first: the step with the longest sample (packed or with ``batch_tokens``: with most positions, padding
            included) comes second, where optimizer states exist too, and that with most images third: memory runs
            out at once or never.

    Raises:
        UserError: the batch cannot be dealt out evenly; a sample alone is longer than ``batch_tokens``.
    """
    order = np.random.default_rng(seed).permutation(samples).tolist()
    accumulate = micro_batches(ranks, batch_size, micro_batch_size, batch_tokens)
    if batch_tokens is not None:
        assert sizes is not None
        steps = _by_tokens(order, seed, ranks, sizes, batch_tokens, packing)
    else:
        groups = [order[start : start + batch_size] for start in range(0, samples, batch_size)]
        steps = [_deal(group, ranks, accumulate, sizes, packing) for group in groups]
    if not largest_first or sizes is None:
        return steps

    def positions(step: Step) -> int:
        if batch_tokens is not None and not packing:
            return max(len(batch) * int(sizes[batch, 0].max()) for batch in step)
        # Of the whole step, so that the steps' order does not depend on ranks and micro-batches.
        own = sizes[sorted({*itertools.chain(*step)}), 0]
        return int(own.sum() if packing else own.max())

    def images(step: Step) -> int:
        return int(sizes[sorted({*itertools.chain(*step)}), 1].sum())

    for at, load in zip(LARGEST, (positions, images), strict=True):
        worst = max(range(len(steps)), key=lambda n: load(steps[n]))
        # The second step stays there; where all are alike, as with one image each, so do all.
        if at < len(steps) and load(steps[worst]) > max(map(load, steps[1 : at + 1])):
            steps[at], steps[worst] = steps[worst], steps[at]
    return steps


def _deal(group: list[int], ranks: int, accumulate: int, sizes: np.ndarray | None, packing: bool) -> Step:
    if ranks * accumulate == 1:
        return [group]
    assert sizes is not None
    group = (group * -(-ranks * accumulate // len(group)))[: max(ranks * accumulate, len(group))]
    group = sorted(group, key=lambda index: (-sizes[index, 1], -sizes[index, 0]))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for number, index in enumerate(group):  # there and back again: no rank is always first
        lap, rank = divmod(number, ranks)
        shares[rank if lap % 2 == 0 else ranks - 1 - rank].append(index)
    step: Step = [[] for _ in range(ranks * accumulate)]
    for rank, share in enumerate(shares):
        share.sort(key=lambda index: -sizes[index, 0])
        for part in range(accumulate):
            start, end = part * len(share) // accumulate, (part + 1) * len(share) // accumulate
            step[part * ranks + rank] = share[part::accumulate] if packing else share[start:end]
    return step


def _by_tokens(
    order: list[int], seed: int, ranks: int, sizes: np.ndarray, batch_tokens: int, packing: bool
) -> list[Step]:
    lengths = sizes[:, 0]
    longest = int(lengths.argmax())
    if lengths[longest] > batch_tokens:
        raise UserError(
            f"batch_tokens {batch_tokens}: sample {longest} alone has {lengths[longest]} positions, visual tokens "
            "included; expected room for the longest"
        )
    if not packing:
        window = WINDOW * max(1, int(batch_tokens / lengths.mean()))
        windows = (order[start : start + window] for start in range(0, len(order), window))
        order = [index for part in windows for index in sorted(part, key=lambda index: -lengths[index])]
    batches: list[list[int]] = [[]]
    for index in order:
        own = lengths[[*batches[-1], index]]
        if batches[-1] and (own.sum() if packing else own.max() * len(own)) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    batches.sort(key=lambda batch: -sizes[batch, 1].sum())  # neighbours have about as many images
    steps = [batches[start : start + ranks] for start in range(0, len(batches), ranks)]
    last = steps[-1]
    while len(last) < ranks:  # it gets as many micro-batches as the others: by halves, then by repeating samples
        last.sort(key=len)
        batch = last.pop()
        last += [batch[::2], batch[1::2] or batch]
    return [steps[n] for n in np.random.default_rng(seed + 1).permutation(len(steps))]


class RankBatches(list[list[int]]):
    """The micro-batches of one rank, in order: a DataLoader's batch sampler."""

    def __init__(self, steps: Sequence[Step], rank: int = 0, ranks: int = 1) -> None:
        super().__init__(batch for step in steps for batch in step[rank::ranks])


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
