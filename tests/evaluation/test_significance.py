"""Intervals and tests by brute force where that is possible, and by what they promise where it is not."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.evaluation.significance import PairedTest, bootstrap, by_grade, holm, paired_test, paired_tests

POINT = st.sampled_from([0.0, 0.25, 1.0])


def sample(rng: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Points around 0, of images with one to four items that lean the same way; and the images."""
    image = np.repeat(np.arange(images), rng.integers(1, 5, images))
    return rng.normal(size=images)[image] + 0.3 * rng.normal(size=len(image)), image


# ---------------------------------------------------------------------------------------- intervals


def test_the_interval_is_that_of_all_resamples() -> None:
    """Of four images there are 256: their exact quantiles, with images of unlike size."""
    points, images = [1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 1.0], ["a", "a", "a", "b", "c", "d", "d"]
    by_image = [[p for p, name in zip(points, images, strict=True) if name == own] for own in "abcd"]
    means = [np.mean([point for own in chosen for point in own]) for chosen in product(by_image, repeat=4)]
    found = bootstrap(points, images, level=0.8, draws=20_000)
    assert found.mean == pytest.approx(np.mean(points)) and found.deviation is None
    # by rank: between two neighbouring means the quantile of draws may fall on either
    for bound, share in ((found.low, 0.1), (found.high, 0.9)):
        assert np.mean(np.array(means) < bound - 1e-9) <= share + 0.02
        assert np.mean(np.array(means) <= bound + 1e-9) >= share - 0.02


def test_the_mean_over_tasks_is_that_of_their_means_in_each_draw() -> None:
    points, tasks, images = [1.0, 0.0, 0.0, 0.0, 1.0], ["x", "x", "x", "x", "y"], [0, 0, 1, 2, 1]
    draws = []
    for chosen in product(range(3), repeat=3):
        means = []
        for task in "xy":
            own = [p for c in chosen for p, t, k in zip(points, tasks, images, strict=True) if (t, k) == (task, c)]
            means += [np.mean(own)] if own else []
        draws.append(np.mean(means))
    found = bootstrap(points, images, tasks, level=0.5, draws=20_000)
    assert found.mean == pytest.approx((0.25 + 1) / 2)
    for bound, share in ((found.low, 0.25), (found.high, 0.75)):
        assert np.mean(np.array(draws) < bound - 1e-9) <= share + 0.02
        assert np.mean(np.array(draws) <= bound + 1e-9) >= share - 0.02


def test_a_95_percent_interval_covers_the_truth_in_about_95_percent_of_trials() -> None:
    """By image in 93.6%; where items are taken for independent in 75.2%."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(250):
        points, images = sample(rng, 40)
        for place, clusters in enumerate((images, None)):
            found = bootstrap(points, clusters, draws=200)
            covered[place] += found.low <= 0 <= found.high
    assert 0.90 <= covered[0] / 250 <= 0.98
    assert covered[1] / 250 < 0.87


def test_seeds_and_items_count_together() -> None:
    """Of ten seeds: the interval covers the truth in 93.5%; of three it did in 88%, and a single one's in 53.5%."""
    rng = np.random.default_rng(1)
    covered = np.zeros(2)
    for _ in range(200):
        items, seeds = rng.normal(size=60), rng.normal(size=(10, 1)) * 0.3
        points = items + seeds + 0.2 * rng.normal(size=(10, 60))
        both, alone = bootstrap(points, draws=200), bootstrap(points[0], draws=200)
        assert both.mean == pytest.approx(points.mean())
        assert both.deviation == pytest.approx(np.std(points.mean(1), ddof=1))
        covered += [found.low <= 0 <= found.high for found in (both, alone)]
    assert 0.88 <= covered[0] / 200 <= 0.99
    assert covered[1] / 200 < 0.7  # one seed's items know nothing of seeds


def test_weights_make_f1_of_yes_and_no() -> None:
    rng = np.random.default_rng(2)
    true = rng.random(300) < 0.5
    said = true ^ (rng.random(300) < 0.2)
    found = bootstrap(2.0 * said * true, weights=said.astype(float) + true)
    precision, recall = (said & true).sum() / said.sum(), (said & true).sum() / true.sum()
    assert found.mean == pytest.approx(2 / (1 / precision + 1 / recall))
    assert found.low < found.mean < found.high and found.high - found.low < 0.12
    assert bootstrap([0.0, 0.0], weights=[0.0, 0.0], draws=5)[:3] == (0, 0, 0)


def test_results_follow_from_the_seed_alone() -> None:
    points, images = sample(np.random.default_rng(3), 20)
    assert bootstrap(points, images) == bootstrap(points, images)
    assert bootstrap(points, images) != bootstrap(points, images, seed=1)
    names = [f"image {number}" for number in images]
    assert bootstrap(points, names) == bootstrap(points, images)


# ---------------------------------------------------------------------------------------- paired test


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_right_and_wrong_answers_give_mcnemars_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    won, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    tail = sum(comb(won + lost, k) for k in range(max(won, lost), won + lost + 1)) / 2 ** (won + lost)
    found = paired_test(*np.array(pairs, float).T, draws=20)
    assert found.p_value == pytest.approx(min(1, 2 * tail))
    assert found.difference == pytest.approx((won - lost) / len(pairs))


@given(st.lists(st.tuples(POINT, POINT, st.integers(0, 5), st.sampled_from("xy")), min_size=1, max_size=15))
@settings(max_examples=50, deadline=None)
def test_images_change_sides_as_a_whole(items: list[tuple[float, float, int, str]]) -> None:
    """Every way to change sides, one by one, and the difference computed anew each time."""
    ours, theirs, images, tasks = map(list, zip(*items, strict=True))

    def difference(swapped: set[int]) -> float:
        deltas = [(b - a if image in swapped else a - b, task) for a, b, image, task in items]
        return float(np.mean([np.mean([d for d, own in deltas if own == task]) for task in set(tasks)]))

    names = sorted(set(images))
    ways = [{name for name, bit in zip(names, bits, strict=True) if bit} for bits in product((0, 1), repeat=len(names))]
    least = abs(difference(set())) - 1e-9
    expected = np.mean([abs(difference(way)) >= least for way in ways])
    found = paired_test(ours, theirs, images, tasks, draws=20)
    assert found.p_value == pytest.approx(expected)
    assert found.difference == pytest.approx(difference(set()))


def test_drawn_permutations_come_near_to_all_of_them() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.random(12) + 0.15, rng.random(12)
    exact = paired_test(ours, theirs, draws=20)
    drawn = paired_test(ours, theirs, draws=20, permutations=4000)
    assert 0.02 < exact.p_value < 0.9
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.03) and drawn.p_value != exact.p_value


def test_p_values_are_uniform_where_models_are_alike() -> None:
    """And where items that share an image are taken for independent, they are too small."""
    rng = np.random.default_rng(5)
    found, naive = [], []
    for _ in range(400):
        points, images = sample(rng, 30)
        zero = np.zeros_like(points)
        found.append(paired_test(points, zero, images, draws=1, permutations=200).p_value)
        naive.append(paired_test(points, zero, draws=1, permutations=200).p_value)
    for share in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(np.array(found) <= share) == pytest.approx(share, abs=0.07)
    assert np.mean(np.array(naive) <= 0.05) > 0.15


def test_a_difference_is_found_where_unpaired_intervals_overlap() -> None:
    rng = np.random.default_rng(6)
    hard = rng.random(200)
    theirs, ours = (hard > 0.5).astype(float), (hard > 0.42).astype(float)  # right on the same items, and on more
    found = paired_test(ours, theirs)
    assert found.p_value < 0.001 and found.low > 0
    assert bootstrap(theirs).high > bootstrap(ours).low


def test_seeds_are_paired_too() -> None:
    rng = np.random.default_rng(7)
    theirs = rng.random((3, 50))
    ours = theirs + 0.1 + 0.05 * rng.normal(size=(3, 50))
    found = paired_test(ours, theirs)
    alone = paired_test(ours.mean(0), theirs.mean(0))
    assert found.difference == pytest.approx(alone.difference)
    assert found.p_value == alone.p_value and found.high - found.low > alone.high - alone.low


def test_users_mistakes_are_told() -> None:
    for points in ([], [[]], np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match=r"expected \(I,\) or \(S, I\)"):
            bootstrap(points)
    for points, weights in (([float("nan")], None), ([1.0], [-1.0]), ([1.0], [float("inf")])):
        with pytest.raises(ValueError, match="must be finite"):
            bootstrap(points, weights=weights)
    with pytest.raises(ValueError, match="2 images for 3 items"):
        bootstrap([1.0, 0.0, 1.0], images=[1, 2])
    with pytest.raises(ValueError, match="0 tasks for 1 items"):
        bootstrap([1.0], tasks=[])
    for level, draws in ((0, 10), (1, 10), (0.5, 0)):
        with pytest.raises(ValueError, match=f"level={level}, draws={draws}"):
            bootstrap([1.0], level=level, draws=draws)
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 1\)"):
        paired_test([1.0, 0.0], [1.0])


# ---------------------------------------------------------------------------------------- several tests


def test_holm_is_what_the_book_computes() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_of_families_without_a_difference_one_in_twenty_has_one_below_the_level() -> None:
    rng = np.random.default_rng(0)
    found = np.mean([min(holm(list(rng.random(7)))) < 0.05 for _ in range(4000)])
    assert found == pytest.approx(0.05, abs=0.01)
    assert np.mean([min(rng.random(7)) < 0.05 for _ in range(4000)]) > 0.25  # what it corrects


def test_a_difference_is_told_where_interval_and_corrected_p_both_say_so() -> None:
    rng = np.random.default_rng(0)
    right, images = (rng.random(60) < 0.9).astype(float), list(range(60))
    theirs = {"better": 1 - right, "worse": right, "alike": right, "alone": right}
    ours = {"better": right, "worse": 1 - right, "alike": np.roll(right, 1), "other": right}
    found = paired_tests(ours, theirs, dict.fromkeys(ours, images))
    assert {task: test.told for task, test in found.items()} == {"better": 1, "worse": -1, "alike": 0}
    alone = {task: paired_test(ours[task], theirs[task], images) for task in found}
    raised = holm([test.p_value for test in alone.values()])
    assert [test.p_value for test in found.values()] == raised and all(found[t][:3] == alone[t][:3] for t in found)
    assert [PairedTest(0.1, *rest).told for rest in ((0.05, 0.2, 0.06), (-0.05, 0.2, 0.01), (0.05, 0.2, 0.01))] == [
        0,
        0,
        1,
    ]


# ---------------------------------------------------------------------------------------- grades


def graded_items(rng: np.random.Generator) -> tuple[dict[str, list[float]], dict[str, list[int]], dict[str, dict]]:
    """Three tasks about the same 40 images; "read" is asked of few sizes, and "relate" alone takes three steps."""
    size = [int(n) for n in rng.integers(19, 33, 40)]
    points = {task: [float(n) for n in rng.random(40).round(2)] for task in ("name", "read", "relate")}
    grades = {task: {"steps": [1] * 40, "size": list[int | None](size), "many": [1] * 40} for task in points}
    grades["relate"] |= {"steps": [3] * 40, "digits": [None] * 40}
    grades["read"] |= {"size": [min(size)] * 40, "digits": [1 + n % 2 for n in range(40)]}
    grades["name"]["size"][:5] = [None] * 5
    return points, {task: list(range(40)) for task in points}, grades


def test_scores_by_grade_are_those_of_the_items_of_each_group() -> None:
    points, images, grades = graded_items(np.random.default_rng(0))
    found = {(each.grade, each.group): each for each in by_grade(points, images, grades)}
    assert {grade for grade, _ in found} == {"steps", "size", "digits"}  # "many" has one value
    assert found["steps", "1"].score == bootstrap(
        points["name"] + points["read"], images["name"] * 2, ["name"] * 40 + ["read"] * 40
    )
    assert found["steps", "3"].score == bootstrap(points["relate"]) and found["steps", "3"].items == 40
    assert [found["digits", each].tasks for each in "12"] == [["read"]] * 2
    assert found["digits", "2"].score.mean == pytest.approx(np.mean(points["read"][1::2]))
    # "read" has no large things: a task that is not in every group is in none
    sized = [each for each in found.values() if each.grade == "size"]
    assert len(sized) == 3 and all(sorted(each.tasks) == ["name", "relate"] for each in sized)
    ends = [[int(each.group.split(" to ")[at]) for at in (0, -1)] for each in sized]
    every = sorted(n for task in ("name", "relate") for n in grades[task]["size"] if n is not None)
    assert ends[0][0] == every[0] and ends[0][1] < ends[1][0] <= ends[1][1] < ends[2][0] and ends[2][1] == every[-1]
    assert sum(each.items for each in sized) == len(every)
    for each, (low, high) in zip(sized, ends, strict=True):
        means = []
        for task in each.tasks:
            own = [n for n, value in enumerate(grades[task]["size"]) if value is not None and low <= value <= high]
            means.append(np.mean([points[task][n] for n in own]))
        assert each.score.mean == pytest.approx(np.mean(means)) and each.score.low < each.score.mean < each.score.high


def test_grades_of_seeds_and_of_differences() -> None:
    """The mean over seeds is that of their means, and a difference of means that of the differences."""
    points, images, grades = graded_items(np.random.default_rng(1))
    other, _, _ = graded_items(np.random.default_rng(2))
    one, two = (by_grade(own, images, grades) for own in (points, other))
    seeds = by_grade({task: np.array([points[task], other[task]]) for task in points}, images, grades)
    gaps = by_grade({task: np.subtract(points[task], other[task]) for task in points}, images, grades)
    for a, b, both, gap in zip(one, two, seeds, gaps, strict=True):
        assert a[:4] == b[:4] == both[:4] == gap[:4]
        assert both.score.mean == pytest.approx((a.score.mean + b.score.mean) / 2) and both.score.deviation is not None
        assert gap.score.mean == pytest.approx(a.score.mean - b.score.mean)


def test_what_has_no_grades_has_no_groups() -> None:
    assert by_grade({"a": [1.0, 0.0]}, {"a": [0, 1]}, {}) == []
    assert by_grade({}, {}, {}) == []
    assert by_grade({"a": [1.0, 0.0]}, {"a": [0, 1]}, {"a": {"size": [None, None]}}) == []
    apart = {"a": {"size": [1, 1, 2]}, "b": {"size": [2, 2, 3]}}  # in common at 2 alone
    assert by_grade({"a": [1.0] * 3, "b": [0.0] * 3}, {"a": [0, 1, 2], "b": [0, 1, 2]}, apart) == []
