"""Ask a model questions about images: greedy answers or the likeliest choice, their points, and the control with
wrong images.

Shapes: B questions, R = B x choices, L tokens of the longest choice, V vocabulary; I images, N visual tokens, E width.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.compat import CACHE
from sparsight.data.chat import encode_conversation, stop_tokens
from sparsight.errors import UserError
from sparsight.evaluation.significance import Estimate, bootstrap, paired_tests
from sparsight.modeling import SparsightProcessor


@dataclass(frozen=True)
class Item:
    """One question. ``choices``: the likeliest of them is the answer; none: it is generated."""

    task: str
    image: int
    question: str
    truth: str
    grades: Mapping[str, int | None] = field(default_factory=dict, compare=False)
    choices: tuple[str, ...] = ()
    truths: tuple[str, ...] = ()  # all that count, where there are several
    options: tuple[str, ...] = ()
    group: str = ""  # of questions that are right together or not
    category: str = ""


_BLOCK = 2**30  # bytes of visual tokens that are held at once


@dataclass
class Scores:
    """Answers and their points in [0, 1], by task in the order of the items.

    ``shuffled_points`` are of the control, in which each question gets another image; empty without it. ``figures``
    are what a benchmark reports beside.
    """

    answers: list[tuple[Item, str]] = field(default_factory=list)
    points: dict[str, list[float]] = field(default_factory=dict)
    shuffled_points: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Estimate] = field(default_factory=dict)

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
            task: repr(
                [
                    (item.image, item.question, item.truth, *item.truths, *([item.choices] if item.choices else []))
                    for item, _ in self._of(task)
                ]
            )
            for task in self.points
        }
        return {task: hashlib.sha256(text.encode()).hexdigest()[:16] for task, text in asked.items()}

    @property
    def grades(self) -> dict[str, dict[str, list[int | None]]]:
        """By task and grade, of each point's question; None where it has none. Tasks without grades are left out."""
        of = {task: [item.grades for item, _ in self._of(task)] for task in self.points}
        return {task: {grade: [each[grade] for each in own] for grade in own[0]} for task, own in of.items() if own[0]}

    def estimates(self) -> dict[str, Estimate]:
        """Each task's score with its 95% interval, and the figures."""
        images = self.images
        return {task: bootstrap(points, images[task]) for task, points in self.points.items()} | self.figures

    @cached_property
    def blind(self) -> list[str]:
        """Tasks whose score is not above that of the control: nothing shows that their answers come from the images.
        Tested once, when all points are there."""
        found = paired_tests(self.points, self.shuffled_points, self.images)
        return [task for task, test in found.items() if test.told < 1]

    def _of(self, task: str) -> list[tuple[Item, str]]:
        return [pair for pair in self.answers if pair[0].task == task]


@dataclass(frozen=True)
class Questions:
    """Questions: ``image`` gives an image by its number, ``score`` the points of answers to items, ``figures`` what is
    reported beside their mean; ``note`` says what they are."""

    items: list[Item]
    image: Callable[[int], Image.Image]
    score: Callable[[Sequence[Item], Sequence[str]], list[float]]
    figures: Callable[[Sequence[Item], Sequence[str], list[float]], dict[str, Estimate]] = lambda *_: {}
    note: str = ""

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
        parts += model.get_image_features(**pixels, return_dict=True).pooler_output
    return torch.stack(parts)


@lru_cache(4096)
def _supervised(tokenizer: Any, answer: str) -> list[int]:
    """Ids of an answer and of the stop token behind it, as training supervises them."""
    said = [("user", "?"), ("assistant", answer)]
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    return [label for label in encode_conversation(tokenizer, turns).labels if label != -100]


def choice_losses(
    model: Any, tokenizer: Any, inputs: Mapping[str, Any], choices: Sequence[Sequence[str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood of each row's choices behind its prompt, stop token included, and whether each is the
    greedy answer; both (B, choices). A prompt is read once for all of them. Rows are of one length, and have as many
    choices each."""
    count, (_, length) = len(choices[0]), inputs["input_ids"].shape
    coded = [torch.tensor(_supervised(tokenizer, text)) for own in choices for text in own]
    labels_RL = pad_sequence(coded, batch_first=True, padding_value=-100).to(model.device)
    prompt = model(**inputs, use_cache=True, logits_to_keep=1)
    logits_RLV, cache = prompt.logits[:, -1:].repeat_interleave(count, 0), prompt[CACHE]
    cache.batch_repeat_interleave(count)
    given: dict[str, Any] = {CACHE: cache}
    if hasattr(cache, "_sparsight_countable"):  # compressed: shorter than the positions that it stands for
        given["position_ids"] = torch.arange(length, length + labels_RL.shape[1] - 1, device=model.device)[None]
    if labels_RL.shape[1] > 1:
        rest = model(input_ids=labels_RL[:, :-1].clamp(min=0), use_cache=True, **given).logits
        logits_RLV = torch.cat([logits_RLV, rest], 1)
    losses_RL = F.cross_entropy(logits_RLV.float().transpose(1, 2), labels_RL, ignore_index=-100, reduction="none")
    greedy_RL = (logits_RLV.argmax(-1) == labels_RL) | (labels_RL == -100)
    return losses_RL.sum(1).view(-1, count), greedy_RL.all(1).view(-1, count)


def rooms(tokenizer: Any, items: Sequence[Item]) -> dict[str, int]:
    """Tokens that an answer may have, by task: those of the longest truth and some more, so that neither its own truth
    nor its batch cuts an answer."""
    return dict(sorted((item.task, len(tokenizer(item.truth)["input_ids"]) + 8) for item in items))


Prompts = tuple[list[int], Callable[[Sequence[int]], Mapping[str, Any]]]  # lengths, and inputs for numbers of items


def our_prompts(
    model: Any, processor: Any, items: Sequence[Item], visual_INE: torch.Tensor, rows: torch.Tensor
) -> Prompts:
    """Prompts of a model of ours; ``rows`` says where in ``visual_INE`` each item's image is."""
    tokenizer = processor.tokenizer
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}] for item in items
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    texts = [t.replace(processor.image_token, processor.image_token * processor.num_image_tokens) for t in texts]
    coded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def prompt(numbers: Sequence[int]) -> dict[str, Any]:
        own = {"input_ids": [coded[number] for number in numbers]}
        padded = tokenizer.pad(own, padding_side="left", return_tensors="pt").to(model.device)
        image = BaseModelOutputWithPooling(pooler_output=visual_INE[rows[list(numbers)]])
        return {**padded, "mm_encoder_outputs": {"image": image}}

    return [*map(len, coded)], prompt


def any_prompts(
    model: Any, processor: Any, items: Sequence[Item], images: Sequence[Callable[[], Sequence[Image.Image]]]
) -> Prompts:
    """Prompts of any image-text-to-text model, by its own processor; ``images`` give those of each item.

    Raises:
        UserError: its processor has no chat template.
    """
    tokenizer = processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or getattr(processor, "chat_template", None)
    if not tokenizer.chat_template:
        raise UserError(
            f"{type(processor).__name__} has no chat template to write a question with; expected "
            "chat_template.jinja beside the model"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def prompt(numbers: Sequence[int]) -> Mapping[str, Any]:
        parts = [
            [
                *({"type": "image", "image": image} for image in images[number]()),
                {"type": "text", "text": items[number].question},
            ]
            for number in numbers
        ]
        inputs: Mapping[str, Any] = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in parts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device, dtype=model.dtype)
        return inputs

    return [len(tokenizer(item.question)["input_ids"]) for item in items], prompt


def batches(
    items: Sequence[Item], prompts: Prompts, room: Mapping[str, int], batch_size: int, even: bool = False
) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
    """Numbers of items that are asked at once, and their inputs: as many choices each, and of like length; of one
    length, without padding, if ``even`` or where there are choices."""
    lengths, prompt = prompts

    def kind(number: int) -> tuple[int, int]:
        choices = len(items[number].choices)
        return choices, lengths[number] if even or choices else 0

    order = sorted(range(len(items)), key=lambda n: (*kind(n), room[items[n].task], lengths[n], n))
    for (choices, _), group in groupby(order, kind):
        rest = list(group)
        for numbers in (rest[start : start + batch_size] for start in range(0, len(rest), batch_size)):
            inputs = prompt(numbers)
            if (even or choices) and len(numbers) > 1 and not inputs["attention_mask"].all():
                yield from (([number], prompt([number])) for number in numbers)
            else:
                yield numbers, inputs


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    prompts: Prompts,
    batch_size: int,
    told: Callable[[dict[int, str]], None] = lambda new: None,
    *,
    room: Mapping[str, int] | None = None,
    even: bool = False,
) -> list[str]:
    """Answers, in batches of like length: greedy ones, or the likeliest of an item's choices.

    Args:
        prompts: of `our_prompts` or `any_prompts`.
        told: is given the answers of each batch, by the items' numbers.
        room: tokens that answers may have, by task; `rooms` of these items if not given.
        even: batches are of one length: where visual tokens are compressed, there is no padding.
    """
    tokenizer, answers = processor.tokenizer, [""] * len(items)
    room = room or rooms(tokenizer, items)
    options = {"do_sample": False, "num_beams": 1, "pad_token_id": tokenizer.pad_token_id}
    if isinstance(processor, SparsightProcessor):
        options["eos_token_id"] = stop_tokens(tokenizer, model.generation_config.eos_token_id)

    def reply(own: list[Item], inputs: Mapping[str, Any]) -> list[str]:
        if own[0].choices:
            losses, _ = choice_losses(model, tokenizer, inputs, [item.choices for item in own])
            return [item.choices[index] for item, index in zip(own, losses.argmin(1).tolist(), strict=True)]
        most = [room[item.task] for item in own]
        found = model.generate(**inputs, max_new_tokens=max(most), **options)
        tails = [ids[:end] for ids, end in zip(found[:, inputs["input_ids"].shape[1] :], most, strict=True)]
        return [text.strip() for text in tokenizer.batch_decode(tails, skip_special_tokens=True)]

    for numbers, inputs in batches(items, prompts, room, batch_size, even):
        new = dict(zip(numbers, reply([items[number] for number in numbers], inputs), strict=True))
        for number, text in new.items():
            answers[number] = text
        told(new)
    return answers


def ask(
    model: Any,
    processor: Any,
    questions: Questions,
    batch_size: int = 50,
    control: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    kept: Sequence[MutableMapping[int, str]] = (),
    even: bool = False,
) -> Scores:
    """Ask all questions, and again with the images shuffled.

    Args:
        model: ours, whose images are encoded once, or any image-text-to-text model of transformers.
        control: also score with each question's image replaced by another one; must fall to chance.
        kept: answers by number, of the questions and of the control, that are known already; new ones are added as
            they come (`AnswerFile`).
        even: see `answer`.
    """
    modes = [(module, module.training) for module in model.modules()]  # frozen parts may be in eval mode
    model.eval()
    items, ours = questions.items, isinstance(processor, SparsightProcessor)
    used = sorted({item.image for item in items})
    own, half = {image: number for number, image in enumerate(used)}, max(1, len(used) // 2)
    # Always another image, when there are two or more.
    shown = [[used[(own[item.image] + half * shuffled) % len(used)] for item in items] for shuffled in (0, 1)]
    known = list(kept) or [{}, {}]
    room = rooms(processor.tokenizer, items)

    def seen(image: int) -> list[Image.Image]:
        return [questions.image(image)]

    def told(numbers: list[int], answers: MutableMapping[int, str], new: dict[int, str]) -> None:
        answers.update({numbers[number]: text for number, text in new.items()})
        progress(sum(map(len, known[: 1 + control])), len(items) * (1 + control))

    size = 4 * processor.num_image_tokens * model.config.text_config.hidden_size if ours else 1
    block = max(batch_size, _BLOCK // size)
    for images in (used[start : start + block] for start in range(0, len(used), block)):
        row, visual_INE = {image: number for number, image in enumerate(images)}, None
        for at, answers in zip(shown[: 1 + control], known, strict=False):
            left = [number for number, image in enumerate(at) if image in row and number not in answers]
            asked, tell = [items[number] for number in left], partial(told, left, answers)
            if not left:
                continue
            if not ours:
                look = [partial(seen, at[number]) for number in left]
                prompts = any_prompts(model, processor, asked, look)
            else:
                if visual_INE is None:
                    visual_INE = visual_tokens(model, processor, questions.image, images, batch_size)
                rows = torch.tensor([row[at[number]] for number in left], device=visual_INE.device)
                prompts = our_prompts(model, processor, asked, visual_INE, rows)
            texts = answer(model, processor, asked, prompts, batch_size, tell, room=room, even=even)
            answers.update(zip(left, texts, strict=True))
    for module, training in modes:
        module.training = training
    return _scored(questions, *known[: 1 + control])


def _scored(questions: Questions, answers: Mapping[int, str], control: Mapping[int, str] | None = None) -> Scores:
    items, result = questions.items, Scores()
    result.answers = [(item, answers[number]) for number, item in enumerate(items)]
    for points, found in ((result.points, answers), (result.shuffled_points, control)):
        if found is not None:
            texts = [found[number] for number in range(len(items))]
            values = questions.score(items, texts)
            for item, value in zip(items, values, strict=True):
                points.setdefault(item.task, []).append(value)
            if found is answers:
                result.figures = questions.figures(items, texts, values)
    return result
