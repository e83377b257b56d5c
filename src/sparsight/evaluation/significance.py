"""How sure a score is: bootstrap intervals, and the paired test of two models. Imports no torch.

Items that share an image are not independent, so whole images are resampled, each with all its items (the cluster
bootstrap), and whole images change sides in the test. Everything is seeded. Sources: Efron & Tibshirani, "An
Introduction to the Bootstrap" (1993), percentile intervals; Phipson & Smyth (2010), p-values that are never zero; Holm
(1979), several tests at once.

Shapes: S seeds, I items, T tasks, C images, D draws.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsight.errors import UserError

Labels = Sequence[Hashable] | None
Floats = NDArray[np.float64]
Grades = Mapping[str, Mapping[str, Sequence[int | None]]]  # task -> grade -> one an item


class Estimate(NamedTuple):
    """A mean, the interval around it, and the standard deviation of the seeds' means (None for one seed)."""

    mean: float
    low: float
    high: float
    deviation: float | None


class PairedTest(NamedTuple):
    """Mean of ours minus theirs, the interval around it, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float

    @property
    def told(self) -> int:
        """1 or -1 where ours is better or worse: the interval excludes 0, and p is below 0.05. Else 0."""
        return ((self.low > 0) - (self.high < 0)) * (self.p_value < 0.05)


def bootstrap(
    points: ArrayLike,
    images: Labels = None,
    tasks: Labels = None,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of points and its percentile interval, over images and, where there are several, seeds together.

    With few images or seeds the interval is too narrow: of one it is a point, and three seeds tell little of seeds.

    Args:
        points: (I,), or (S, I) for the same items by S seeds; seeds and images are then resampled side by side.
        images: (I,) the image that each item is about; each item by itself if not given.
        tasks: (I,) the mean is that of the tasks' means; one task if not given. A task of which nothing was drawn is
            left out of that draw's mean.
        weights: of the shape of points: the mean is sum of points / sum of weights, 0 where that is 0 / 0; ones if
            not given. F1 is such a ratio, of 2 TP and 2 TP + FP + FN.
        level: of the interval, 0 to 1.

    Raises:
        UserError: no points, points that are not finite, or labels, weights, level or draws that do not fit.
    """
    if not 0 < level < 1 or draws < 1:
        raise UserError(f"level={level}, draws={draws}: expected a level between 0 and 1 and at least 1 draw")
    sums_STC, sizes_STC = _totals(points, weights, images, tasks)
    seeds, _, count = sums_STC.shape
    rng = np.random.default_rng(seed)
    drawn = []
    for size in _blocks(draws, count):
        times_DC, times_DS = _resample(count, size, rng), _resample(seeds, size, rng)
        means_DS = _means(*(np.tensordot(times_DC, totals, (1, 2)) for totals in (sums_STC, sizes_STC)))
        drawn.append((means_DS * times_DS).sum(1) / seeds)
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    means_S = _means(sums_STC.sum(-1), sizes_STC.sum(-1))
    deviation = float(means_S.std(ddof=1)) if seeds > 1 else None
    return Estimate(float(means_S.mean()), float(low), float(high), deviation)


def paired_test(
    ours: ArrayLike,
    theirs: ArrayLike,
    images: Labels = None,
    tasks: Labels = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    permutations: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Two models on the same items: does one do better? Arguments as in `bootstrap`; (S, I) pairs seed by seed.

    The p-value is that of the sign-flip permutation test: if the models were alike, they could as well change sides
    on any image. All ways to do so are counted where they are no more than `permutations`, else so many are drawn.
    It takes the seeds as they are; the interval resamples them.

    Raises:
        UserError: ours and theirs of different shapes, and as `bootstrap` does.
    """
    ours_SI, theirs_SI = np.atleast_2d(np.asarray(ours, float)), np.atleast_2d(np.asarray(theirs, float))
    if ours_SI.shape != theirs_SI.shape or permutations < 1:
        raise UserError(
            f"a paired test takes the same items of both models and at least 1 permutation; got points of shapes "
            f"{ours_SI.shape} and {theirs_SI.shape}, permutations={permutations}"
        )
    estimate = bootstrap(ours_SI - theirs_SI, images, tasks, level=level, draws=draws, seed=seed)
    sums_STC, sizes_STC = _totals(ours_SI - theirs_SI, None, images, tasks)
    shares_C = (sums_STC / sizes_STC.sum(-1, keepdims=True)).mean((0, 1))  # the part of each image in the difference
    return PairedTest(
        estimate.mean, estimate.low, estimate.high, _sign_flips(shares_C[shares_C != 0], permutations, seed)
    )


def paired_tests(
    ours: Mapping[str, ArrayLike], theirs: Mapping[str, ArrayLike], images: Mapping[str, Sequence[Hashable]]
) -> dict[str, PairedTest]:
    """`paired_test` of each task that both have, with p-values raised for their number (`holm`)."""
    found = {task: paired_test(own, theirs[task], images[task]) for task, own in ours.items() if task in theirs}
    raised = holm([test.p_value for test in found.values()])
    return {task: test._replace(p_value=p) for (task, test), p in zip(found.items(), raised, strict=True)}


def _sign_flips(shares_C: Floats, permutations: int, seed: int) -> float:
    """Share of the flips of signs whose sum is at least as far from 0 as the sum is."""
    if len(shares_C) < 2:  # alike, or one image, whose flip is as far from 0
        return 1.0
    from scipy.stats import permutation_test

    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": permutations, "batch": 1024}
    found = permutation_test((shares_C,), lambda x, axis: x.sum(axis), **options, random_state=seed)
    return float(found.pvalue)


class Graded(NamedTuple):
    """Score of the questions whose grade is in a group, such as "2" or "19 to 23": the mean of the tasks named."""

    grade: str
    group: str
    items: int
    tasks: list[str]
    score: Estimate


def by_grade(points: Mapping[str, ArrayLike], images: Mapping[str, Sequence[int]], grades: Grades) -> list[Graded]:
    """Scores by grade, from the parts of `Scores` or of an `eval` record: by task, (I,) or of several seeds (S, I).

    Groups are the values, or thirds of the items where those are over four: alike for models that were asked the same.
    A score is the mean over tasks that have items in every group, so that groups differ by their grade alone; where
    each task is in one group, as by steps, over a group's own. A grade without two such groups is left out. Ours.
    """
    found = []
    for grade in dict.fromkeys(grade for task in points for grade in grades.get(task, ())):
        of = {task: grades[task][grade] for task in points if grade in grades.get(task, ())}
        graded = sorted((value, task, n) for task in of for n, value in enumerate(of[task]) if value is not None)
        values = [value for value, *_ in graded]
        edges = sorted(set(values))[:-1]
        if len(edges) > 3:
            edges = sorted(set(np.quantile(values, (1 / 3, 2 / 3), method="lower").tolist()) - {max(values)})
        groups = [[each for each in graded if np.searchsorted(edges, each[0]) == at] for at in range(len(edges) + 1)]
        tasks = [{task for _, task, _ in group} for group in groups]
        apart = sum(map(len, tasks)) == len(set.union(*tasks))
        for group in groups if edges else ():
            own = [(task, item) for _, task, item in group if apart or all(task in every for every in tasks)]
            if own:
                parts = np.stack([np.asarray(points[task], float)[..., item] for task, item in own], -1)
                score = bootstrap(parts, [images[task][item] for task, item in own], [task for task, _ in own])
                label = " to ".join(map(str, dict.fromkeys((group[0][0], group[-1][0]))))
                found.append(Graded(grade, label, len(own), list(dict(own)), score))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, raised so that one below 0.05 comes by chance in a twentieth of all such families
    (Holm's step-down procedure)."""
    raised, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, (len(p_values) - rank) * p_values[index])
        raised[index] = min(1.0, highest)
    return raised


def _totals(points: ArrayLike, weights: ArrayLike | None, images: Labels, tasks: Labels) -> tuple[Floats, Floats]:
    """Sums of points and of weights (S, T, C)."""
    points_SI = np.atleast_2d(np.asarray(points, float))
    weights_SI = np.ones_like(points_SI) if weights is None else np.atleast_2d(np.asarray(weights, float))
    items = points_SI.shape[-1]
    if points_SI.ndim > 2 or points_SI.size == 0 or weights_SI.shape != points_SI.shape:
        raise UserError(f"points {points_SI.shape}, weights {weights_SI.shape}: expected (I,) or (S, I)")
    if not (np.isfinite(points_SI).all() and np.isfinite(weights_SI).all() and (weights_SI >= 0).all()):
        raise UserError("points and weights must be finite, and weights at least 0")
    for name, labels in (("images", images), ("tasks", tasks)):
        if labels is not None and len(labels) != items:
            raise UserError(f"{len(labels)} {name} for {items} items: expected one for each")
    task_I = _numbered([0] * items if tasks is None else tasks)
    image_I = _numbered(range(items) if images is None else images)
    totals = np.zeros((2, len(points_SI), max(task_I) + 1, max(image_I) + 1))
    for item, (task, image) in enumerate(zip(task_I, image_I, strict=True)):
        totals[:, :, task, image] += points_SI[:, item], weights_SI[:, item]
    return totals[0], totals[1]


def _numbered(labels: Sequence[Hashable]) -> list[int]:
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]


def _blocks(draws: int, count: int) -> list[int]:
    """Draws of `count` numbers at once, so that they fit into memory."""
    block = max(1, 2**20 // count)
    return [min(block, draws - start) for start in range(0, draws, block)]


def _resample(count: int, size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """How often each of `count` comes (size, count), when as many are drawn with replacement, `size` times."""
    drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)


def _means(sums_ST: Floats, sizes_ST: Floats) -> Floats:
    """Means (..., S) over the tasks that have any weight, of (..., S, T); 0 where none has."""
    some_ST = sizes_ST > 0
    ratios_ST = np.divide(sums_ST, sizes_ST, out=np.zeros_like(sums_ST), where=some_ST)
    means_S: Floats = ratios_ST.sum(-1) / np.maximum(some_ST.sum(-1), 1)
    return means_S
