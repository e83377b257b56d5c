"""Steps, micro-batches and packed rows: every sample once, and what was promised to fit fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_runs import stage_values
from sparsight.data.batching import RankBatches, micro_batches, pack, plan_steps
from sparsight.settings.recipe import Stage

SIZES = st.lists(st.tuples(st.integers(4, 90), st.integers(0, 3)), min_size=1, max_size=90).map(np.array)


def dealt(steps: list[list[list[int]]]) -> list[int]:
    return [index for step in steps for batch in step for index in batch]


@given(SIZES, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 5))
def test_every_sample_once_and_the_same_ones_in_a_step_however_it_is_cut(
    sizes: np.ndarray, ranks: int, accumulate: int, packing: bool, seed: int
) -> None:
    samples, size = len(sizes), 8
    given_values = {"batch_size": size, "packing": packing, "largest_first": True}
    steps = plan_steps(samples, seed, ranks, sizes, micro_batch_size=size // (ranks * accumulate), **given_values)
    whole = plan_steps(samples, seed, 1, sizes, **given_values)
    assert [sorted(set(dealt([step]))) for step in steps] == [sorted(dealt([step])) for step in whole]
    assert sorted(dealt(whole)) == list(range(samples))
    assert {len(step) for step in steps} == {ranks * accumulate} and all(batch for step in steps for batch in step)
    again = dealt(steps)
    assert len(again) - samples < ranks * accumulate and set(again) == set(range(samples))


@given(SIZES, st.sampled_from([1, 2, 3]), st.booleans(), st.integers(90, 300))
def test_a_token_budget_holds_and_every_sample_comes(sizes: np.ndarray, ranks: int, packing: bool, most: int) -> None:
    steps = plan_steps(len(sizes), 3, ranks, sizes, batch_tokens=most, packing=packing)
    assert set(dealt(steps)) == set(range(len(sizes))) and {len(step) for step in steps} == {ranks}
    for batch in (batch for step in steps for batch in step):
        own = sizes[batch, 0]
        assert own.sum() <= most if packing else own.max() * len(own) <= most
    # Repeated is at most what fills the last step.
    assert len(dealt(steps)) - len(sizes) < ranks


def test_a_budget_that_the_longest_sample_breaks() -> None:
    sizes = np.array([[20, 1], [50, 1]])
    with pytest.raises(ValueError, match=r"batch_tokens 40: sample 1 alone has 50 positions.*room for the longest"):
        plan_steps(2, 0, 1, sizes, batch_tokens=40)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_tokens": 100, "batch_size": 4}, "batch_tokens settles what batch_size and pack_length do"),
        ({"batch_tokens": 100, "pack_length": 50, "packing": True}, "batch_tokens settles what"),
        ({"batch_tokens": 100, "micro_batch_size": 2}, "batch_tokens settles what micro_batch_size does"),
        ({"pack_length": 50}, "pack_length needs packing: true"),
    ],
)
def test_keys_that_contradict_each_other(values: dict[str, Any], words: str) -> None:
    given_values = stage_values(**values)
    if "batch_size" not in values:
        del given_values["batch_size"]
    with pytest.raises(ValueError, match=words):
        Stage.model_validate(given_values)


def test_a_batch_that_cannot_be_dealt_out() -> None:
    with pytest.raises(ValueError, match="batch_size 4 cannot be dealt out to 3 ranks in micro-batches of 1: .* of 3"):
        micro_batches(3, 4)


def test_micro_batches_hold_samples_of_like_length_and_so_less_padding() -> None:
    sizes = np.stack([np.random.default_rng(0).integers(10, 200, 256), np.ones(256, int)], 1)

    def positions(micro: int) -> int:
        steps = plan_steps(256, 0, 1, sizes, batch_size=32, micro_batch_size=micro)
        return sum(sizes[batch, 0].max() * len(batch) for step in steps for batch in step)

    tokens = plan_steps(256, 0, 1, sizes, batch_tokens=1600)
    grouped = sum(sizes[batch, 0].max() * len(batch) for step in tokens for batch in step)
    filled = sizes[:, 0].sum()
    assert positions(32) > 1.7 * filled and positions(4) < 1.2 * filled and grouped < 1.1 * filled


def test_ranks_take_turns() -> None:
    steps = [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    assert list(RankBatches(steps, 1, 2)) == [[1], [3], [5], [7]] and len(RankBatches(steps, 0, 2)) == 4


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_packed_rows_hold_each_sample_once_and_no_two_could_be_one(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= capacity
    assert all(a + b > capacity for n, a in enumerate(filled) for b in filled[:n])
