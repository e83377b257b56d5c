"""Our metrics beside those of lmms-eval and of the official code (reference.json): a table, also in docs/evaluation.md.

python tests/evaluation/parity.py     # writes it into the page
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsight.evaluation import metrics
from sparsight.evaluation.ask import Item
from sparsight.evaluation.scoring import METRICS, MME

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("reference.json").read_text())
PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
START, END = "<!-- parity: start -->", "<!-- parity: end -->"
Row = tuple[str, str, int, float, float]
VQA, LMMS = "vqaEval.py of VQA (a013f00)", f"lmms-eval {REFERENCE['versions']['lmms_eval']}"


def rows() -> list[Row]:
    """Metric, what it is compared with, cases, largest difference, tolerance; of texts, 1 if they differ."""
    pairs = REFERENCE["pairs"]
    found = [
        ("VQA answers normalised", VQA, *_texts(REFERENCE["normalised"], metrics.normalise_answer)),
        (
            "TextVQA answers normalised",
            f"{LMMS}, textvqa",
            *_texts(REFERENCE["normalised_textvqa"], lambda text: metrics.normalise_answer(text, textvqa=True)),
        ),
        ("VQA accuracy over ten answers", f"{LMMS}, vqav2", *_largest(_vqa("accuracy", False))),
        ("TextVQA accuracy over ten answers", f"{LMMS}, textvqa", *_largest(_vqa("textvqa", True))),
        ("GQA exact match", f"{LMMS}, gqa", *_pairs("bare_match")),
        ("ANLS", f"{LMMS}, anls", *_pairs("anls")),
        ("ChartQA relaxed accuracy", f"{LMMS}, chartqa", *_pairs("relaxed_match")),
        ("ScienceQA letter", f"{LMMS}, scienceqa", *_pairs("letter_match")),
        ("IoU@0.5", f"{LMMS}, refcoco", *_pairs("box_match")),
        ("POPE accuracy, precision, recall, F1", f"{LMMS}, pope", *_largest(_pope())),
        (
            "MME reading of an answer",
            f"{LMMS}, mme",
            *_texts([(said, to) for said, _, to in pairs["mme_reading"]], metrics.mme_reading),
        ),
        ("MME's two scores (of 2,000 and 800)", f"{LMMS}, mme", *_largest(_mme())),
        ("MMBench reading of an answer", f"{LMMS}, mmbench", *_largest(_letters())),
        ("MMBench circular accuracy", f"{LMMS}, mmbench", *_largest(_circular())),
        ("CIDEr-D", f"pycocoevalcap {REFERENCE['versions']['pycocoevalcap']}", *_largest(_cider())),
    ]
    return [(*row, 0.0 if "reading" in row[0] or "normalised" in row[0] else 1e-9) for row in found]


def _largest(pairs: Iterable[tuple[float, float]]) -> tuple[int, float]:
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    return len(differences), max(differences)


def _texts(pairs: Any, function: Any) -> tuple[int, float]:
    return _largest((float(function(text) != expected), 0.0) for text, expected in pairs)


def _pairs(name: str) -> tuple[int, float]:
    function = getattr(metrics, name)
    return _largest((function(answer, truth), points) for answer, truth, points in REFERENCE["pairs"][name])


def _vqa(key: str, textvqa: bool) -> Iterable[tuple[float, float]]:
    for case in REFERENCE["vqa"]:
        yield metrics.vqa_accuracy(case["answer"], case["humans"], textvqa), case[key]


def _pope() -> Iterable[tuple[float, float]]:
    for case in REFERENCE["pope"]:
        items = [Item("", number, "", truth) for number, truth in enumerate(case["truths"])]
        points = METRICS["yes_no"].points(items, case["answers"])
        figures = METRICS["yes_no"].figures(items, case["answers"], points)
        yield sum(points) / len(points), case["scores"]["accuracy"]
        for key, theirs in case["scores"].items():
            if key != "accuracy":
                yield figures[key.replace("f1", "F1")].mean, theirs


def _mme() -> Iterable[tuple[float, float]]:
    for case in REFERENCE["mme"]:
        items = [
            Item("", n // 2, "", truth, group=group, category=kind)
            for n, (kind, group, truth, _) in enumerate(case["rows"])
        ]
        answers = [row[-1] for row in case["rows"]]
        found = METRICS["mme"].figures(items, answers, METRICS["mme"].points(items, answers))
        for name in MME:
            (ours,) = (value.mean for key, value in found.items() if key.startswith(name))
            yield 100 * ours, case["scores"][f"mme_{name}_score"]


def _letters() -> Iterable[tuple[float, float]]:
    for answer, options, letter in REFERENCE["pairs"]["chosen_letter"]:
        yield float((metrics.chosen_letter(answer, options) or "") != letter), 0.0


def _circular() -> Iterable[tuple[float, float]]:
    for case in REFERENCE["circular"]:
        items = [Item("", 0, "", truth, group=str(index % 10**6)) for index, truth, _ in case["rows"]]
        answers = [said for *_, said in case["rows"]]
        figures = METRICS["mmbench"].figures(items, answers, METRICS["mmbench"].points(items, answers))
        yield figures["circular accuracy"].mean, case["accuracy"]


def _cider() -> Iterable[tuple[float, float]]:
    for case in REFERENCE["cider"]:
        yield from zip(metrics.cider_d(case["candidates"], case["references"]), case["scores"], strict=True)


def table() -> str:
    lines = ["| metric | compared with | cases | largest difference | tolerance |", "|---|---|---|---|---|"]
    for metric, reference, cases, difference, tolerance in rows():
        shown = (
            "0"
            if difference == 0
            else f"below {10.0 ** -next(n for n in range(12, 0, -1) if difference < 10.0**-n):.0e}"
        )
        lines.append(f"| {metric} | {reference} | {cases:,} | {shown} | {tolerance:g} |")
    return "\n".join(lines)


def written() -> str:
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].strip()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
