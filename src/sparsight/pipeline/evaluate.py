"""Scores on the embedded scenes and on held-out conversations, at the end of a run or of a saved model."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sparsight.console import Console, Progress
from sparsight.data.sources import scene_config
from sparsight.devices.precision import default_device, forked_rng, precision_on
from sparsight.errors import UserError
from sparsight.evaluation.ask import Item, Questions, Scores, ask
from sparsight.evaluation.questions import guess, held_out_questions, scene_questions
from sparsight.evaluation.significance import by_grade, paired_tests
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.folders import model_type
from sparsight.pipeline.files import Session, load_either, own_scenes, trained_by
from sparsight.pipeline.ways import ROWS, Way, costs_of, curve_of, ways_of
from sparsight.reporting import environment, write_curve
from sparsight.reporting.tables import percent, table
from sparsight.scenes.questions import ScenesDataset, chance
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Evaluation, HeldOut, Recipe, Stage

EXAMPLES = 8
_HEADS = ("task", "items", "score", "95% interval", "chance", "shuffled images")
_AGAINST = ("task", "points", "95% interval", "p (Holm)", "the first is")
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


def settle(model: SparsightForConditionalGeneration, recipe: Recipe | None) -> str:
    """The precision to ask a model in, which has its weights in fp32 afterwards where that is the one: a model that was
    trained in bf16 elsewhere is asked in fp32 where bf16 is slow."""
    precision = precision_on(model.device, "fp32" if recipe is not None and recipe.precision == "fp32" else "auto")
    if precision == "fp32" and not getattr(model, "is_quantized", False):
        model.float()
    return precision


def _answers(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    asked: _Asked,
    precision: str,
    batch_size: int,
    console: Console,
    said: str = "",
    **options: Any,
) -> Scores:
    """Scores, with a bar; ``options`` go to `ask`."""
    with Progress(console=console) as bar, autocast(precision, model.device):
        task = bar.add_task(f"asking {asked.source}{said}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = ask(model, processor, asked.questions, batch_size, progress=show, **options)
    empty = sum(not answer for _, answer in result.answers)
    if asked.questions.note:
        console.print(asked.questions.note, highlight=False, markup=False)
    if empty:
        console.print(f"{empty} of {len(result.answers)} answers are empty: no points", style="yellow", highlight=False)
    return result


def _tell_blind(tasks: Sequence[str], said: str, console: Console) -> None:
    text = (
        f"not above the control with shuffled images{said}: {', '.join(tasks)}. Nothing shows that these answers come"
    )
    if tasks:
        console.print(f"{text} from the images", style="yellow", highlight=False, markup=False)


class DuringTraining:
    """Asks a subset of a recipe's questions while a stage trains, and logs the scores by task. In eval mode, so that
    methods are off; in the layout that the stage's positions are for. Training goes on as if nothing had happened.
    ``seconds``: what it took in all."""

    def __init__(self, session: Session, stage: Stage, model: Any, processor: SparsightProcessor) -> None:
        self.session, self.stage, self.parts, self.seconds = session, stage, (model, processor), 0.0
        asked, scenes = session.recipe.evaluation.during_training(), session.recipe.scenes() or SceneData()
        self.asked = list(_to_ask(asked, scenes, model.config.image_size))

    def __call__(self, step: int, last: bool) -> dict[str, float] | None:
        """Scores by task, once they are logged; None where none are due: every so many steps, and behind the last."""
        (model, processor), recipe, start = self.parts, self.session.recipe, time.perf_counter()
        if not last and step % (recipe.evaluation.every or 1):
            return None
        layout, found = self.stage.position_layout, Scores()
        way = Way(None if layout is None else str(layout))
        with forked_rng(), way.taken(model, processor), autocast(recipe.precision, model.device):
            for each in self.asked:
                own = ask(model, processor, each.questions, recipe.evaluation.batch_size, control=False)
                found.answers += own.answers
                found.points |= own.points
        seconds, scores = time.perf_counter() - start, found.scores
        self.seconds += seconds
        about = {"stage": self.stage.name, "step": step, "layout": way.layout, "seconds": seconds}
        self.session.log.write("eval_step", **about, scores=scores, items=found.items)
        return scores


def score_run(
    session: Session, model: SparsightForConditionalGeneration, processor: SparsightProcessor, checkpoint: str
) -> None:
    """Ask the recipe's questions; log scores, the shuffled control and examples."""
    recipe, log, settings = session.recipe, session.log, session.recipe.evaluation
    model.to(default_device())  # where it is already, if it was trained in this sitting
    precision, rows, blind = settle(model, recipe), list[list[str]](), list[str]()
    for asked in _to_ask(settings, recipe.scenes() or SceneData(), model.config.image_size):
        start = time.perf_counter()
        result = _answers(model, processor, asked, precision, settings.batch_size, session.console)
        log.write(
            "eval",
            checkpoint=checkpoint,
            scores=result.scores,
            shuffled=result.shuffled,
            chance=asked.chance,
            items=result.items,
            figures={name: found.mean for name, found in result.figures.items()},
            points=result.points,
            images=result.images,
            grades=result.grades,
            questions=result.questions,
            blind=result.blind,
            seconds=time.perf_counter() - start,
        )
        for item, answer, points in _examples(result):
            log.write(
                "example",
                id=f"{asked.source}/{item.image}",
                image_png_base64=png(asked.questions.image(item.image), 512),
                answer=answer,
                correct=judged(item, answer, points),
                **{key: value for key, value in asdict(item).items() if key in ("task", "question", "truth")},
            )
        rows, blind = rows + _rows(asked, result), blind + result.blind
    session.console.print(table("scores in %", _HEADS, rows))
    _tell_blind(blind, "", session.console)


def evaluate_checkpoint(
    folder: str | Path,
    items: int,
    split: str,
    console: Console,
    held_out: HeldOut | None = None,
    *,
    layouts: str | None = None,
    keep: str | None = None,
    method: str = "uniform",
    out: str | Path | None = None,
    against: str | Path | None = None,
) -> list[Scores]:
    """Score a saved model on held-out conversations, or else on the scenes of its own recipe (the embedded ones if it
    was trained on other data). Returns the scores in each way, or of both models.

    Args:
        folder: of a model of ours, or that or the hub id of any image-text-to-text model of transformers.
        layouts, keep, method: ask it in each layout and with each share of the visual tokens, see `ways_of`, and
            measure what a question costs. The model on disk stays as it is.
        out: gets the answers, from which an evaluation that was killed goes on, and the curve as ``curve.json`` and
            ``curve.html``; "evaluation" for a curve, none else.
        against: another model, which is asked the same; the difference of each task is tested (`paired_tests`).

    Raises:
        UserError: no model in ``folder``, no such split, conversations that cannot be asked, a layout that the model
            cannot take, or two models with scenes of their own; nothing has been asked then.
    """
    if against is not None:
        _refuse(folder, against, (layouts, keep), held_out is None)
    settings = Evaluation.read({"items": items} | ({"split": split} if held_out is None else {}), "eval")
    (model, processor), results = load_either(folder), list[Scores]()
    ours, curved = isinstance(model.config, SparsightConfig), layouts is not None or keep is not None
    out = "evaluation" if curved and out is None else out
    if held_out is not None:
        settings = Evaluation(kind="none", held_out={Path(held_out.data.path).stem: held_out})
    (asked,) = _to_ask(settings, own_scenes(folder), model.config.image_size if ours else SIDE)
    precision, ways = settle(model, trained_by(folder)), ways_of(model, processor, layouts, keep, method)
    decides = precision, getattr(model.config, "_commit_hash", None), asked.questions.items
    for way in ways:
        few = way.keep < 1
        options = {"even": few, "kept": way.kept(Path(out), folder, *decides) if out is not None else ()}
        size = 1 if few and not ours else settings.batch_size
        with way.taken(model, processor):
            said = f", {way}" if curved else ""
            results.append(_answers(model, processor, asked, precision, size, console, said, **options))
    if not curved or out is None:
        console.print(table(f"{folder}: scores in %", _HEADS, _rows(asked, results[0])))
        _tell_blind(results[0].blind, "", console)
        if against is not None:
            results += evaluate_checkpoint(against, items, split, console, held_out, out=out)
            console.print(table(f"{folder} against {against}", _AGAINST, _differences(*results)))
        return results
    with autocast(precision, model.device):
        costs = costs_of(model, processor, ways, asked.questions)
    facts = {"model": str(folder), "asked": asked.source, "precision": precision, "rows": ROWS, "chance": asked.chance}
    write_curve(facts | {"points": curve_of(ways, results, costs), "env": environment()}, out, console)
    for way, result in zip(ways, results, strict=True):
        _tell_blind(result.blind, f" ({way})", console)
    return results


def _refuse(folder: str | Path, against: str | Path, ways: tuple[str | None, ...], scenes: bool) -> None:
    if ways != (None, None):
        raise UserError(f"--against {against}: two models are compared as they are; leave out --layouts and --keep")
    if Path(against).is_dir() and model_type(Path(against)) is None:
        raise UserError(f"--against {against}: no model there; expected a folder with config.json")
    if scenes and own_scenes(folder) != own_scenes(against):
        raise UserError(f"{folder} and {against} were trained on scenes of other settings: give --data, to ask both it")


def _differences(ours: Scores, theirs: Scores) -> list[list[str]]:
    """Rows of the table of two models: a task, its difference and interval in points, p, and which is better."""
    rows = []
    for task, test in paired_tests(ours.points, theirs.points, ours.images).items():
        difference, low, high = (f"{100 * value:+z.1f}" for value in test[:3])
        told = {1: "better", 0: "no difference can be told", -1: "worse"}[test.told]
        rows.append([task, difference, f"{low} to {high}", f"{test.p_value:.4f}", told])
    return rows


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
