"""R11: a sample with nothing to learn is an error that names it; so is a loss that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from small_runs import one_stage, train
from sparsight.data.chat import encode_conversation
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import Sample, open_source
from sparsight.training.stages import select_trainable
from templates import FAMILIES, family_tokenizer
from tiny import ListSource, conversation


@pytest.mark.parametrize("name", FAMILIES)
def test_no_answer_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="nothing is supervised: the conversation has no answer"):
        encode_conversation(family_tokenizer(name), conversation(answer=None))


def test_the_error_names_the_sample(tiny_vlm) -> None:
    data = TrainingSet(ListSource(Sample("quiet", conversation(answer=None, images=0), ())), tiny_vlm()[1], 1)
    with pytest.raises(ValueError, match="sample 'quiet': nothing is supervised"):
        data[0]


class OneImageIsNan(TrainingSet):
    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index == 5:
            item["pixels"]["pixel_values"] *= float("nan")
        return item


def test_a_loss_that_is_not_finite_names_the_samples_of_its_pass(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage(micro_batch_size=2)
    model, processor = tiny_vlm()
    select_trainable(model, stage)
    source = open_source(recipe.data, stage.samples, stage.image_size)
    with pytest.raises(ValueError, match=r"step \d: the loss is nan; training stops here. Its samples: ") as told:
        train(model, processor, recipe, stage, tmp_path, OneImageIsNan(source, processor, stage.samples))
    named = str(told.value).partition("samples: ")[2].split(", ")
    assert len(named) == 2 and source[5].id in named
