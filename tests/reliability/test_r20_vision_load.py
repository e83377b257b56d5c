"""R20: ranks get as many images as can be, in every step, also where text stands among them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_runs import stage_values
from sparsight.config import Stage
from sparsight.data.batching import Step, plan_steps


def images_by_rank(step: Step, ranks: int, images: np.ndarray) -> list[int]:
    return [sum(int(images[batch].sum()) for batch in step[rank::ranks]) for rank in range(ranks)]


@given(st.integers(0, 9), st.sampled_from([2, 4]), st.sampled_from([1, 2]), st.booleans())
def test_images_of_ranks_differ_by_those_of_one_sample_at_most(
    seed: int, ranks: int, accumulate: int, packing: bool
) -> None:
    draw = np.random.default_rng(seed)
    images = draw.choice([0, 0, 1, 1, 1, 4], 160)
    sizes = np.stack([draw.integers(5, 60, 160) + 32 * images, images], 1)
    stage = Stage.model_validate(
        stage_values(batch_size=16, micro_batch_size=16 // ranks // accumulate, packing=packing)
    )
    for step in plan_steps(stage, 160, seed, ranks, sizes):
        found = images_by_rank(step, ranks, images)
        assert max(found) - min(found) <= 4
        assert max(found) - min(found) <= max((images[i] for batch in step for i in batch), default=0)


@pytest.mark.parametrize("packing", [False, True])
def test_token_budgets_put_batches_of_like_many_images_together(packing: bool) -> None:
    draw = np.random.default_rng(1)
    images = draw.integers(0, 3, 600)
    sizes = np.stack([draw.integers(5, 60, 600) + 32 * images, images], 1)
    values = stage_values(batch_tokens=600, packing=packing)
    del values["batch_size"]
    steps = plan_steps(Stage.model_validate(values), 600, 0, 4, sizes)
    found = [images_by_rank(step, 4, images) for step in steps[:-1]]
    assert np.mean([max(each) - min(each) for each in found]) < 1
