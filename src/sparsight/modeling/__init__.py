"""The composed VLM as a model of transformers.

Names are loaded when asked for: a configuration alone must load no model (see ``sparsight._register``).
`sparsight.modeling.build` is the module; its function is `sparsight.build`.
"""

from __future__ import annotations

import importlib
from typing import Any

from sparsight.compat import check_composing

check_composing()

_MODULES = {
    "EfficientNetLiteConfig": "configuration",
    "EfficientNetLiteModel": "efficientnet_lite",
    "SparsightConfig": "configuration",
    "SparsightForConditionalGeneration": "vlm",
    "SparsightModel": "vlm",
    "SparsightProcessor": "processing",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sparsight.modeling' has no attribute '{name}'")
    return getattr(importlib.import_module(f"sparsight.modeling.{_MODULES[name]}"), name)
