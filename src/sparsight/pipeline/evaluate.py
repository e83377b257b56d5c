"""Scores on the embedded scenes, at the end of a run or of a saved model."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sparsight.config import Evaluation, SceneData
from sparsight.data.scenes import ScenesDataset, chance
from sparsight.data.sources import scene_config
from sparsight.evaluation.scenes import Scores, evaluate_scenes, score_answer
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.pipeline.files import Session, load, own_scenes, trained_by
from sparsight.reporting.comparison import percent

EXAMPLES = 8


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def score_run(
    session: Session, model: SparsightForConditionalGeneration, processor: SparsightProcessor, checkpoint: str
) -> None:
    """Ask the embedded test split, log scores, the shuffled control and examples."""
    recipe, log, console = session.recipe, session.log, session.console
    data = recipe.scenes() or SceneData()
    settings = recipe.evaluation
    start = time.perf_counter()
    result, guess = ask_scenes(model, processor, data, settings, recipe.precision, console)
    log.write(
        "eval",
        checkpoint=checkpoint,
        scores=result.scores,
        shuffled=result.shuffled,
        chance=guess,
        items=result.items,
        points=result.points,
        pictures=result.pictures,
        questions=result.questions,
        seconds=time.perf_counter() - start,
    )
    scenes = _test_scenes(data, settings, model.config.image_size)
    for item, answer in _examples(result):
        points = score_answer(item.task, answer, item.truth, scenes.scene(item.picture))
        log.write(
            "example",
            id=f"scenes/{settings.split}/{item.picture}",
            image_png_base64=png(scenes.image(item.picture)),
            answer=answer,
            correct=answer == item.truth if item.task == "caption" else points >= 0.5,
            **{key: value for key, value in asdict(item).items() if key != "picture"},
        )


def _test_scenes(data: SceneData, settings: Evaluation, side: int) -> ScenesDataset:
    # Not every picture carries every task: four pictures for an item are enough.
    pictures = max(4 * settings.items, 50)
    return ScenesDataset(scene_config(data, side), settings.split, scenes=pictures, seed=data.seed)


def ask_scenes(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    data: SceneData,
    settings: Evaluation,
    precision: str,
    console: Console,
) -> tuple[Scores, dict[str, float]]:
    """Scores on the embedded scenes, with a bar, and what blind guessing gets."""
    scenes = _test_scenes(data, settings, model.config.image_size)
    with Progress(console=console) as bar, autocast(precision, model.device):
        task = bar.add_task("asking questions", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = evaluate_scenes(model, processor, scenes, settings.items, settings.batch_size, progress=show)
    return result, dict(chance(scenes.config, settings.split))


def evaluate_checkpoint(folder: Path, items: int, split: str, console: Console) -> Scores:
    """Score a saved model on the scenes of its own recipe (the embedded ones if it was trained on other data).

    Raises:
        ValueError: no model in ``folder``, or no such split.
    """
    model, processor = load(folder)
    recipe = trained_by(folder)
    precision = recipe.precision if recipe is not None else "bf16"
    settings = Evaluation.model_validate({"items": items, "split": split})
    result, guess = ask_scenes(model, processor, own_scenes(folder), settings, precision, console)
    table = Table(title=f"{folder}: {split} split, scores in %", title_justify="left")
    for column in ("task", "items", "score", "95% interval", "chance", "shuffled pictures"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, found in result.estimates().items():
        interval = f"{percent(found.low)} to {percent(found.high)}"
        controls = (percent(shares.get(task)) for shares in (guess, result.shuffled))
        table.add_row(task, str(result.items.get(task, "")), percent(found.mean), interval, *controls)
    console.print(table)
    return result


def _examples(result: Scores) -> list[tuple[Any, str]]:
    """One example of each task in turn, each about another picture; the same for every run."""
    chosen: list[tuple[Any, str]] = []
    tasks = list(result.items)
    for number in range(EXAMPLES):
        own = [(item, answer) for item, answer in result.answers if item.task == tasks[number % len(tasks)]]
        used = {item.picture for item, _ in chosen}
        chosen += [pair for pair in own if pair[0].picture not in used][:1]
    return chosen


def png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
