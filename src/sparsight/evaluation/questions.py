"""Questions of held-out conversations and of the embedded scenes, and the points of their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from sparsight.data.sources import open_source
from sparsight.errors import UserError
from sparsight.evaluation.ask import Item, Questions
from sparsight.evaluation.benchmarks import benchmark_questions
from sparsight.evaluation.metrics import box_match, exact_match
from sparsight.evaluation.scoring import score, yes_no_figures
from sparsight.evaluation.significance import Estimate
from sparsight.scenes.questions import ALL_TASKS, TASKS, ScenesDataset, caption_recall, graded_question
from sparsight.settings.recipe import HeldOut


def held_out_questions(name: str, settings: HeldOut, image_size: int) -> Questions:
    """Every question of the file's first conversations by itself, with its image and without the turns before it; or
    those of a benchmark's own files.

    Raises:
        UserError: a conversation has not exactly one image, or turns that are no questions and answers; or the
            image is not there; or as `benchmark_questions` says.
    """
    if settings.format != "conversations":
        return benchmark_questions(name, settings)
    source = open_source(settings.data, settings.items, image_size)
    items: list[Item] = []
    for row in range(len(source)):
        sample = source[row]
        roles = [message["role"] for message in sample.messages if message["role"] != "system"]
        if len(sample.images) != 1 or roles != ["user", "assistant"] * (len(roles) // 2):
            raise UserError(
                f"{name}: sample '{sample.id}' has {len(sample.images)} images and turns of {roles}: expected one "
                "image, questions and answers"
            )
        source.size(sample.images[0])  # an error if it is not there, and not only when it is asked about
        said = [
            " ".join(part["text"].strip() for part in message["content"] if part["type"] == "text")
            for message in sample.messages
            if message["role"] != "system"
        ]
        items += [Item(name, row, *pair, choices=settings.choices) for pair in zip(said[::2], said[1::2], strict=True)]
        if settings.choices and (others := set(said[1::2]) - set(settings.choices)):
            raise UserError(f"{name}: sample '{sample.id}' has the answers {sorted(others)}, which are no choices")
        if len(items) >= settings.items:
            break
    return score(
        items[: settings.items], lambda row: source.image(source[row].images[0]), settings.metric or "exact_match"
    )


def guess(questions: Questions) -> float:
    """The score of the file's most frequent answer, chosen on the file itself: no blind guess beats it."""
    (answer, _), *_ = Counter(item.truth for item in questions.items).most_common(1)
    points = questions.score(questions.items, [answer] * len(questions.items))
    return sum(points) / len(points)


def scene_questions(data: ScenesDataset, per_task: int) -> Questions:
    """``per_task`` questions of each task that ``data`` names, or of all, over as few images as carry them.
    Points: recall of named things for captions, IoU >= 0.5 for boxes, else exact match."""
    items: list[Item] = []
    for task in TASKS if data.tasks is None else [task for task in ALL_TASKS if data.tasks.get(task, 0) > 0]:
        asked = ((image, graded_question(data.scene(image), task, seed=image)) for image in range(data.scenes))
        items += islice((Item(task, image, *pair) for image, pair in asked if pair is not None), per_task)

    def points(item: Item, answer: str) -> float:
        if item.task == "caption":
            return caption_recall(answer, data.scene(item.image))
        return box_match(answer, item.truth) if item.task == "grounding" else exact_match(answer, item.truth)

    def figures(items: Sequence[Item], answers: Sequence[str], _: list[float]) -> dict[str, Estimate]:
        """Of existence, POPE's F1 and share of yes."""
        own = [number for number, item in enumerate(items) if item.task == "existence"]
        found = yes_no_figures([items[n] for n in own], [answers[n] for n in own], []) if own else {}
        return {f"existence {name}" if name == "F1" else name: found[name] for name in ("F1", "yes-ratio") if found}

    return Questions(items, data.image, lambda own, answers: [*map(points, own, answers)], figures)
