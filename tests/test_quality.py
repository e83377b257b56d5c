"""The quality benchmark: stages that rows share are those of a run by itself; rows differ in what they say alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from small_runs import FINER, recipe_values, save_encoder, stage_values
from sparsight.pipeline import load, run
from sparsight.settings.recipe import Recipe

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import quality

        return quality
    finally:
        sys.path.pop(0)


def two_stages(folder: Path, **late) -> Recipe:
    encoder = folder / "encoder"
    if not encoder.is_dir():
        save_encoder(encoder)
    stages = [stage_values(samples=8), stage_values("finetune", samples=8, bridge=FINER, **late)]
    return Recipe.model_validate(recipe_values(encoder, stages=stages, evaluation={"kind": "none"}))


def test_shared_stages_change_nothing(tmp_path: Path, quality) -> None:
    """Two rows that begin alike end as each would by itself; the second trains its last stage alone."""
    work = tmp_path / "work"
    for late in ({}, {"skipper": {"alpha": 0.6, "epsilon": 0.3}}):
        recipe = two_stages(tmp_path, **late)
        folder = quality.train(recipe, work, QUIET)
        alone = run(recipe, tmp_path / f"alone{len(late)}", QUIET)
        ours, theirs = (load_file(at / "model.safetensors") for at in (folder / "finetune" / "model", alone))
        assert all((ours[name] == theirs[name]).all() for name in theirs)
        assert [stage["name"] for stage in quality.costs(folder)] == ["pretrain", "finetune"]
    assert len(list(work.glob("*/done"))) == 3


def test_fresh_scales_start_anew_and_the_rest_goes_on(tmp_path: Path, quality) -> None:
    recipe = two_stages(tmp_path, learning_rate={"language": 1e-9})
    born, fresh = (quality.train(recipe, tmp_path / "work", QUIET, anew) for anew in (False, True))
    states = [load(folder / "finetune" / "model")[0].state_dict() for folder in (born, fresh)]
    same = {name for name in states[0] if states[0][name].equal(states[1][name])}
    old, new = (f"model.multi_modal_projector.scales.{grid}.queries" for grid in (1, 4))
    assert old in same and new not in same


def test_every_row_is_a_recipe_on_the_same_samples(quality) -> None:
    """Also: what is scaled has sources for its scales."""
    seen = set()
    for name, row in quality.ROWS.items():
        recipe = quality.recipe_of(row, 0, quality.GRID[0])
        if row.share == 1 and row.longer == 1 and row.groups != "shorter":
            *early, late = recipe.stages
            if row.settle:
                *early, settle = early
                assert settle.position_layout
                late = late.model_copy(update={"samples": settle.samples + late.samples})
            seen.add(tuple((stage.samples, stage.batch_size, str(stage.tasks)) for stage in (*early, late)))
        early, late = recipe.stages[0].bridge, recipe.stages[-1].bridge
        if early != late:
            early.scales.source_scales(late.scales)
        assert set(row.groups.split()) and quality.selected([name]) == [name]
    assert len(seen) == 1
    plain, busier = (quality.recipe_of(row, 0, quality.GRID[0], data) for data in ("scenes", "details"))
    assert busier == plain.model_copy(update={"data": busier.data}) and busier.data.grid > plain.data.grid
    for data, settings in (("photos", quality.GRID[2]), *(("smollm2", each) for each in quality.GRIDS["smollm2"])):
        recipes = [quality.recipe_of(row, 1, settings, data) for row in quality.ROWS.values() if row.longer == 1]
        assert recipes and all(recipe.stages[-1].learning_rate.bridge == settings["late_rate"] for recipe in recipes)
    with pytest.raises(ValueError, match="--rows .'nothing'"):
        quality.selected(["nothing"])


def test_results_are_written_once_and_merged(tmp_path: Path, quality) -> None:
    """A file for each split of a row; the best settings are those of the highest mean on validation, per precision."""
    results = quality.Results(tmp_path)
    first, other = quality.GRID[:2]
    key = {"data": "scenes", "row": "mlp-256", "seed": 0, "precision": "fp32"}
    for settings, score in ((first, 0.5), (other, 0.7)):
        results.add(key | {"settings": settings, "validation": {"scores": {"caption": score}}})
    assert results.best("scenes", "mlp-256", "fp32") == other
    assert [tried["mean"] for tried in results.tried("scenes", "mlp-256", "fp32")] == [0.7, 0.5]
    assert results.best("scenes", "mlp-256", "bf16") == results.best("easy-vqa", "mlp-256", "fp32") == first
    assert results.best("photos", "mlp-256", "fp32") == other  # what was best on scenes: their recipe is the same
    file = results.add(key | {"settings": other, "test": {"scores": {"caption": 0.6}}})
    (merged,) = results.entries(settings=other)
    assert merged["validation"] != merged["test"] and len(results.entries()) == 2
    with pytest.raises(FileExistsError):
        (tmp_path / file.name).open("x")
    assert len(list(tmp_path.glob("*.json"))) == 3
