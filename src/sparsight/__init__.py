"""Sparsight trains multimodal language models in a fraction of the time."""

from __future__ import annotations

import importlib
from typing import Any

from sparsight import _register
from sparsight.errors import warn_renamed

__version__ = "0.1.0"

_PUBLIC = {
    "attach": "sparsight.sparse.attach",
    "build": "sparsight.modeling.build",
    "ChainOfSightConfig": "sparsight.settings.bridges",
    "CompressorConfig": "sparsight.settings.methods",
    "find_parts": "sparsight.sparse.parts",
    "Layout": "sparsight.layouts",
    "LinearConfig": "sparsight.settings.bridges",
    "last_checkpoint": "sparsight.training.checkpoints",
    "load_bridge": "sparsight.bridges.file",
    "load_recipe": "sparsight.settings.load",
    "MlpConfig": "sparsight.settings.bridges",
    "PixelShuffleConfig": "sparsight.settings.bridges",
    "Recipe": "sparsight.settings.recipe",
    "ResamplerConfig": "sparsight.settings.bridges",
    "save_bridge": "sparsight.bridges.file",
    "SafeCheckpoints": "sparsight.training.checkpoints",
    "Scale": "sparsight.layouts",
    "scale_checkpoint": "sparsight.modeling.scaling",
    "scale_tokens": "sparsight.modeling.scaling",
    "train": "sparsight.pipeline.train",
    "UserError": "sparsight.errors",
    "SkipperConfig": "sparsight.settings.methods",
    "SparseHandle": "sparsight.sparse.attach",
    "SparsightCallback": "sparsight.sparse.callback",
    "SparsightConfig": "sparsight.modeling.configuration",
    "SparsightForConditionalGeneration": "sparsight.modeling.vlm",
    "SparsightProcessor": "sparsight.modeling.processing",
}
__all__ = ["__version__", *_PUBLIC]
_RENAMED = {  # until the next release
    "ChainOfSight": "ChainOfSightConfig",
    "LayerSkipper": "SkipperConfig",
    "Linear": "LinearConfig",
    "Mlp": "MlpConfig",
    "PixelShuffle": "PixelShuffleConfig",
    "Resampler": "ResamplerConfig",
    "VisualTokenCompressor": "CompressorConfig",
}


def __getattr__(name: str) -> Any:
    if (new := _RENAMED.get(name)) is not None:
        warn_renamed(f"sparsight.{name}", new)
        name = new
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsight' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_register.with_transformers()
