"""Sparsight trains multimodal language models in a fraction of the time."""

from __future__ import annotations

import importlib
from typing import Any

from sparsight import _register

__version__ = "0.1.0"

_PUBLIC = {
    "ChainOfSight": "sparsight.settings.load",
    "LayerSkipper": "sparsight.settings.load",
    "Layout": "sparsight.layouts",
    "Linear": "sparsight.settings.load",
    "Mlp": "sparsight.settings.load",
    "PixelShuffle": "sparsight.settings.load",
    "Recipe": "sparsight.settings.load",
    "Resampler": "sparsight.settings.load",
    "Scale": "sparsight.layouts",
    "SparsightCallback": "sparsight.sparse.callback",
    "SparsightConfig": "sparsight.modeling",
    "SparsightForConditionalGeneration": "sparsight.modeling",
    "SparsightProcessor": "sparsight.modeling",
    "VisualTokenCompressor": "sparsight.settings.load",
    "attach": "sparsight.sparse.attach",
    "build": "sparsight.modeling.build",
    "load_bridge": "sparsight.bridges.file",
    "load_recipe": "sparsight.settings.load",
    "save_bridge": "sparsight.bridges.file",
    "scale_checkpoint": "sparsight.modeling.scaling",
    "scale_tokens": "sparsight.modeling.scaling",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsight' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_register.with_transformers()
