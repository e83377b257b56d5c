"""R09: too long a sample is told or dropped, never cut; there are always as many placeholders as features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_runs import quiet, recipe_values, save_encoder, stage_values
from sparsight.config import Recipe
from sparsight.data.chat import TooLong
from sparsight.data.collate import Collator, TrainingSet
from sparsight.data.sources import Sample
from sparsight.pipeline import max_length, run
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
        batch.pop("ids")
        with torch.no_grad():  # the model compares the counts too
            assert torch.isfinite(model(**batch, loss_only=True).loss)
        return
    with pytest.raises(
        ValueError, match=rf"sample 's0': {length} tokens, {visual} of them visual; .* {limit} "
    ) as told:
        limited[0]
    assert isinstance(told.value, TooLong) == drop


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


def test_pictures_of_a_fixed_number_of_tokens_are_not_shrunk() -> None:
    with pytest.raises(ValueError, match=r"shrink_image makes no sample shorter.*a layout with fewer tokens"):
        Recipe.model_validate(recipe_values(Path("none"), stages=[stage_values(on_too_long="shrink_image")]))


@pytest.mark.parametrize(("policy", "kind"), [("error", ValueError), ("drop_sample", TooLong)])
def test_a_run_is_told_of_too_long_a_sample(tmp_path: Path, policy: str, kind: type) -> None:
    stage = stage_values(max_length=12, on_too_long=policy)
    recipe = Recipe.model_validate(recipe_values(save_encoder(tmp_path / "encoder"), stages=[stage]))
    with pytest.raises(
        ValueError, match=r"sample 'scenes/train/\d+': \d+ tokens, 8 of them visual; expected 12"
    ) as told:
        run(recipe, tmp_path / "run", quiet())
    assert type(told.value) is kind
