import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsight.schedules import anneal, skip_probabilities, skipped_layers
from sparsight.settings.methods import CompressorConfig, SkipperConfig

SHARES = st.floats(0, 1)
KINDS = ["constant", "linear", "cosine", "steps"]


@given(st.sampled_from(KINDS), SHARES, SHARES, SHARES, SHARES)
def test_annealing_goes_one_way_between_its_ends(kind, start, end, one, other):
    early, late = (anneal(kind, start, end, progress) for progress in sorted((one, other)))
    assert min(start, end) - 1e-9 <= early <= max(start, end) + 1e-9
    assert (late - early) * (end - start) >= -1e-9
    assert anneal(kind, start, end, 0) == pytest.approx(start)
    assert anneal(kind, start, end, 1) == pytest.approx(start if kind == "constant" else end)


def test_annealing_in_steps_and_by_cosine():
    assert [anneal("steps", 0, 3, p) for p in (0, 0.24, 0.26, 0.5, 0.76, 1)] == pytest.approx([0, 0, 1, 2, 3, 3])
    assert anneal("cosine", 0, 1, 0.5) == pytest.approx(0.5) and anneal("cosine", 0, 1, 0.25) < 0.2


def test_the_papers_formula():
    """alpha 0.6, epsilon 0.3, 5 layers, a quarter done: 0.6 * 0.75^2 * (1 + 0.3 * (2 l - 4) / 4)."""
    wanted = [0.3375 * tilt for tilt in (0.7, 0.85, 1.0, 1.15, 1.3)]
    assert skip_probabilities(5, 0.25, 0.6, 0.3) == pytest.approx(wanted)


@given(st.integers(1, 40), SHARES, SHARES, st.floats(-1, 1), st.sampled_from(["falling", "constant", "rising"]))
def test_probabilities_are_probabilities_and_keep_their_mean(layers, progress, share, epsilon, schedule):
    alpha = share / (1 + abs(epsilon))
    found = skip_probabilities(layers, progress, alpha, epsilon, schedule)
    assert all(0 <= p <= 1 + 1e-12 for p in found)
    level = skip_probabilities(layers, progress, alpha, 0, schedule)
    assert math.fsum(found) == pytest.approx(math.fsum(level), abs=1e-9)
    assert found == sorted(found, reverse=epsilon < 0)


def test_courses_over_a_stage():
    def means(schedule):
        return [skip_probabilities(3, p, 0.5, 0, schedule)[0] for p in (0, 0.5, 1)]

    assert means("falling") == pytest.approx([0.5, 0.125, 0])  # at the end every layer runs
    assert means("constant") == [0.5, 0.5, 0.5]
    assert means("rising")[0] == 0 and means("rising")[2] == pytest.approx(0.5)
    # One epoch of the falling schedule skips alpha / 3 in the mean.
    mean = sum(skip_probabilities(1, i / 999, 0.6)[0] for i in range(1000)) / 1000
    assert mean == pytest.approx(0.2, abs=1e-3)


def test_a_plateau_its_decay_and_a_dense_end():
    def means(schedule="plateau", **shares):
        return [skip_probabilities(3, step / 20, 0.5, 0, schedule, **shares)[0] for step in range(20)]

    assert means() == pytest.approx([0.5] * 17 + [0.375, 0.25, 0.125])  # from 0.8 to the end
    assert means(decay_from=0.5, dense_last=0.25) == pytest.approx([0.5] * 11 + [0.4, 0.3, 0.2, 0.1] + [0] * 5)
    assert means("constant", dense_last=0.35) == [0.5] * 13 + [0.0] * 7  # 13 / 20 and 1 - 0.35 differ
    before, after = means("falling"), means("falling", dense_last=0.1)
    assert after == [*before[:18], 0.0, 0.0]  # the schedule itself is as before
    with pytest.raises(ValueError, match="decay_from 0.8, dense_last 0.2: expected decay_from < 1 - dense_last"):
        means(dense_last=0.2)


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 40), SHARES)
def test_settings_left_alone_are_the_schemes_bit_by_bit(seed, step, layers, progress):
    """What the Sparse Training Scheme's skipper drew before it had other options."""
    config = SkipperConfig(alpha=0.6, epsilon=0.3)
    chances = config.probabilities(layers, progress)
    tilts = [1 + 0.3 * (2 * layer - (layers - 1)) / max(layers - 1, 1) for layer in range(layers)]
    assert chances == [0.6 * (1 - progress) ** 2 * tilt for tilt in tilts]
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step]))).random(layers)
    wanted = (draws < chances).tolist()
    if all(wanted):
        wanted[0] = False
    assert skipped_layers(chances, seed, step) == tuple(wanted)
    neutral = SkipperConfig(alpha=0.6, epsilon=0.3, dense_last=0.0, layers="any", inverse_density=False)
    assert neutral == config and neutral.probabilities(layers, progress) == chances


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 0.5))
def test_alternating_layers_are_never_neighbours(seed, step, layers, p):
    found = skipped_layers([p] * layers, seed, step, alternating=True)
    assert not any(one and other for one, other in pairwise(found))
    assert len({layer % 2 for layer, skipped in enumerate(found) if skipped}) <= 1
    assert found == skipped_layers([p] * layers, seed, step, alternating=True)
    more = skipped_layers([p] * (layers + 1), seed, step, alternating=True)
    assert layers == 1 or more[:-1] == found  # a layer's draw does not depend on the number of layers


def test_alternating_layers_are_skipped_as_often():
    wanted, steps = [0.1, 0.5, 0.4, 0.0, 0.25], 4000
    drawn = [skipped_layers(wanted, 7, step, alternating=True) for step in range(steps)]
    for column, p in zip(zip(*drawn, strict=True), wanted, strict=True):
        assert abs(sum(column) / steps - p) <= 5 * math.sqrt(p * (1 - p) / steps)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decay_from": 0.5}, "decay_from 0.5: expected schedule 'plateau', found 'falling'"),
        ({"schedule": "plateau", "dense_last": 0.2}, r"decay_from 0.8, dense_last 0.2: expected decay_from < 1 - "),
        (
            {"layers": "alternating"},
            r"alpha 0.6, epsilon 0.3: with layers 'alternating', .* in half of the steps: .*0.5",
        ),
        ({"inverse_density": True, "alpha": 1.0, "epsilon": 0.0}, r"with inverse_density, expected .* < 1"),
        ({"protected": (-1, 0)}, r"protected \(-1, 0\): expected numbers of first and last layers"),
        ({"importance": (1.0,), "protected": (1, 1)}, r"protected layers 1 \+ 1: the model has 1"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        SkipperConfig(**settings)


def test_shares_of_tokens_that_a_schedule_keeps():
    risen, level = CompressorConfig(keep=0.5, final=0.75), CompressorConfig(keep=0.5)
    assert [risen.keep_at(progress) for progress in (0.0, 0.5, 1.0)] == [0.5, 0.625, 0.75]
    assert (risen.most, risen.scheduled) == (0.75, True)
    assert (level.keep_at(0.9), level.most, level.scheduled) == (0.5, 0.5, False)
    now_and_then = CompressorConfig(keep=0.25, dense_every=10)
    assert (now_and_then.most, now_and_then.scheduled) == (1.0, True)


def test_protected_and_important_layers():
    found = skip_probabilities(6, 0, 0.5, 0.4, protected=(2, 1))
    assert [p > 0 for p in found] == [False, False, True, True, True, False]
    found = skip_probabilities(4, 0, 0.5, 0.4, importance=[0.1, 0.9, 0.5, 0.3])
    assert sorted(range(4), key=lambda layer: found[layer]) == [1, 2, 3, 0]  # the least important goes most


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(2, 40))
def test_draws_are_a_function_of_seed_step_and_layer(seed, step, layers):
    halves = [0.5] * layers
    assert skipped_layers(halves, seed, step) == skipped_layers(halves, seed, step)
    some, fewer = skipped_layers(halves, seed, step), skipped_layers(halves[:-1], seed, step)
    assert some[1:-1] == fewer[1:]
    assert some[0] == fewer[0] or all(fewer[1:])  # else neither has all layers drawn
    assert skipped_layers([0.0] * layers, seed, step) == (False,) * layers
    # One runs always, the one with the smallest chance to be off: else nothing might be there to learn.
    assert skipped_layers([1.0] * layers, seed, step) == (False,) + (True,) * (layers - 1)
    assert skipped_layers([1.0] * (layers - 1) + [0.999999], seed, step)[:-1] == (True,) * (layers - 1)
    assert not all(skipped_layers([0.9] * layers, seed, step))


def test_draws_hit_their_probabilities():
    wanted = [0.1, 0.5, 0.8, 0.0]  # one layer always runs
    counts = [sum(column) for column in zip(*(skipped_layers(wanted, 7, step) for step in range(4000)), strict=True)]
    for count, p in zip(counts, wanted, strict=True):
        assert abs(count / 4000 - p) <= 5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"progress": 1.2}, "progress 1.2: expected 0 to 1"),
        ({"alpha": 0.8, "epsilon": 0.5}, r"alpha 0.8, epsilon 0.5: expected .* alpha \* \(1 \+ \|epsilon\|\) <= 1"),
        ({"alpha": -0.1}, "alpha -0.1"),
        ({"protected": (3, 2)}, r"protected layers 3 \+ 2: the model has 4"),
        ({"importance": [1.0]}, "importance has 1 values, but the model has 4 layers"),
    ],
)
def test_what_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        skip_probabilities(**({"layers": 4, "progress": 0.5, "alpha": 0.5} | arguments))
    with pytest.raises(ValueError, match="progress -0.1"):
        anneal("linear", 0, 1, -0.1)
