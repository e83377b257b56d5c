"""Scores on the embedded scenes and on held-out conversations, at the end of a run or of a saved model."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from sparsight.console import Console, Progress
from sparsight.data.sources import scene_config
from sparsight.devices.precision import default_device, precision_on
from sparsight.evaluation.ask import Item, Questions, Scores, ask
from sparsight.evaluation.questions import guess, held_out_questions, scene_questions
from sparsight.evaluation.significance import by_grade
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.folders import model_type
from sparsight.pipeline.files import Session, load, load_any, own_scenes, trained_by
from sparsight.reporting.tables import percent, table
from sparsight.scenes.questions import ScenesDataset, chance
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Evaluation, HeldOut, Recipe

EXAMPLES = 8
_HEADS = ("task", "items", "score", "95% interval", "chance", "shuffled images")
SIDE = 256  # pixels of a scene for a model that is not ours; its own processor resizes it


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast, or nothing for fp32; ``auto``: the faster one on the device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision_on(device, precision) == "bf16")


@dataclass(frozen=True)
class _Asked:
    """Questions of one kind, the score of a blind guess by task, and the source of their images."""

    source: str
    questions: Questions
    chance: dict[str, float]


def _to_ask(settings: Evaluation, data: SceneData, side: int) -> Iterator[_Asked]:
    if settings.kind == "scenes":
        images = max(4 * settings.items, 50)  # not every image carries every task
        scenes = ScenesDataset(scene_config(data, side), settings.split, images, seed=data.seed, tasks=data.tasks)
        questions = scene_questions(scenes, settings.items)
        guesses = chance(scenes.config, settings.split, tasks=questions.tasks)
        yield _Asked(f"scenes/{settings.split}", questions, guesses)
    for name, held_out in settings.held_out.items():
        questions = held_out_questions(name, held_out, side)
        yield _Asked(name, questions, {name: guess(questions)})


def _answers(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    asked: _Asked,
    recipe: Recipe | None,
    batch_size: int,
    console: Console,
) -> Scores:
    """Scores, with a bar."""
    # A model that was trained in bf16 elsewhere is asked in fp32 where bf16 is slow.
    wanted = "fp32" if recipe is not None and recipe.precision == "fp32" else "auto"
    precision = precision_on(model.device, wanted)
    if precision == "fp32" and not getattr(model, "is_quantized", False):
        model.float()
    with Progress(console=console) as bar, autocast(precision, model.device):
        task = bar.add_task(f"asking {asked.source}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return ask(model, processor, asked.questions, batch_size, progress=show)


def score_run(
    session: Session, model: SparsightForConditionalGeneration, processor: SparsightProcessor, checkpoint: str
) -> None:
    """Ask the recipe's questions; log scores, the shuffled control and examples."""
    recipe, log, settings = session.recipe, session.log, session.recipe.evaluation
    model.to(default_device())  # where it is already, if it was trained in this sitting
    rows = []
    for asked in _to_ask(settings, recipe.scenes() or SceneData(), model.config.image_size):
        start = time.perf_counter()
        result = _answers(model, processor, asked, recipe, settings.batch_size, session.console)
        log.write(
            "eval",
            checkpoint=checkpoint,
            scores=result.scores,
            shuffled=result.shuffled,
            chance=asked.chance,
            items=result.items,
            points=result.points,
            images=result.images,
            grades=result.grades,
            questions=result.questions,
            seconds=time.perf_counter() - start,
        )
        for item, answer, points in _examples(result):
            log.write(
                "example",
                id=f"{asked.source}/{item.image}",
                image_png_base64=png(asked.questions.image(item.image), 512),
                answer=answer,
                correct=judged(item, answer, points),
                **{key: value for key, value in asdict(item).items() if key not in ("image", "grades")},
            )
        rows += _rows(asked, result)
    session.console.print(table("scores in %", _HEADS, rows))


def evaluate_checkpoint(
    folder: str | Path, items: int, split: str, console: Console, held_out: HeldOut | None = None
) -> list[Scores]:
    """Score a saved model on held-out conversations, or else on the scenes of its own recipe (the embedded ones if it
    was trained on other data).

    Args:
        folder: of a model of ours, or that or the hub id of any image-text-to-text model of transformers.

    Raises:
        UserError: no model in ``folder``, no such split, or conversations that cannot be asked.
    """
    settings = Evaluation.read({"items": items, "split": split}, "eval")
    if Path(folder).is_dir() and model_type(Path(folder)) in (None, SparsightConfig.model_type):
        model, processor = load(folder)
        model.to(default_device())
    else:
        model, processor = load_any(str(folder))
    side = model.config.image_size if isinstance(model.config, SparsightConfig) else SIDE
    if held_out is not None:
        settings = Evaluation(kind="none", held_out={Path(held_out.data.path).stem: held_out})
    rows, results = [], []
    for asked in _to_ask(settings, own_scenes(folder), side):
        result = _answers(model, processor, asked, trained_by(folder), settings.batch_size, console)
        rows += _rows(asked, result)
        results.append(result)
    console.print(table(f"{folder}: scores in %", _HEADS, rows))
    return results


def _rows(asked: _Asked, result: Scores) -> list[list[str]]:
    """Rows of the table of scores: a task or a group of a grade, items, score and interval, chance, and the control."""
    graded = {f"{own.grade}: {own.group}": own for own in by_grade(result.points, result.images, result.grades)}
    items = result.items | {name: own.items for name, own in graded.items()}
    return [
        [
            name,
            str(items.get(name, "")),
            percent(found.mean),
            f"{percent(found.low)} to {percent(found.high)}",
            *(percent(shares.get(name)) for shares in (asked.chance, result.shuffled)),
        ]
        for name, found in (result.estimates() | {name: own.score for name, own in graded.items()}).items()
    ]


def judged(item: Item, answer: str, points: float) -> bool | None:
    """Whether an example's answer is right; None for a caption that is so in part."""
    if item.task != "caption":
        return points >= 0.5
    return True if answer == item.truth else None if points > 0 else False


def _examples(result: Scores) -> list[tuple[Item, str, float]]:
    """One example of each task in turn, each about another image; the same for every run."""
    points = {task: iter(values) for task, values in result.points.items()}
    all_of = [(item, answer, next(points[item.task])) for item, answer in result.answers]
    chosen: list[tuple[Item, str, float]] = []
    tasks = list(result.items)
    for number in range(EXAMPLES):
        own = [each for each in all_of if each[0].task == tasks[number % len(tasks)]]
        used = {item.image for item, *_ in chosen}
        chosen += [each for each in own if each[0].image not in used][:1]
    return chosen


def png(image: Image.Image, side: int) -> str:
    """In base64, at most so many pixels a side: logs and pages hold it."""
    buffer, small = io.BytesIO(), image.copy()
    small.thumbnail((side, side))
    small.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
