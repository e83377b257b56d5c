"""Metrics of answers, item by item, as their benchmarks define them. No torch.

Scores are in [0, 1], CIDEr-D's in [0, 10]. How sure a mean of them is: `sparsight.evaluation.significance`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, hypot, log

from sparsight.errors import UserError
from sparsight.scenes.questions import iou, parse_box

_DIGITS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Contractions that lack one apostrophe get it back. Those with a capital in the official list never match.
_WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:at] + word[at + 1 :]: word for word in _WHOLE.split() for at, sign in enumerate(word) if sign == "'"
}


_LONGEST, _SIGMA = 4, 6.0  # CIDEr-D's longest n-gram, and width of its penalty for another length, in words
_Weights = dict[tuple[str, ...], float]


def normalise_answer(answer: str, textvqa: bool = False) -> str:
    """An answer as VQA's official evaluation reads it: no punctuation and articles, digits, whole contractions.

    Args:
        textvqa: as TextVQA's evaluation reads it, which first parts the 's of a possessive from its noun.

    Source: Antol et al. 2015 (vqaEval.py) and Singh et al. 2019 (EvalAIAnswerProcessor), slips of their code included.
    """
    if textvqa:
        answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    answer = re.sub(r"[\n\t]", " ", answer).strip()
    bare = answer
    for sign in _PUNCTUATION:
        removed = f"{sign} " in answer or f" {sign}" in answer or re.search(r"\d,\d", answer)
        bare = bare.replace(sign, "" if removed else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)  # 32: the official code passes a flag as the count
    words = [_DIGITS.get(word, word) for word in bare.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def exact_match(answer: str, truth: str, normalise: bool = False) -> float:
    """1 if the answer is the truth but for case and space around it; with ``normalise``, for `normalise_answer`, where
    that leaves anything of the truth: of an option "A", which reads as an article, it does not."""
    if normalise and (wanted := normalise_answer(truth)):
        return float(normalise_answer(answer) == wanted)
    if normalise:
        answer, truth = (text.strip(" .()[]\n") or text for text in (answer, truth))
    return float(answer.strip().lower() == truth.strip().lower())


def bare_match(answer: str, truth: str) -> float:
    """1 if the answer is the truth but for case, punctuation, and space around it (GQA's accuracy, as lmms-eval)."""
    answer, truth = (text.lower().translate(_NO_PUNCTUATION).strip() for text in (answer, truth))
    return float(answer == truth)


def anls(answer: str, truths: Sequence[str]) -> float:
    """Similarity to the nearest truth: 1 - edits / length of the longer one, below 0.5 none (Biten et al. 2019).

    Case and repeated space do not count as edits, but do in the lengths, as in the official script.
    """
    plain = [" ".join(text.lower().split()) for text in (answer, *truths)]
    pairs = zip(plain[1:], truths, strict=True)
    nearest = max(1 - _edits(plain[0], text) / (max(len(answer), len(truth)) or 1) for text, truth in pairs)
    return nearest if nearest >= 0.5 else 0.0


def _edits(one: str, other: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for number, sign in enumerate(one, 1):
        last, row[0] = row[0], number
        for at, theirs in enumerate(other, 1):
            last, row[at] = row[at], min(last + (sign != theirs), row[at] + 1, row[at - 1] + 1)
    return row[-1]


def relaxed_match(answer: str, truth: str) -> float:
    """1 if a number is within 5% of the true one, or a text equals it but for case (ChartQA: Masry et al. 2022, 5.1).

    A number may end in %, for hundredths. A truth of 0 is compared as text, as in the published code.
    """
    said, true = _number(answer), _number(truth)
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= 0.05)
    return float(answer.lower() == truth.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def letter_match(answer: str, truth: str) -> float:
    """1 if the answer is the true letter, in either case, or begins with it and a full stop (ScienceQA, as LLaVA)."""
    named = answer[0] if re.match(r"[^\W\d_]\.", answer) and answer[0].isupper() else answer
    return float(named.lower() == truth.lower())


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, by one letter standing alone or by its whole text; None if it names none or
    several. MMBench's own reading before it asks another model (Liu et al. 2023)."""
    words = answer.split()
    for form in ("{}", *["{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{})."]):
        found = [letter for letter in "ABCDE" if form.format(letter) in words]
        if len(found) == 1 and not (form == "{}" and "A" in words and len(words) > 3):  # which may be an article
            return found[0]
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def mme_reading(answer: str) -> str:
    """ "yes", "no", or "other": what MME takes an answer for, by its first four letters (Fu et al. 2023)."""
    said = answer.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def vqa_accuracy(answer: str, humans: Sequence[str], textvqa: bool = False) -> float:
    """VQA's accuracy: the mean of min(1, matches / 3) over all ways to leave one human out (ten are asked).

    Answers are normalised always, as by lmms-eval; the official script does so only where the humans do not all agree.
    ``textvqa``: as in `normalise_answer`. Raises UserError for fewer than two humans.
    """
    if len(humans) < 2:
        raise UserError(f"{len(humans)} human answers: expected ten, or at least two, as one at a time is left out")
    same = [normalise_answer(human, textvqa) for human in humans].count(normalise_answer(answer, textvqa))
    return (same * min(1, (same - 1) / 3) + (len(humans) - same) * min(1, same / 3)) / len(humans)


def reads_yes(answer: str) -> bool:
    """Whether POPE takes an answer for a yes: no word of its first sentence is "no", "No" or "not" (Li et al. 2023)."""
    return not {"No", "no", "not"} & set(answer.partition(".")[0].replace(",", "").split(" "))


def box_match(answer: str, truth: str, threshold: float = 0.5) -> float:
    """1 if the answer is a box that overlaps the true one with an IoU of at least ``threshold``, else 0.

    Boxes are four integers in percent, as `parse_box` reads, or four fractions in square brackets, of which the first
    four count (RefCOCO, as lmms-eval). Raises UserError if the truth is none.
    """
    (box, side), (true_box, true_side) = _box(answer), _box(truth)
    if true_box is None:
        raise UserError(
            f"the true box is {truth!r}, expected four integers of 0 to 99, such as '12 40 33 61', or fractions, such "
            "as '[0.12, 0.4, 0.33, 0.61]'"
        )
    return float(box is not None and iou(tuple(value * (true_side / side) for value in box), true_box) >= threshold)


def _box(text: str) -> tuple[tuple[float, ...] | None, int]:
    """The box that a text names, and the length of an image's side in its unit."""
    number = r"\s*(-?\d+(?:\.\d+)?)"
    found = re.search(rf"\[{','.join([number] * 4)}\s*\]", text)
    return (tuple(map(float, found.groups())), 1) if found else (parse_box(text), 100)


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10 (Vedantam et al. 2015, section 5, as in the official scorer).

    Words stand between spaces: take off case and punctuation first. Weights of n-grams come from all the
    references, so that a score depends on which captions are scored with it; of one image alone all are 0.

    Args:
        references: for each caption, those that people wrote.

    Raises:
        UserError: not one list of references, with at least one in it, for each caption.
    """
    if len(candidates) != len(references) or not all(references):
        raise UserError(
            f"{len(candidates)} captions and {[len(texts) for texts in references]} references: expected at least one "
            "reference for each caption"
        )
    documents = Counter(gram for texts in references for gram in {gram for text in texts for gram in _grams(text)})

    def weigh(text: str) -> list[_Weights]:
        """Weights of the n-grams of each length."""
        weights: list[_Weights] = [{} for _ in range(_LONGEST)]
        for gram, count in _grams(text).items():
            weights[len(gram) - 1][gram] = count * (log(len(references)) - log(max(1, documents[gram])))
        return weights

    scores = []
    for text, texts in zip(candidates, references, strict=True):
        ours, total = weigh(text), 0.0
        for reference in texts:
            longer = max(1, len(text.split())) - max(1, len(reference.split()))  # officially, in pairs of words
            total += exp(-(longer**2) / (2 * _SIGMA**2)) * sum(map(_clipped_cosine, ours, weigh(reference)))
        scores.append(10 * total / _LONGEST / len(texts))
    return scores


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    lengths = range(1, _LONGEST + 1)
    return Counter(tuple(words[at : at + size]) for size in lengths for at in range(len(words) - size + 1))


def _clipped_cosine(ours: _Weights, theirs: _Weights) -> float:
    both = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
    return both / (hypot(*ours.values()) * hypot(*theirs.values())) if both else 0.0
