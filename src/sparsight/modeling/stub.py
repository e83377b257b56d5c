"""A module of one import beside what we save: Auto classes find ours by it, though nothing imported Sparsight."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

MODULE = "modeling_sparsight"
_TEXT = '''"""Classes of Sparsight, where transformers' Auto classes look for them. They need Sparsight."""

from sparsight.modeling import *
'''


class Registered:
    """For classes that ``import sparsight`` registers: transformers need not copy their source beside what it saves."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: Auto classes call it for what a stub led them to, and `custom_object_save` would copy our files."""


class WithStub(Registered):
    """For configurations and processors: writes the stub beside their JSON file, and names its classes there.

    It hangs on the one method that every way of saving goes through, before files are compared for an upload.
    """

    _auto_map: ClassVar[dict[str, str]]  # Auto class -> name of ours

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        self.auto_map = {auto: f"{MODULE}.{name}" for auto, name in self._auto_map.items()}
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]
        Path(json_file_path).with_name(f"{MODULE}.py").write_text(_TEXT, encoding="utf-8")
