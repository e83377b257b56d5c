"""Ask a model questions about images: greedy answers, their points, and the control with wrong images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.data.chat import stop_tokens
from sparsight.errors import UserError
from sparsight.evaluation.metrics import reads_yes
from sparsight.evaluation.significance import Estimate, bootstrap
from sparsight.modeling import SparsightProcessor


@dataclass(frozen=True)
class Item:
    """One question."""

    task: str
    image: int
    question: str
    truth: str
    grades: Mapping[str, int | None] = field(default_factory=dict, compare=False)


@dataclass
class Scores:
    """Answers and their points in [0, 1], by task in the order of the items.

    ``shuffled_points`` are of the control, in which each question gets another image; empty without it.
    """

    answers: list[tuple[Item, str]] = field(default_factory=list)
    points: dict[str, list[float]] = field(default_factory=dict)
    shuffled_points: dict[str, list[float]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """Mean points by task."""
        return {task: fmean(points) for task, points in self.points.items()}

    @property
    def shuffled(self) -> dict[str, float]:
        """Mean points of the control by task."""
        return {task: fmean(points) for task, points in self.shuffled_points.items()}

    @property
    def items(self) -> dict[str, int]:
        """How many questions were asked, by task."""
        return dict(Counter(item.task for item, _ in self.answers))

    @property
    def images(self) -> dict[str, list[int]]:
        """The image that each point is about, by task."""
        return {task: [item.image for item, _ in self._of(task)] for task in self.points}

    @property
    def questions(self) -> dict[str, str]:
        """A hash by task of images, questions and right answers: equal where the same was asked."""
        asked = {
            task: repr([(item.image, item.question, item.truth) for item, _ in self._of(task)]) for task in self.points
        }
        return {task: hashlib.sha256(text.encode()).hexdigest()[:16] for task, text in asked.items()}

    @property
    def grades(self) -> dict[str, dict[str, list[int | None]]]:
        """By task and grade, of each point's question; None where it has none. Tasks without grades are left out."""
        of = {task: [item.grades for item, _ in self._of(task)] for task in self.points}
        return {task: {grade: [each[grade] for each in own] for grade in own[0]} for task, own in of.items() if own[0]}

    def estimates(self) -> dict[str, Estimate]:
        """Each task's score with its 95% interval; of existence also POPE's F1 and share of yes."""
        images = self.images
        found = {task: bootstrap(points, images[task]) for task, points in self.points.items()}
        if pairs := self._of("existence"):
            said = np.array([reads_yes(answer) for _, answer in pairs], float)
            true = np.array([item.truth == "yes" for item, _ in pairs], float)
            found["existence F1"] = bootstrap(2 * said * true, images["existence"], weights=said + true)
            found["yes-ratio"] = bootstrap(said, images["existence"])
        return found

    def _of(self, task: str) -> list[tuple[Item, str]]:
        return [pair for pair in self.answers if pair[0].task == task]


@dataclass(frozen=True)
class Questions:
    """Questions: ``image`` gives an image by its number, ``score`` the points of answers to items."""

    items: list[Item]
    image: Callable[[int], Image.Image]
    score: Callable[[Sequence[Item], Sequence[str]], list[float]]

    @property
    def tasks(self) -> list[str]:
        """In the order in which they are asked."""
        return list(dict.fromkeys(item.task for item in self.items))


@torch.no_grad()
def visual_tokens(
    model: Any, processor: Any, image: Callable[[int], Image.Image], numbers: Sequence[int], batch_size: int
) -> torch.Tensor:
    """Every image's visual tokens (I, N, E): encoded once, however many questions are asked about it. No more than a
    batch of images is in memory."""
    parts = []
    for start in range(0, len(numbers), batch_size):
        pixels = processor.pixels([image(number) for number in numbers[start : start + batch_size]]).to(model.device)
        parts.append(model.get_image_features(**pixels, return_dict=True).pooler_output)
    return torch.cat(parts)


def _greedily(
    items: list[Item],
    tokenizer: Any,
    batch_size: int,
    produce: Callable[[list[int], int], torch.Tensor],
    progress: Callable[[int], None],
) -> list[str]:
    """Answers in batches of items of like length; ``produce`` gives new tokens (B, at most so many) for numbers of
    items."""
    answers = [""] * len(items)
    # Room for the longest truth of the task and some more: neither its own truth nor its batch cuts an answer.
    longest = dict(sorted((item.task, len(tokenizer(item.truth)["input_ids"])) for item in items))
    order = sorted(range(len(items)), key=lambda n: (longest[items[n].task], len(items[n].truth), n))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        room = [longest[items[number].task] + 8 for number in numbers]
        tail = produce(numbers, max(room))
        cut = [ids[:length] for ids, length in zip(tail, room, strict=True)]
        for number, text in zip(numbers, tokenizer.batch_decode(cut, skip_special_tokens=True), strict=True):
            answers[number] = text.strip()
        progress(start + len(numbers))
    return answers


@torch.no_grad()
def answer_all(
    model: Any,
    processor: Any,
    items: list[Item],
    visual_INE: torch.Tensor,
    rows: torch.Tensor,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers; ``rows`` says where in ``visual_INE`` each item's image is. Items of like length go
    together."""
    tokenizer = processor.tokenizer
    stops = stop_tokens(tokenizer, model.generation_config.eos_token_id)

    def produce(numbers: list[int], most: int) -> torch.Tensor:
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": items[number].question}]}]
            for number in numbers
        ]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        texts = [t.replace(processor.image_token, processor.image_token * processor.num_image_tokens) for t in texts]
        coded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        coded = coded.to(model.device)
        produced = model.generate(
            input_ids=coded["input_ids"],
            attention_mask=coded["attention_mask"],
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=visual_INE[rows[numbers]])},
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stops,
        )
        return produced[:, coded["input_ids"].shape[1] :]

    return _greedily(items, tokenizer, batch_size, produce, progress)


@torch.no_grad()
def answer_any(
    model: Any,
    processor: Any,
    items: list[Item],
    image: Callable[[int], Image.Image],
    numbers: Sequence[int],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers of any image-text-to-text model of transformers, by its own processor. ``numbers``: the number of
    each item's image, which ``image`` gives.

    Raises:
        UserError: its processor has no chat template.
    """
    tokenizer = processor.tokenizer
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise UserError(
            f"{type(processor).__name__} has no chat template to write a question with; expected "
            "chat_template.jinja beside the model"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def produce(chosen: list[int], most: int) -> torch.Tensor:
        parts = [
            [{"type": "image", "image": image(numbers[index])}, {"type": "text", "text": items[index].question}]
            for index in chosen
        ]
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in parts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device, dtype=model.dtype)
        produced = model.generate(
            **inputs, max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id
        )
        return produced[:, inputs["input_ids"].shape[1] :]

    return _greedily(items, tokenizer, batch_size, produce, progress)


def ask(
    model: Any,
    processor: Any,
    questions: Questions,
    batch_size: int = 50,
    control: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Ask all questions, and again with the images shuffled.

    Args:
        model: ours, whose images are encoded once, or any image-text-to-text model of transformers.
        control: also score with each question's image replaced by another one; must fall to chance.
    """
    was_training = model.training
    model.eval()
    items = questions.items
    used = sorted({item.image for item in items})
    row = {image: number for number, image in enumerate(used)}
    ours = isinstance(processor, SparsightProcessor)
    visual_INE = visual_tokens(model, processor, questions.image, used, batch_size) if ours else torch.empty(0)
    own = torch.tensor([row[item.image] for item in items], device=visual_INE.device)
    other = (own + max(1, len(used) // 2)) % len(used)  # always another image, when there are two or more
    result = Scores()
    total = len(items) * (1 + control)
    for shuffled, rows in ((False, own), (True, other))[: 1 + control]:
        tell = partial(lambda before, done: progress(before + done, total), len(items) * shuffled)
        if ours:
            answers = answer_all(model, processor, items, visual_INE, rows, batch_size, tell)
        else:
            numbers = [used[number] for number in rows.tolist()]
            answers = answer_any(model, processor, items, questions.image, numbers, batch_size, tell)
        points = result.shuffled_points if shuffled else result.points
        for item, value in zip(items, questions.score(items, answers), strict=True):
            points.setdefault(item.task, []).append(value)
        if not shuffled:
            result.answers = list(zip(items, answers, strict=True))
    model.train(was_training)
    return result
