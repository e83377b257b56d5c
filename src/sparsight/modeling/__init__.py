"""The composed VLM as a model of transformers.

Names are loaded when asked for: a configuration alone must load no model (see ``sparsight._register``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsight.compat import check_composing

if TYPE_CHECKING:
    from sparsight.modeling.configuration import EfficientNetLiteConfig, SparsightConfig
    from sparsight.modeling.efficientnet_lite import EfficientNetLiteModel
    from sparsight.modeling.encoders import feature_levels
    from sparsight.modeling.processing import SparsightProcessor
    from sparsight.modeling.vlm import SparsightForConditionalGeneration, SparsightModel

check_composing()

# `sparsight.modeling.build` is the module; its function is `sparsight.build`.
_MODULES = {
    "EfficientNetLiteConfig": "configuration",
    "EfficientNetLiteModel": "efficientnet_lite",
    "SparsightConfig": "configuration",
    "SparsightForConditionalGeneration": "vlm",
    "SparsightModel": "vlm",
    "SparsightProcessor": "processing",
    "feature_levels": "encoders",
}
__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "SparsightConfig",
    "SparsightForConditionalGeneration",
    "SparsightModel",
    "SparsightProcessor",
    "feature_levels",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sparsight.modeling' has no attribute '{name}'")
    return getattr(importlib.import_module(f"sparsight.modeling.{_MODULES[name]}"), name)
