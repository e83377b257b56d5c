"""Small real models and data for tests: random weights, all parts real. `conftest.py` gives them as fixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, PreTrainedModel, PreTrainedTokenizerFast

from sparsight.compat import check_composing
from sparsight.data.sources import Sample
from sparsight.settings.bridges import ChainOfSightConfig
from sparsight.settings.recipe import ScratchLanguage

if TYPE_CHECKING:
    from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor

TEXTS = (
    "How many apples are in the image? There are 12 apples.",
    "What stands left of the red car? A small dog stands there.",
    "Read the number. It is 47.",
    "Describe the image. A house, two trees and a boat.",
)
BRIDGE = ChainOfSightConfig("1:4,2:1", width=32, heads=2)  # 8 visual tokens


def needs_composing() -> None:
    """Skip the test under a transformers that is too old for composed models, which attach is not."""
    try:
        check_composing()
    except ImportError as error:
        pytest.skip(str(error))


def make_language(**settings: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A language model from scratch, of width 32 with 2 layers, and its byte-level tokenizer learnt from `TEXTS`."""
    needs_composing()
    from sparsight.modeling.scratch import scratch_language

    torch.manual_seed(0)
    small = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "vocabulary": 400}
    return scratch_language(ScratchLanguage(**(small | settings)), TEXTS)


def clip_config(**settings: Any) -> CLIPVisionConfig:
    """CLIP with 8 x 8 patches of 8 pixels, width 32, 4 layers: two feature levels by default."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 64,
    }
    return CLIPVisionConfig(**(small | settings))


def make_vlm(bridge: Any = BRIDGE, **options: Any) -> tuple[SparsightForConditionalGeneration, SparsightProcessor]:
    """A VLM of `clip_config` and `make_language`; options go to `sparsight.build`."""
    language, tokenizer = make_language()
    from sparsight.modeling.build import build

    torch.manual_seed(1)
    options = {"vision": clip_config(), "language": language, "tokenizer": tokenizer} | options
    return build(options.pop("vision"), options.pop("language"), bridge, **options)


def make_image(seed: int = 0, side: int = 80) -> Image.Image:
    """An image of coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


class ListSource:
    """Samples in memory; an image's key is its seed."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def image(self, key: int) -> Image.Image:
        return make_image(key)

    def keys(self) -> list[int]:
        return sorted({key for sample in self.samples for key in sample.images})


def conversation(question: str = "How many apples?", answer: str | None = "12 apples.", images: int = 1) -> list[dict]:
    """Messages of one turn, with `images` placeholders before the question."""
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages: list[dict] = [{"role": "user", "content": parts}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def ask(processor, image, question):
    """The model's inputs for one question about one image, as a user would make them."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
