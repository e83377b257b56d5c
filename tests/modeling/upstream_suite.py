"""transformers' own tests of a vision-language model, on ours and on LLaVA; `test_upstream.py` runs this module.

They are not in transformers' wheel: SPARSIGHT_TRANSFORMERS_TESTS names the folder ``tests`` of its repository.
"""

import os
import sys
import unittest
from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from sparsight.modeling import SparsightConfig, SparsightForConditionalGeneration, SparsightModel
from sparsight.settings.bridges import ChainOfSightConfig

sys.path.insert(0, str(Path(os.environ["SPARSIGHT_TRANSFORMERS_TESTS"]).resolve().parent))

from tests.test_modeling_common import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from tests.vlm_tester import VLMModelTest, VLMModelTester

# The suite asks these tables which class has a loss; a registered class is in others.
MODEL_MAPPING_NAMES["sparsight"] = "SparsightModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["sparsight"] = "SparsightForConditionalGeneration"


class _LlavaTester(VLMModelTester):
    base_model_class, config_class, conditional_generation_class = (
        LlavaModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    text_config_class, vision_config_class = LlamaConfig, CLIPVisionConfig

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **({"image_size": 8, "patch_size": 4, "num_image_tokens": 4} | kwargs))


class LlavaTest(VLMModelTest, unittest.TestCase):
    model_tester_class = _LlavaTester


class _SparsightTester(VLMModelTester):
    base_model_class, config_class = SparsightModel, SparsightConfig
    conditional_generation_class = SparsightForConditionalGeneration
    text_config_class, vision_config_class = LlamaConfig, CLIPVisionConfig

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **({"image_size": 8, "patch_size": 4, "num_image_tokens": 2} | kwargs))
        self.bridge_config = ChainOfSightConfig("1:2", width=32, heads=2).model_dump()
        self.level_widths, self.map_size, self.vision_levels = [32], [2, 2], [-1]  # the last, as LLaVA in its tests


class SparsightTest(VLMModelTest, unittest.TestCase):
    model_tester_class = _SparsightTester
