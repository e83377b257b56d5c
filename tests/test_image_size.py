"""F04: the encoder's own image size is the default, and a size that its patches do not divide is told."""

import warnings
from pathlib import Path

import pytest
from transformers import SiglipVisionConfig

from small_runs import quiet, recipe_values, save_encoder, stage_values
from sparsight.cost.forecast import forecast
from sparsight.modeling.build import own_image_size
from sparsight.modeling.scaling import scale_tokens
from sparsight.pipeline import run
from sparsight.pipeline.check import check_data
from sparsight.pipeline.files import settle_image_size
from sparsight.reporting import read_run
from sparsight.settings.recipe import Recipe
from tiny import clip_config, make_vlm


def without_size(encoder: Path, *names: str) -> Recipe:
    stages = [stage_values(name) for name in names or ("pretrain", "finetune")]
    for stage in stages:
        del stage["image_size"]
    return Recipe.model_validate(recipe_values(encoder, stages=stages))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def test_F04_training_takes_the_encoders_own_size(encoder, tmp_path):
    recipe = without_size(encoder)
    assert [stage.image_size for stage in recipe.stages] == [None, None]
    run(recipe, tmp_path / "run", quiet())
    assert [stage.image_size for stage in read_run(tmp_path / "run").stages] == [64, 64]


def test_F04_data_check_takes_it_too(encoder, tmp_path):
    found = check_data(without_size(encoder), tmp_path, 0, quiet())
    assert found["visual_tokens_per_image"] == 8 and not found["bad"]


def test_F04_what_a_stage_says_stays(encoder):
    recipe = without_size(encoder)
    given = recipe.stages[1].model_copy(update={"image_size": 96})
    recipe = recipe.model_copy(update={"stages": (recipe.stages[0], given)})
    assert [stage.image_size for stage in settle_image_size(recipe).stages] == [64, 96]


def test_F04_plan_knows_the_size_without_weights(encoder):
    """By the same number that training takes."""
    named = without_size(encoder).model_copy(update={"vision": "clip-l-14-336"})
    assert [cost.image_size for cost in forecast(named)] == [336, 336]
    assert forecast(named)[0].map_size == (24, 24)
    local = forecast(without_size(encoder))
    assert [cost.image_size for cost in local] == [own_image_size(str(encoder))] * 2 == [64, 64]
    lite = forecast(named.model_copy(update={"vision": "efficientnet-lite0"}))
    assert [cost.image_size for cost in lite] == [own_image_size("efficientnet-lite0")] * 2 == [256, 256]


CUT = "image_size 60: .*patches of 8 px, so 4 px at the right.* not seen; the nearest sizes are 56 and 64"


def test_F04_a_size_that_patches_do_not_divide_is_told(encoder):
    with pytest.warns(UserWarning, match=CUT):
        model, processor = make_vlm(image_size=60)
    with pytest.warns(UserWarning, match="image_size 68: .*64 and 72"):
        scale_tokens(model, processor, image_size=68)
    stages = [stage_values(image_size=60)]
    with pytest.warns(UserWarning, match=CUT):
        forecast(Recipe.model_validate(recipe_values(encoder, stages=stages)))


def test_F04_an_encoders_own_size_is_no_mistake():
    own = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=60, patch_size=8
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = make_vlm(vision=own)
        make_vlm(vision=clip_config())
        forecast(Recipe.model_validate(recipe_values(Path("siglip-so400m"), stages=[stage_values(image_size=None)])))
    assert model.config.image_size == 60
