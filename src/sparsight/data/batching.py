"""Which samples make which batch, and which share a row.

What an optimizer step learns from follows from the seed alone; sizes only settle how its samples are dealt out to
ranks, micro-batches and rows. All of it is a function of numbers: to resume is to count.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from torch.utils.data import Sampler

from sparsight.errors import UserError
from sparsight.settings.recipe import Stage

Step = list[list[int]]  # micro-batches of sample indices; those of rank r of R are step[r::R]
LARGEST = 1, 2  # steps, from 0, in which memory is at its highest
WINDOW = 32  # micro-batches whose samples are sorted by length, where batch_tokens makes them


def micro_batches(stage: Stage, ranks: int) -> int:
    """Micro-batches of a step on each rank.

    Raises:
        UserError: the batch cannot be dealt out evenly.
    """
    if stage.batch_tokens is not None:
        return 1
    micro = stage.micro_batch_size or max(1, stage.batch_size // ranks)
    if stage.batch_size % (micro * ranks):
        raise UserError(
            f"stage '{stage.name}': batch_size {stage.batch_size} cannot be dealt out to {ranks} ranks in "
            f"micro-batches of {micro}: expected a multiple of {micro * ranks}"
        )
    return stage.batch_size // (micro * ranks)


def plan_steps(
    stage: Stage,
    samples: int,
    seed: int,
    ranks: int = 1,
    sizes: np.ndarray | None = None,
    largest_first: bool = False,
) -> list[Step]:
    """Deal ``samples`` out to optimizer steps, every sample once; the last step may repeat some, so that each of its
    micro-batches has one.

    With ``batch_size``, a step has that many samples. Ranks get as many images as can be, and micro-batches samples of
    like length (packed: of all lengths, so that they weigh the same). With ``batch_tokens``, a micro-batch has as many
    samples of like length as have so many positions, padding included, and a step one for each rank.

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
    accumulate = micro_batches(stage, ranks)
    if stage.batch_tokens is not None:
        assert sizes is not None
        steps = _by_tokens(stage, order, seed, ranks, sizes)
    else:
        groups = [order[start : start + stage.batch_size] for start in range(0, samples, stage.batch_size)]
        steps = [_deal(group, ranks, accumulate, sizes, stage.packing) for group in groups]
    if largest_first and sizes is not None:
        for place, load in zip(LARGEST, (partial(_positions, stage, sizes), partial(_images, sizes)), strict=True):
            worst = max(range(len(steps)), key=lambda n: load(steps[n]))
            # What is second stays there; where all are alike, as with a image each, so do all.
            if place < len(steps) and load(steps[worst]) > max(map(load, steps[1 : place + 1])):
                steps[place], steps[worst] = steps[worst], steps[place]
    return steps


def _positions(stage: Stage, sizes: np.ndarray, step: Step) -> int:
    """Positions that tell which step needs most memory."""
    if stage.batch_tokens is not None and not stage.packing:
        return max(len(batch) * int(sizes[batch, 0].max()) for batch in step)
    # Of the whole step, so that the steps' order does not depend on ranks and micro-batches.
    own = sizes[sorted({index for batch in step for index in batch}), 0]
    return int(own.sum() if stage.packing else own.max())


def _images(sizes: np.ndarray, step: Step) -> int:
    return int(sizes[sorted({index for batch in step for index in batch}), 1].sum())


def _deal(group: list[int], ranks: int, accumulate: int, sizes: np.ndarray | None, packing: bool) -> Step:
    if ranks * accumulate == 1:
        return [group]
    assert sizes is not None
    group = (group * -(-ranks * accumulate // len(group)))[: max(ranks * accumulate, len(group))]
    group = sorted(group, key=lambda index: (-sizes[index, 1], -sizes[index, 0]))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place, index in enumerate(group):  # there and back again: no rank is always first
        lap, rank = divmod(place, ranks)
        shares[rank if lap % 2 == 0 else ranks - 1 - rank].append(index)
    cut = [_cut(share, accumulate, sizes, packing) for share in shares]
    return [cut[rank][part] for part in range(accumulate) for rank in range(ranks)]


def _cut(share: list[int], parts: int, sizes: np.ndarray, packing: bool) -> list[list[int]]:
    share = sorted(share, key=lambda index: -sizes[index, 0])
    if packing:
        return [share[part::parts] for part in range(parts)]
    edges = [part * len(share) // parts for part in range(parts + 1)]
    return [share[start:end] for start, end in itertools.pairwise(edges)]


def _by_tokens(stage: Stage, order: list[int], seed: int, ranks: int, sizes: np.ndarray) -> list[Step]:
    lengths, most = sizes[:, 0], stage.batch_tokens
    assert most is not None
    longest = int(lengths.argmax())
    if lengths[longest] > most:
        raise UserError(
            f"stage '{stage.name}', batch_tokens {most}: sample {longest} alone has {lengths[longest]} positions, "
            "visual tokens included; expected room for the longest"
        )
    if not stage.packing:
        window = WINDOW * max(1, int(most / lengths.mean()))
        order = [
            index
            for start in range(0, len(order), window)
            for index in sorted(order[start : start + window], key=lambda index: -lengths[index])
        ]
    batches: list[list[int]] = [[]]
    for index in order:
        own = lengths[[*batches[-1], index]]
        if batches[-1] and (own.sum() if stage.packing else own.max() * len(own)) > most:
            batches.append([])
        batches[-1].append(index)
    batches.sort(key=lambda batch: -sizes[batch, 1].sum())  # ranks get as many images as can be
    steps = [batches[start : start + ranks] for start in range(0, len(batches), ranks)]
    steps[-1] = _filled(steps[-1], ranks)
    return [steps[n] for n in np.random.default_rng(seed + 1).permutation(len(steps))]


def _filled(step: Step, parts: int) -> Step:
    """A step brought to as many micro-batches as the others have: by halves, then by repeating samples."""
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
