"""Metrics against what independent packages answered (reference.json), or against their definition, restated."""

from __future__ import annotations

import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import parity
from sparsight.evaluation.ask import Item
from sparsight.evaluation.metrics import (
    box_match,
    cider_d,
    exact_match,
    normalise_answer,
    reads_yes,
    vqa_accuracy,
)
from sparsight.evaluation.scoring import METRICS

REFERENCE = parity.REFERENCE
SIDE = st.integers(0, 99)


def test_answers_are_normalised_as_by_the_official_code() -> None:
    assert normalise_answer("The T-shirt, isnt it?  Two!") == "t shirt isn't it 2"  # by hand
    assert [normalise_answer("the dog's tail", textvqa) for textvqa in (False, True)] == ["dog's tail", "dog 's tail"]
    both = zip(REFERENCE["normalised"], REFERENCE["normalised_textvqa"], strict=True)
    assert sum(vqa != textvqa for vqa, textvqa in both) > 10


def test_metrics_are_those_of_lmms_eval_and_of_the_official_code() -> None:
    """The table of docs/evaluation.md; `pytest -s` prints it."""
    sys.stdout.write(f"\n{parity.table()}\n")
    for metric, _, cases, difference, tolerance in parity.rows():
        assert cases >= 3 and difference <= tolerance, metric
    assert parity.written() == parity.table(), "run: python tests/evaluation/parity.py"
    assert len({case["accuracy"] for case in REFERENCE["vqa"]}) == 5  # 0, 0.3, 0.6, 0.9 and 1
    assert any(case["accuracy"] != case["textvqa"] for case in REFERENCE["vqa"])
    for name, cases in REFERENCE["pairs"].items():  # each result there is comes often
        assert min(Counter(str(points) for *_, points in cases).values()) >= 3 or name == "anls", name


@given(
    answer=st.sampled_from("abc"),
    humans=st.lists(st.sampled_from(["A", "b", "c", "b.", "two"]), min_size=2, max_size=10),
)
def test_vqa_accuracy_is_the_mean_over_all_ways_to_leave_one_out(answer: str, humans: list[str]) -> None:
    read = [human.lower().strip(".").replace("two", "2").replace("a", "") for human in humans]  # "a" is an article
    subsets = list(combinations(read, len(read) - 1))
    shares = [min(Fraction(1), Fraction(subset.count(answer.replace("a", "")), 3)) for subset in subsets]
    assert vqa_accuracy(answer, humans) == pytest.approx(float(sum(shares) / len(shares)), abs=1e-9)


def test_exact_match_and_the_normaliser_as_an_option() -> None:
    assert exact_match(" Two\n", "two") == 1
    assert exact_match("2", "two") == exact_match("a cat.", "cat") == 0
    assert exact_match("2", "two", normalise=True) == exact_match("A cat.", "cat", normalise=True) == 1
    assert exact_match("dog", "cat", normalise=True) == 0


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True), ("no", False), ("No", False), ("No, there is none", False), ("There is not.", False),
        ("Yes. There is no dog", True), ("yes, no", False), ("nothing", True), ("NO", True), ("", True), ("no.", False),
        ("no\nyes", True), ("Not", True), (".no", True),
    ],
)  # fmt: skip
def test_pope_reads_the_first_sentence_for_a_no(answer: str, yes: bool) -> None:
    """Also where that is odd: these are its rules, and scores are compared by them."""
    assert reads_yes(answer) is yes


@settings(max_examples=20)  # each draws its intervals
@given(st.lists(st.tuples(st.sampled_from(["Yes, a dog", "no", "It is not", "yes"]), st.booleans()), min_size=1))
def test_pope_scores_by_counting(pairs: list[tuple[str, bool]]) -> None:
    answers, truths = [answer for answer, _ in pairs], ["yes" if true else "no" for _, true in pairs]
    said = [answer.lower().startswith("yes") for answer in answers]
    hits = sum(each and true for each, (_, true) in zip(said, pairs, strict=True))
    precision = hits / sum(said) if any(said) else 0
    recall = hits / truths.count("yes") if "yes" in truths else 0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    items = [Item("", number, "", truth) for number, truth in enumerate(truths)]
    points = METRICS["yes_no"].points(items, answers)
    assert points == [float(each is true) for each, (_, true) in zip(said, pairs, strict=True)]
    found = METRICS["yes_no"].figures(items, answers, points)
    expected = {"precision": precision, "recall": recall, "F1": f1, "yes-ratio": sum(said) / len(said)}
    assert {name: value.mean for name, value in found.items()} == pytest.approx(expected, abs=1e-9)


def test_cider_d_of_a_perfect_caption_is_ten() -> None:
    assert max(score for case in REFERENCE["cider"] for score in case["scores"]) == pytest.approx(10)


def test_cider_d_of_a_copy_a_stranger_and_a_longer_caption() -> None:
    references = [["a red cat sits on the mat"], ["two dogs run in the park"], ["one boat"]]
    copy, stranger, longer = (
        "a red cat sits on the mat",
        "nothing of the kind is here",
        "a red cat sits on the mat " * 2,
    )
    scores = [cider_d([text, "", ""], references)[0] for text in (copy, longer, stranger)]
    assert scores[0] == pytest.approx(10)
    assert 10 > scores[1] > scores[2]


@given(st.tuples(SIDE, SIDE, SIDE, SIDE), st.tuples(SIDE, SIDE, SIDE, SIDE), st.sampled_from([0.25, 0.5, 0.75]))
def test_boxes_match_by_the_cells_that_they_share(a: tuple[int, ...], b: tuple[int, ...], threshold: float) -> None:
    ordered = [(min(x1, x2), min(y1, y2), max(x1, x2) + 1, max(y1, y2) + 1) for x1, y1, x2, y2 in (a, b)]
    boxes = [tuple(min(99, value) for value in box) for box in ordered]
    cells = [{(x, y) for x in range(x1, x2) for y in range(y1, y2)} for x1, y1, x2, y2 in boxes]
    texts = [" ".join(map(str, box)) for box in boxes]
    if not all(cells):  # a box without an area is none
        return
    share = Fraction(len(cells[0] & cells[1]), len(cells[0] | cells[1]))
    assert box_match(*texts, threshold) == float(share >= threshold)


def test_a_box_that_overlaps_by_half_is_a_match() -> None:
    assert [box_match(answer, "0 0 10 20") for answer in ("0 0 10 10", "[0, 0, 0.1, 0.1]", "0 0 10 9")] == [1, 1, 0]


def test_users_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="1 human answers: expected ten"):
        vqa_accuracy("a", ["a"])
    with pytest.raises(ValueError, match="true box is 'left', expected four integers"):
        box_match("1 2 3 4", "left")
    for references in ([["a"]], [["a"], []]):
        with pytest.raises(ValueError, match="2 captions and .* references: expected at least one reference"):
            cider_d(["a", "b"], references)
