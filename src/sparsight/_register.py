"""Make ``import sparsight`` enough for transformers' Auto classes, without importing torch for it.

Our classes are registered when transformers loads its Auto classes, or at once if it has done so already.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

# Each of ours registers with the one of theirs that it is listed under, and imports no other that is listed below it:
# theirs import each other, and a module that is half loaded cannot be imported from.
_OURS = {
    "transformers.models.auto.configuration_auto": "sparsight.modeling.configuration",
    "transformers.models.auto.modeling_auto": "sparsight.modeling.vlm",
    "transformers.models.auto.processing_auto": "sparsight.modeling.processing",
}


def _register_with(theirs: str) -> None:
    """Import ours, which registers it. Raises nothing: `import sparsight` must not change what transformers does."""
    try:
        importlib.import_module(_OURS[theirs])
    except Exception as error:
        with suppress(Exception):
            from sparsight import compat

            compat.refuse_composed(error, theirs)  # told to whoever loads one of our models


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register_with(module.__name__)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the Auto modules as usual, and registers our classes when one has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _OURS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def with_transformers() -> None:
    """Register with those of transformers' Auto classes that are loaded, and with the others as soon as they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for theirs in _OURS:
        if theirs in sys.modules:
            _register_with(theirs)
