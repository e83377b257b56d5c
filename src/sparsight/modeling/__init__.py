"""The composed VLM as an ordinary model of transformers."""

from sparsight.modeling.build import build, scratch_language
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.encoders import EfficientNetLiteConfig, EfficientNetLiteModel, feature_levels
from sparsight.modeling.modeling import SparsightForConditionalGeneration, SparsightModel
from sparsight.modeling.processing import SparsightProcessor

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "SparsightConfig",
    "SparsightForConditionalGeneration",
    "SparsightModel",
    "SparsightProcessor",
    "build",
    "feature_levels",
    "scratch_language",
]
