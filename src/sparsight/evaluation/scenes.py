"""Questions about the embedded scenes, and what their answers are worth."""

from __future__ import annotations

from typing import Any

from sparsight.evaluation.ask import Item, Questions, Scores, ask
from sparsight.evaluation.metrics import box_match, exact_match
from sparsight.scenes.questions import ScenesDataset, caption_recall, single_question
from sparsight.scenes.world import TASKS, Scene


def make_items(data: ScenesDataset, per_task: int) -> list[Item]:
    """``per_task`` questions of each task that ``data`` names, or of all, over as few images as carry them."""
    items = []
    for task in TASKS if data.tasks is None else [task for task in TASKS if data.tasks.get(task, 0) > 0]:
        found = 0
        for image in range(data.scenes):
            if found == per_task:
                break
            asked = single_question(data.scene(image), task, seed=image)
            if asked is not None:
                items.append(Item(task, image, *asked))
                found += 1
    return items


def score_answer(task: str, answer: str, truth: str, scene: Scene) -> float:
    """One answer's score: exact match; recall of named things for captions; IoU >= 0.5 for boxes."""
    if task == "caption":
        return caption_recall(answer, scene)
    if task == "grounding":
        return box_match(answer, truth)
    return exact_match(answer, truth)


def scene_questions(data: ScenesDataset, per_task: int) -> Questions:
    """Questions as `make_items` finds them."""
    return Questions(
        make_items(data, per_task),
        data.image,
        lambda items, answers: [
            score_answer(item.task, answer, item.truth, data.scene(item.image))
            for item, answer in zip(items, answers, strict=True)
        ],
    )


def evaluate_scenes(
    model: Any, processor: Any, data: ScenesDataset, per_task: int, batch_size: int = 50, **options: Any
) -> Scores:
    """Ask ``per_task`` questions of each task about a split, at the model's image size; ``options`` are `ask`'s."""
    return ask(model, processor, scene_questions(data, per_task), batch_size, **options)
