"""Points of answers by metric, and the figures that a benchmark reports beside their mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sparsight.evaluation import metrics
from sparsight.evaluation.ask import Item, Questions
from sparsight.evaluation.significance import Estimate, bootstrap

Points = list[float]
# Fu et al. 2023, as MME's folders name them.
MME = {
    "perception": (
        *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


@dataclass(frozen=True)
class Metric:
    """Points in [0, 1] of answers to items, and figures by name, of items, answers and points."""

    points: Callable[[Sequence[Item], Sequence[str]], Points]
    figures: Callable[[Sequence[Item], Sequence[str], Points], dict[str, Estimate]] = lambda *_: {}


def _each(function: Callable[[Item, str], float]) -> Callable[[Sequence[Item], Sequence[str]], Points]:
    return lambda items, answers: [float(function(item, answer)) for item, answer in zip(items, answers, strict=True)]


def _truths(item: Item) -> Sequence[str]:
    return item.truths or (item.truth,)


def _words(text: str) -> str:
    """As CIDEr-D's own tokenizer leaves them, near enough: lower case, no punctuation."""
    return " ".join(re.findall(r"\w+(?:'\w+)?", text.lower()))


def _captions(items: Sequence[Item], answers: Sequence[str]) -> Points:
    references = [[*map(_words, _truths(item))] for item in items]
    return [min(1.0, value / 10) for value in metrics.cider_d([*map(_words, answers)], references)]


def _images(items: Sequence[Item]) -> list[int]:
    return [item.image for item in items]


def _whole(items: Sequence[Item], points: Points) -> tuple[Any, Any]:
    """Of each item, whether all of its group are right; and a weight, so that each group counts once."""
    own: dict[str, Points] = {}
    for item, value in zip(items, points, strict=True):
        own.setdefault(item.group, []).append(value)
    pairs = [(min(own[item.group]), 1 / len(own[item.group])) for item in items]
    return tuple(np.array(pairs).T)


def yes_no_figures(items: Sequence[Item], answers: Sequence[str], points: Points) -> dict[str, Estimate]:
    """POPE's precision, recall, F1 and share of yes. An empty answer is neither yes nor no."""
    said = np.array([bool(answer) and metrics.reads_yes(answer) for answer in answers], float)
    true = np.array([item.truth == "yes" for item in items], float)
    both, images = said * true, _images(items)
    return {
        "precision": bootstrap(both, images, weights=said),
        "recall": bootstrap(both, images, weights=true),
        "F1": bootstrap(2 * both, images, weights=said + true),
        "yes-ratio": bootstrap(said, images),
    }


def _circular(items: Sequence[Item], answers: Sequence[str], points: Points) -> dict[str, Estimate]:
    """MMBench's CircularEval (Liu et al. 2023): a question is right if it is with its options in each order."""
    right, weights = _whole(items, points)
    return {"circular accuracy": bootstrap(right * weights, _images(items), weights=weights)}


def _mme(items: Sequence[Item], answers: Sequence[str], points: Points) -> dict[str, Estimate]:
    """MME's two scores: the sum over categories of accuracy and accuracy+ (both questions of an image right)."""
    both, _ = _whole(items, points)
    found = {}
    for name, categories in MME.items():
        own = [number for number, item in enumerate(items) if item.category in categories]
        if own:
            kinds = [items[number].category for number in own]
            mean = bootstrap([points[n] + both[n] for n in own], [items[n].image for n in own], kinds)
            count = len(set(kinds))
            part = "" if count == len(categories) else f", {count} of {len(categories)} categories"
            found[f"{name} score{part}"] = Estimate(count * mean.mean, count * mean.low, count * mean.high, None)
    return found


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric(_each(lambda item, answer: metrics.exact_match(answer, item.truth, True))),
    "bare_match": Metric(_each(lambda item, answer: metrics.bare_match(answer, item.truth))),
    "vqa": Metric(_each(lambda item, answer: metrics.vqa_accuracy(answer, _truths(item)))),
    "textvqa": Metric(_each(lambda item, answer: metrics.vqa_accuracy(answer, _truths(item), True))),
    "anls": Metric(_each(lambda item, answer: metrics.anls(answer, _truths(item)))),
    "relaxed_match": Metric(_each(lambda item, answer: metrics.relaxed_match(answer, item.truth))),
    "letter": Metric(_each(lambda item, answer: metrics.letter_match(answer, item.truth))),
    "box_match": Metric(_each(lambda item, answer: metrics.box_match(answer, item.truth))),
    "cider_d": Metric(
        _captions,
        lambda items, answers, points: {"CIDEr-D": bootstrap([10 * value for value in points], _images(items))},
    ),
    "yes_no": Metric(_each(lambda item, answer: metrics.reads_yes(answer) == (item.truth == "yes")), yes_no_figures),
    "mmbench": Metric(
        _each(
            lambda item, answer: (
                metrics.chosen_letter(answer, dict(zip("ABCDE", item.options, strict=False))) == item.truth
            )
        ),
        _circular,
    ),
    "mme": Metric(_each(lambda item, answer: metrics.mme_reading(answer) == item.truth.lower()), _mme),
}


def score(items: list[Item], image: Callable[[int], Image.Image], metric: str) -> Questions:
    """Questions of one metric. An empty answer gets no points, whatever the metric would read into it."""
    own = METRICS[metric]

    def points(items: Sequence[Item], answers: Sequence[str]) -> Points:
        found = own.points(items, answers)
        return [value if answer.strip() else 0.0 for value, answer in zip(found, answers, strict=True)]

    return Questions(items, image, points, lambda *given: own.figures(*given))
