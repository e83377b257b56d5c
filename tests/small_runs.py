"""Recipes of small runs that take seconds: two stages, scenes of plain shapes, an encoder saved in a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from sparsight.cost import Trains
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import open_source
from sparsight.settings.recipe import Recipe, Stage
from sparsight.training.counter import StepCounter
from sparsight.training.trainer import plan_stage, train_stage, training_arguments
from tiny import clip_config

SCENES = {"kind": "scenes", "scenes": 24, "cutouts": "shapes", "kinds": 8, "max_things": 3, "questions": 2}
LANGUAGE = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "vocabulary": 400, "context": 512}
BRIDGE = {"kind": "chain_of_sight", "layout": "1:4,2:1", "width": 32, "heads": 2}
FINER = BRIDGE | {"layout": "1:4,2:1,4:1"}


def save_encoder(folder: Path) -> Path:
    """A CLIP vision tower with random weights, and its image processor, as a hub would hold them."""
    torch.manual_seed(2)
    CLIPVisionModel(clip_config()).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def stage_values(name: str = "pretrain", **changes: Any) -> dict[str, Any]:
    rates = {"bridge": 2e-3, "language": 1e-3}
    return {
        "name": name,
        "bridge": BRIDGE,
        "image_size": 64,
        "learning_rate": rates,
        "samples": 16,
        "batch_size": 4,
    } | changes


def recipe_values(encoder: Path, **changes: Any) -> dict[str, Any]:
    """Alignment of all but the encoder, then LoRA with more visual tokens; 4 steps each."""
    stages = [stage_values(), stage_values("finetune", bridge=FINER, lora={"rank": 4, "dropout": 0.1})]
    return {
        "name": "small",
        "vision": str(encoder),
        "language": LANGUAGE,
        "precision": "fp32",
        "data": SCENES,
        "workers": 0,
        "stages": stages,
        "evaluation": {"items": 2, "batch_size": 8},
    } | changes


def one_stage(**changes: Any) -> tuple[Recipe, Stage]:
    """A recipe of one stage, for `train`; ``vision`` is not looked at there."""
    own = {key: changes.pop(key) for key in ("workers", "precision", "data", "seed") if key in changes}
    recipe = Recipe.model_validate(recipe_values(Path("none"), stages=[stage_values(**changes)]) | own)
    return recipe, recipe.stages[0]


class Records(list):
    """A step log in memory."""

    def write(self, type: str, **fields: Any) -> None:
        self.append({"type": type, **fields})

    def steps(self) -> dict[int, dict[str, Any]]:
        return {record["step"]: record for record in self if record["type"] == "step"}

    def losses(self) -> dict[int, float]:
        return {number: record["loss"] for number, record in self.steps().items()}


class Crash(BaseException):
    """The lights go out: nobody catches it to save."""


class Failing(TrainingSet):
    """Calls ``event`` when the item after ``after`` others is asked for, and goes on if it returns."""

    def __init__(self, *args: Any, after: int, event: Any) -> None:
        super().__init__(*args)
        self.left, self.event = after, event

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.left == 0:
            self.event()
        self.left -= 1
        return super().__getitem__(index)


def crash() -> None:
    raise Crash


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def training_set(
    processor: Any, recipe: Recipe, stage: Stage, before_step: int | None = None, event: Any = crash
) -> Any:
    """The stage's data; ``event`` is called while that step's batch is loaded."""
    source = open_source(recipe.data, stage.samples, stage.image_size)
    if before_step is None:
        return TrainingSet(source, processor, stage.samples)
    return Failing(source, processor, stage.samples, after=stage.batch_size * (before_step - 1) + 2, event=event)


def train(
    model: Any,
    processor: Any,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    data: TrainingSet | None = None,
    resume: bool = False,
    log: Records | None = None,
    console: Console | None = None,
) -> Records:
    """`train_stage` with all that goes around it; parameters must have been selected."""
    log = Records() if log is None else log
    data = data or training_set(processor, recipe, stage)
    counter = StepCounter(model, Trains.of(stage), 1e6)
    plan = plan_stage(data, stage, recipe.seed, folder, quiet())
    arguments = training_arguments(recipe, stage, len(plan), folder)
    options = {"log": log, "console": console or quiet(), "resume": resume}
    train_stage(model, processor, data, plan, stage, arguments, counter, **options)
    return log
