"""R09: too long a sample is told or dropped, never cut; there are always as many placeholders as features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_runs import quiet, recipe_values, save_encoder, stage_values
from sparsight.data.collate import Collator, TrainingSet
from sparsight.data.sources import Sample
from sparsight.pipeline import max_length, run
from sparsight.reporting.runlog import read_run
from sparsight.settings.recipe import Recipe
from tiny import ListSource, conversation


def source(*shapes: tuple[int, int]) -> ListSource:
    """Samples of so many images and words."""
    samples = [
        Sample(f"s{n}", conversation("apples " * words, images=images), tuple(range(images)))
        for n, (images, words) in enumerate(shapes)
    ]
    return ListSource(*samples)


@pytest.fixture(scope="module")
def vlm(tiny_vlm) -> Any:
    return tiny_vlm()


@settings(max_examples=40)
@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 40)), limit=st.integers(2, 60), drop=st.booleans())
def test_a_sample_is_whole_or_told(vlm: Any, shape: tuple[int, int], limit: int, drop: bool) -> None:
    model, processor = vlm
    whole = TrainingSet(source(shape), processor, 1)[0]
    length, visual = len(whole["input_ids"]), whole["input_ids"].count(processor.image_token_id)
    assert visual == shape[0] * processor.num_image_tokens
    limited = TrainingSet(source(shape), processor, 1, max_length=limit, drop_too_long=drop)
    if length <= limit:
        assert limited[0]["input_ids"] == whole["input_ids"]
        batch = Collator(0)([limited[0]])
        batch.pop("info")
        with torch.no_grad():  # the model compares the counts too
            assert torch.isfinite(model(**batch, loss_only=True).loss)
        return
    with pytest.raises(ValueError, match=rf"{length} tokens, {visual} of them visual; .* {limit} ") as told:
        limited[0]
    assert str(told.value).startswith("sample 's0'") != drop and ("49 others" in str(told.value)) == drop


def test_the_limit_is_the_language_models_context_if_not_given(vlm: Any) -> None:
    language = vlm[0].config.text_config
    recipe = Recipe.model_validate(
        recipe_values(Path("none"), stages=[stage_values(), stage_values("b", max_length=64)])
    )
    assert (
        [max_length(stage, language) for stage in recipe.stages] == [language.max_position_embeddings, 64] == [2048, 64]
    )
    above = recipe.stages[1].model_copy(update={"max_length": 2049})
    with pytest.raises(ValueError, match=r"stage 'b': max_length 2049 is more than the .* context of 2048"):
        max_length(above, language)


def test_images_of_a_fixed_number_of_tokens_are_not_shrunk() -> None:
    with pytest.raises(ValueError, match=r"shrink_image makes no sample shorter.*a layout with fewer tokens"):
        Recipe.model_validate(recipe_values(Path("none"), stages=[stage_values(on_too_long="shrink_image")]))


def test_a_run_is_told_of_too_long_a_sample(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        recipe_values(save_encoder(tmp_path / "encoder"), stages=[stage_values(max_length=12)])
    )
    with pytest.raises(
        ValueError, match=r"sample 'scenes/train/\d+': \d+ tokens, 8 of them visual; expected at most 12"
    ):
        run(recipe, tmp_path / "run", quiet())


def test_too_long_samples_are_dropped_counted_and_no_bad_ones(tmp_path: Path) -> None:
    rows = [conversations(n, words=60 if n < 8 else 2) for n in range(16)]  # far more than max_bad allows
    (tmp_path / "data.json").write_text(json.dumps(rows))
    stage = stage_values(samples=16, max_length=32, on_too_long="drop_sample")
    data = {"kind": "json", "path": str(tmp_path / "data.json")}
    recipe = Recipe.model_validate(recipe_values(save_encoder(tmp_path / "encoder"), data=data, stages=[stage]))
    run(recipe, tmp_path / "run", quiet())
    steps = read_run(tmp_path / "run").stages[0].steps
    assert sum(step["replaced"] for step in steps) >= 8 and sum(step["samples"] for step in steps) == 16
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(int(line["id"]) for line in lines) == list(range(8)) and all(line["dropped"] for line in lines)


def conversations(number: int, words: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "apples " * words}]
    return {"id": str(number), "conversations": turns}
