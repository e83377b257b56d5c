"""Fast answers are the slow ones: choices by likelihood, compressed prompts, blocks of images, a killed evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparsight.data.chat import encode_conversation
from sparsight.data.sources import scene_config
from sparsight.evaluation import ask as evaluation
from sparsight.evaluation.answers import AnswerFile
from sparsight.evaluation.ask import Item, Questions, ask
from sparsight.evaluation.questions import scene_questions
from sparsight.scenes.questions import ScenesDataset
from sparsight.settings.data import SceneData
from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from tiny import make_image, make_vlm

from .test_any_model import save_llava

LETTERS, WORDS = ("q", "a", "b", "k", "no", "a red dog"), ("ab", "xq", "z9", "kw", "mjv", "12 apples .")
ASKED = ("how many ?", "is there a dog ?", "what stands left of the red car ?", "why ?", "what is it ?")


@pytest.fixture(scope="module")
def vlm() -> Any:
    """A random model whose answers differ: its output layer is large."""
    model, processor = make_vlm()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model.eval(), processor


def questions(choices: tuple[str, ...] = (), images: int = 4) -> Questions:
    asked = [(number, text) for number in range(images) for text in ASKED]
    own = [choices[place % 3 :] for place in range(len(asked))]  # not as many everywhere
    items = [Item("open", *pair, "12 apples .", choices=few) for pair, few in zip(asked, own, strict=True)]
    return Questions(items, make_image, lambda items, answers: [float(text == "") for text in answers])


def answers(parts: Any, asked: Questions, batch_size: int, **options: Any) -> list[str]:
    return [text for _, text in ask(*parts, asked, batch_size, control=False, **options).answers]


@torch.no_grad()
def losses(model: Any, processor: Any, item: Item) -> list[float]:
    """By a whole pass for each choice, supervised as training does."""
    found = []
    for choice in item.choices:
        user = [{"type": "image"}, {"type": "text", "text": item.question}]
        turns = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": choice}]},
        ]
        coded = encode_conversation(processor.tokenizer, turns, tokens_per_image=processor.num_image_tokens)
        pixels = processor.pixels([make_image(item.image)])["pixel_values"]
        logits = model(input_ids=torch.tensor([coded.input_ids]), pixel_values=pixels, use_cache=False).logits
        found.append(float(F.cross_entropy(logits[0, :-1], torch.tensor(coded.labels[1:]), reduction="sum")))
    return found


@pytest.mark.parametrize("share, choices", [(1.0, LETTERS), (1.0, WORDS), (0.5, LETTERS), (0.5, WORDS)])
def test_choices_by_likelihood_are_those_of_whole_passes(vlm: Any, share: float, choices: tuple[str, ...]) -> None:
    """Prompts read once, several at a time, against a pass for each question and choice; also where visual tokens are
    compressed."""
    asked = questions(choices, 2)
    handle = attach(vlm[0], CompressorConfig(keep=share), train_only=False) if share < 1 else None
    try:
        whole = [losses(*vlm, item) for item in asked.items]
        expected = [item.choices[own.index(min(own))] for item, own in zip(asked.items, whole, strict=True)]
        for size in (1, 3, 50):
            assert answers(vlm, asked, size, even=share < 1) == expected
        alike = [replace(asked.items[place], choices=choices) for place in (0, 0)]
        visual = evaluation.visual_tokens(*vlm, make_image, [0, 1], 2)
        _, prompt = evaluation.our_prompts(*vlm, alike, visual, torch.arange(2))
        with torch.no_grad():
            found, greedy = evaluation.choice_losses(vlm[0], vlm[1].tokenizer, prompt([0, 1]), [choices] * 2)
        one_by_one = torch.tensor([losses(*vlm, replace(alike[0], image=image)) for image in (0, 1)])
        torch.testing.assert_close(found, one_by_one, rtol=1e-5, atol=1e-3)
    finally:
        if handle is not None:
            handle.detach()
    assert len(set(expected)) > 1


def test_compressed_prompts_in_batches_answer_as_one_by_one(vlm: Any) -> None:
    plain, share = answers(vlm, questions(images=2), 50), 0.25
    handle = attach(vlm[0], CompressorConfig(keep=share), train_only=False)
    try:
        one = answers(vlm, questions(images=2), 1, even=True)
        assert answers(vlm, questions(images=2), 50, even=True) == one
        assert {done.visual_out / done.visual_in for done in handle.take_passes() if done.visual_in} == {share}
    finally:
        handle.detach()
    assert one != plain and answers(vlm, questions(images=2), 50) == plain


def test_images_by_the_block_change_nothing(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More images than visual tokens are held of: also the control keeps its images."""
    whole = ask(*vlm, questions(), 2)
    encoded: list[int] = []
    real = evaluation.visual_tokens

    def counted(model: Any, processor: Any, image: Any, numbers: Any, size: int) -> torch.Tensor:
        encoded.extend(numbers)
        return real(model, processor, image, numbers, size)

    monkeypatch.setattr(evaluation, "visual_tokens", counted)
    monkeypatch.setattr(evaluation, "_BLOCK", 1)
    parts = ask(*vlm, questions(), 2)
    assert parts.answers == whole.answers and parts.shuffled_points == whole.shuffled_points
    assert encoded == [0, 1, 2, 3]  # each once, though all are asked about ten times


class Killed(BaseException):
    pass


def test_a_killed_evaluation_goes_on_where_it_stopped(vlm: Any, tmp_path: Path, monkeypatch: Any) -> None:
    asked, file = questions(), tmp_path / "new" / "answers.jsonl"
    whole = ask(*vlm, asked, 4)

    def kept(key: str = "k") -> list[AnswerFile]:
        return [AnswerFile(file, f"{key}{number}") for number in range(2)]

    def stop(done: int, total: int) -> None:
        if done >= 24:  # in the control
            raise Killed

    with pytest.raises(Killed):
        ask(*vlm, asked, 4, progress=stop, kept=kept())
    file.write_text(file.read_text()[:-5])  # cut within the last line
    assert [len(each) for each in kept()] == [20, 3]
    generated: list[int] = []
    real = vlm[0].generate

    def counted(**inputs: Any) -> Any:
        generated.append(len(inputs["input_ids"]))
        return real(**inputs)

    monkeypatch.setattr(vlm[0], "generate", counted)
    again = ask(*vlm, asked, 4, kept=kept())
    assert again.answers == whole.answers and again.shuffled_points == whole.shuffled_points
    assert sum(generated) == 17
    assert ask(*vlm, asked, 4, kept=kept()).points == whole.points and sum(generated) == 17  # nothing is asked again
    assert kept("another model's") == [{}, {}]


def test_the_room_of_an_answer_does_not_depend_on_what_is_left(vlm: Any) -> None:
    """The longest truth of the task was answered before the kill: the others keep its room."""
    items = [Item("talk", n, "describe the image .", "word " * (12 if n == 0 else 1)) for n in range(3)]
    asked = Questions(items, make_image, lambda items, answers: [0.0] * len(items))
    whole = answers(vlm, asked, 1)
    assert answers(vlm, asked, 1, kept=[{0: whole[0]}, {}]) == whole


def test_choices_of_a_model_of_transformers(tmp_path: Path) -> None:
    """Llava: batches of choices are those of one by one, and not always the same choice."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = save_llava(tmp_path)
    llava = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    expected = answers(llava, questions(LETTERS, 2), 1)
    assert answers(llava, questions(LETTERS, 2), 50) == expected and len(set(expected)) > 1


def test_questions_with_choices_have_their_own_hash() -> None:
    data = ScenesDataset(scene_config(SceneData(cutouts="shapes"), 64), "test", scenes=8)
    free = scene_questions(data, 2).items
    assert all(not item.choices for item in free)
    hashes = [
        evaluation.Scores([(Item("t", 0, "?", "a", choices=own), "")], {"t": [0.0]}).questions
        for own in ((), ("a", "b"), ("a",))
    ]
    assert len({each["t"] for each in hashes}) == 3
