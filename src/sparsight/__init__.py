"""Sparsight trains multimodal language models in a fraction of the time."""

from __future__ import annotations

import importlib
from typing import Any

from sparsight import _register

__version__ = "0.1.0"

_PUBLIC = {
    "ChainOfSight": "sparsight.config",
    "LayerSkipper": "sparsight.config",
    "Layout": "sparsight.layouts",
    "Linear": "sparsight.config",
    "Mlp": "sparsight.config",
    "PixelShuffle": "sparsight.config",
    "Recipe": "sparsight.config",
    "Resampler": "sparsight.config",
    "Scale": "sparsight.layouts",
    "SparsightCallback": "sparsight.sparse.callback",
    "SparsightConfig": "sparsight.modeling",
    "SparsightForConditionalGeneration": "sparsight.modeling",
    "SparsightProcessor": "sparsight.modeling",
    "VisualTokenCompressor": "sparsight.config",
    "attach": "sparsight.sparse.attach",
    "build": "sparsight.modeling.build",
    "load_bridge": "sparsight.modeling.bridge_file",
    "load_recipe": "sparsight.config",
    "save_bridge": "sparsight.modeling.bridge_file",
    "scale_checkpoint": "sparsight.modeling.scale",
    "scale_tokens": "sparsight.modeling.scale",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsight' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_register.with_transformers()
