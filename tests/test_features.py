"""The key of the feature cache: whatever changes features gives it another name, and nothing else does (F07)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from small_runs import SCENES, quiet, stage_values
from sparsight.data.sources import open_source
from sparsight.pipeline.features import cached_features
from sparsight.pipeline.files import Session
from sparsight.reporting import RunLog
from sparsight.settings.bridges import ChainOfSightConfig
from sparsight.settings.recipe import Recipe
from tiny import make_vlm


def levels(made: dict[str, Any]) -> None:
    made["model"].config.vision_levels = [2]


def order_of_levels(made: dict[str, Any]) -> None:
    made["model"].config.vision_levels = made["model"].config.vision_levels[::-1]


def precision(made: dict[str, Any]) -> None:
    made["precision"] = "bf16"


def mean_of_pixels(made: dict[str, Any]) -> None:
    made["processor"].image_processor.image_mean = [0.25, 0.5, 0.5]


def resampling(made: dict[str, Any]) -> None:
    made["processor"].image_processor.resample = 0


def weights(made: dict[str, Any]) -> None:
    with torch.no_grad():
        list(made["model"].model.vision_tower.parameters())[-1].add_(1.0)


def images(made: dict[str, Any]) -> None:
    made["scenes"] = made["scenes"] | {"seed": 5}


def nothing(made: dict[str, Any]) -> None:
    pass


def bridge(made: dict[str, Any]) -> None:
    """Features come before it: runs that differ in it share a cache."""
    with torch.no_grad():
        list(made["model"].model.multi_modal_projector.parameters())[-1].add_(1.0)


def folder_of(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """The cache's name in a run whose ingredients were changed."""
    torch.manual_seed(0)
    model, processor = make_vlm(ChainOfSightConfig("1:4,2:1", width=32, heads=2), vision_levels=[1, 2])
    made = {"model": model, "processor": processor, "precision": "fp32", "scenes": SCENES | {"scenes": 2}}
    change(made)
    stage = stage_values(cache_features=True, samples=2)
    language = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64, "vocabulary": 400}
    recipe = Recipe.model_validate(
        {
            "name": "keys",
            "vision": "none",
            "language": language,
            "precision": made["precision"],
            "data": made["scenes"],
            "stages": [stage],
        }
    )
    source = open_source(recipe.data_of(recipe.stages[0]), 2, 64)
    with RunLog(tmp_path / change.__name__ / "run.jsonl") as log:
        log.write("header", version=1, run="keys", environment={}, samples_hash="", recipe={})
        session = Session(recipe, tmp_path, log, quiet(), False, tmp_path / "cache")
        cache, _ = cached_features(session, recipe.stages[0], made["model"], made["processor"], source, 1.0)
    return cache.folder.name


CHANGES = [levels, order_of_levels, precision, mean_of_pixels, resampling, weights, images]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_F07_what_changes_features_changes_the_key(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    assert folder_of(tmp_path, change) != folder_of(tmp_path, nothing)


def test_F07_what_does_not_change_features_keeps_the_key(tmp_path: Path) -> None:
    assert folder_of(tmp_path, bridge) == folder_of(tmp_path, nothing)
    assert len(list((tmp_path / "cache").iterdir())) == 1
