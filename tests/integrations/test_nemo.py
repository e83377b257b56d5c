"""NeMo AutoModel's recipe: what it reads and refuses. Its training is tried by hand: docs/trainers/README.md."""

import importlib.util
from types import SimpleNamespace

import pytest
from families import batch_of, made
from torch.optim import SGD

from sparsight.errors import UserError
from sparsight.integrations import nemo

NAME = "llava, clip + llama"


class Recipe:
    """The attributes and methods of a recipe that ours stands before, of a real model and optimizer."""

    def __init__(self, cfg, parts=1, **mesh):
        self.cfg, self.parts, self.mesh_context, self.logged = cfg, parts, SimpleNamespace(**mesh), []

    def setup(self):
        self.model_parts = [made(NAME) for _ in range(self.parts)]
        self.optimizer = [SGD(self.model_parts[0].parameters(), lr=0.1)]
        self.step_scheduler = SimpleNamespace(step=2, max_steps=4)

    def log_train_metrics(self, log_data):
        self.logged.append(log_data.metrics)


class Sparse(nemo.Sparse, Recipe):
    pass


def test_it_attaches_goes_on_at_the_step_of_the_recipe_and_logs():
    recipe = Sparse({"sparsight": {"compressor": {"keep": 0.25, "final": 1.0}}})
    recipe.setup()
    model = recipe.model_parts[0]
    assert (recipe.handle.global_step, recipe.handle.keep) == (2, 0.625)
    model(**batch_of(NAME, model)).loss.backward()
    recipe.optimizer[0].step()
    assert recipe.handle.global_step == 3
    recipe.log_train_metrics(SimpleNamespace(metrics={"loss": 1.0}))
    logged = recipe.logged[0]
    assert logged["loss"] == 1.0 and logged["visual_tokens_out"] < logged["visual_tokens_in"] and logged["flops"] > 0


@pytest.mark.parametrize(
    "settings, options, message",
    [
        (None, {}, "no key 'sparsight'"),
        ({"compresor": {}}, {}, "did you mean 'compressor'"),
        ({"compressor": {}, "dense_probe": 4}, {}, "dense_probe: this recipe has no probe"),
        ({"compressor": {}}, {"pp_size": 2}, "pp_size 2"),
        ({"compressor": {}}, {"cp_size": 2}, "cp_size 2"),
        ({"compressor": {}}, {"tp_size": 2}, "tp_size 2"),
        ({"compressor": {}}, {"parts": 2}, "pp_size"),
    ],
)
def test_what_cannot_be_attached_is_refused(settings, options, message):
    with pytest.raises(UserError, match=message):
        Sparse({"sparsight": settings}, **options).setup()


@pytest.mark.skipif(importlib.util.find_spec("nemo_automodel") is None, reason="NeMo AutoModel is not installed")
def test_the_recipe_is_theirs_with_ours_before():
    from nemo_automodel.recipes.vlm.finetune import FinetuneRecipeForVLM

    assert nemo.SparsightRecipeForVLM.__mro__[1:3] == (nemo.Sparse, FinetuneRecipeForVLM)


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match="no attribute 'Recipe'"):
        nemo.Recipe  # noqa: B018
