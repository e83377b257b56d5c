"""Make ``import sparsight`` enough for transformers' Auto classes, without importing torch for it.

Our classes are registered when transformers loads its Auto classes, or at once if it has done so already.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_AUTO = ("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto")


def _register() -> None:
    importlib.import_module("sparsight.modeling")


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the Auto modules as usual, and registers our classes when one has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _AUTO:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # once is enough, and our own import must not come back here
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def with_transformers() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if any(name in sys.modules for name in _AUTO):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
