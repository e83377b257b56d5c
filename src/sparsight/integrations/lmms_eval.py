"""What lmms-eval reads at its start (entry point `lmms_eval.models`): the name of our models' adapter."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """`ModelManifest` of `--model sparsight`; nothing heavy is loaded before it is chosen."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("sparsight", simple_class_path="sparsight.pipeline.lmms.Sparsight")
