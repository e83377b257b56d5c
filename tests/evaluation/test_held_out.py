"""Held-out conversations: each question by itself, scored as the file's metric says."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from sparsight.evaluation.ask import Item, Scores
from sparsight.evaluation.questions import guess, held_out_questions
from sparsight.pipeline import evaluate_checkpoint
from sparsight.settings.recipe import HeldOut, held_out_file


def write(folder: Path, rows: list[tuple[str, ...]], images: int = 1) -> Path:
    """A LLaVA file; a row is question, answer, question, answer ..."""
    file = folder / "held_out.json"
    data = []
    for number, turns in enumerate(rows):
        Image.new("RGB", (32, 32), (40 * number, 90, 10)).save(folder / f"{number}.png")
        said = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(turns)]
        said[0]["value"] = "<image>\n" * images + said[0]["value"]
        data.append({"id": str(number), "image": [f"{number}.png"] * images, "conversations": said})
    file.write_text(json.dumps(data))
    return file


ROWS = [("what is it ?", "a dog", "how many ?", "2"), ("what is it ?", "a cat"), ("how many ?", "two")]


def test_each_question_stands_by_itself(tmp_path: Path) -> None:
    settings = HeldOut(data={"path": str(write(tmp_path, ROWS))})
    questions = held_out_questions("pets", settings, 32)
    asked = [(item.image, item.question, item.truth) for item in questions.items]
    assert asked == [(0, *ROWS[0][:2]), (0, *ROWS[0][2:]), (1, *ROWS[1]), (2, *ROWS[2])]
    assert questions.image(2).getpixel((0, 0)) == (80, 90, 10)
    assert questions.score(questions.items, ["Dog.", "two", "dog", "2"]) == [1, 1, 0, 1]  # normalised as VQA does
    few = held_out_questions("pets", settings.model_copy(update={"items": 3}), 32)
    assert few.items == questions.items[:3]
    assert guess(questions) == 0.25


def test_boxes_and_captions_have_their_metrics(tmp_path: Path) -> None:
    boxes = [("box ?", "10 10 50 50"), ("box ?", "20 20 60 60")]
    settings = HeldOut(data={"path": str(write(tmp_path, boxes))}, metric="box_match")
    questions = held_out_questions("boxes", settings, 32)
    assert questions.score(questions.items, ["10 10 50 31", "0 0 9 9"]) == [1, 0]
    captions = [("describe", "a big dog on the grass"), ("describe", "two small cats at the door")]
    settings = HeldOut(data={"path": str(write(tmp_path, captions))}, metric="cider_d")
    questions = held_out_questions("captions", settings, 32)
    right, wrong = questions.score(questions.items, [captions[0][1], captions[0][1]])
    assert right == pytest.approx(1) and wrong < 0.1


def test_what_cannot_be_asked_is_told(tmp_path: Path) -> None:
    file = write(tmp_path, [("why ?", "so")], images=2)
    with pytest.raises(ValueError, match="sample '0' has 2 images and turns of .*: expected one image"):
        held_out_questions("odd", HeldOut(data={"path": str(file)}), 32)


def test_a_saved_model_is_asked(tmp_path: Path, tiny_vlm) -> None:
    model, processor = tiny_vlm()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    out = StringIO()
    held_out = held_out_file(write(tmp_path, ROWS), None, "exact_match", 10)
    (result,) = evaluate_checkpoint(tmp_path / "model", 10, "test", Console(file=out, width=120), held_out)
    assert result.items == {"held_out": 4} and len(result.answers) == 4
    assert "held_out" in out.getvalue() and "25.0" in out.getvalue()  # chance


def test_two_models_are_asked_the_same_and_compared(tmp_path: Path, tiny_vlm) -> None:
    rows = [(f"why {number} ?", "so") for number in range(12)]
    held_out = held_out_file(write(tmp_path, rows), None, None, 12, choices="so,no")
    model, processor = tiny_vlm()
    for name in ("one", "other"):
        model.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    out, (one, other) = StringIO(), (tmp_path / "one", tmp_path / "other")
    ours, theirs = evaluate_checkpoint(one, 12, "test", Console(file=out, width=160), held_out, against=other)
    (alone,) = evaluate_checkpoint(other, 12, "test", Console(file=StringIO()), held_out)
    assert theirs.answers == alone.answers and theirs.answers != ours.answers
    difference = 100 * (ours.scores["held_out"] - theirs.scores["held_out"])
    rows = [line.split("│") for line in out.getvalue().splitlines() if line.startswith("│ held_out")]
    assert difference and rows[-1][2].strip() == f"{difference:+.1f}"
    for second, keep, said in ((other, "1,0.5", "leave out --layouts and --keep"), (tmp_path, None, "no model there")):
        with pytest.raises(ValueError, match=f"--against .*{said}"):
            evaluate_checkpoint(one, 12, "test", Console(file=out), held_out, against=second, keep=keep)


def test_a_score_that_is_not_above_the_controls_is_blind() -> None:
    items = [(Item(task, number, "?", "x"), "x") for task in ("seen", "guessed") for number in range(20)]
    right, wrong = [1.0] * 20, [1.0, 0.0] * 10
    assert Scores(items, {"seen": right, "guessed": wrong}, {"seen": wrong, "guessed": wrong[::-1]}).blind == [
        "guessed"
    ]
    assert Scores(items, {"seen": wrong, "guessed": right}, {"seen": right, "guessed": wrong}).blind == ["seen"]
    assert Scores(items, {"seen": right, "guessed": wrong}).blind == []  # without the control


def test_options_that_do_not_fit_are_told(tmp_path: Path) -> None:
    assert held_out_file(None, None, None, 5, split="test") is None
    with pytest.raises(ValueError, match="expected --data as well"):
        held_out_file(None, tmp_path, None, 5)
    with pytest.raises(ValueError, match="metric.*bleu"):
        held_out_file(tmp_path / "x.json", None, "bleu", 5)


def test_no_caption_is_worth_more_than_one(tmp_path: Path) -> None:
    """Rounding takes CIDEr-D of an exact caption above 10; a point is at most 1."""
    words = ["a", "big", "small", "red", "dog", "cat", "house", "on", "the", "grass", "at", "door", "two", "three"]
    captions = [("describe", " ".join(words[(3 * row + 5 * at) % len(words)] for at in range(7))) for row in range(40)]
    settings = HeldOut(data={"path": str(write(tmp_path, captions))}, metric="cider_d")
    questions = held_out_questions("captions", settings, 32)
    points = questions.score(questions.items, [item.truth for item in questions.items])
    assert max(points) <= 1 and min(points) > 0.99


def test_case_and_punctuation_of_a_caption_do_not_count(tmp_path: Path) -> None:
    captions = [("describe", "A big dog, on the grass."), ("describe", "Two small cats at the door.")]
    settings = HeldOut(data={"path": str(write(tmp_path, captions))}, metric="cider_d")
    questions = held_out_questions("captions", settings, 32)
    said = ["a big dog on the grass", "Two small cats: at the DOOR"]
    assert questions.score(questions.items, said) == pytest.approx([1, 1])
    assert 0.1 < questions.score(questions.items, ["a big dog runs", said[1]])[0] < 0.9  # a tenth of CIDEr-D


def test_an_option_that_reads_as_an_article_is_an_answer(tmp_path: Path) -> None:
    rows = [("which ?", letter) for letter in ("A", "(A)", "B", "-")]
    questions = held_out_questions("options", HeldOut(data={"path": str(write(tmp_path, rows))}), 32)
    assert questions.score(questions.items, ["A", "a.", "B.", "-"]) == [1, 1, 1, 1]
    assert questions.score(questions.items, ["", "", "", ""]) == [0, 0, 0, 0]
    assert questions.score(questions.items, ["The", "B", "A", "A"]) == [0, 0, 0, 0]


def test_other_right_answers_are_another_test() -> None:
    """Captions have one question for all images: their numbers and the question alone tell nothing."""
    one, other = (Scores([(Item("caption", 0, "describe", truth), "x")], {"caption": [0.0]}) for truth in ("a", "b"))
    assert one.questions != other.questions and one.images == other.images
