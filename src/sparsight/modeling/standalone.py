"""The source of our models as one module that needs no Sparsight: the classes that a saved folder names, all of ours
that they reach, and no more."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from sparsight.compat import COMPOSING
from sparsight.modeling import _MODULES
from sparsight.modeling.configuration import EfficientNetLiteConfig, SparsightConfig

_HEAD = '''"""A vision-language model composed with Sparsight {sparsight}, in one module: it needs torch, pydantic and
transformers{composing}, and no Sparsight. It was made with transformers {transformers} and torch {torch}.

Generated from Sparsight's source by `sparsight export --to remote-code`; change nothing here.
SPDX-License-Identifier: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)
"""

from __future__ import annotations

'''
# What is saved again has this module beside it, where ours writes a stub that imports Sparsight.
_INSTEAD = {"_TEXT": '_TEXT = Path(__file__).read_text(encoding="utf-8")'}


@dataclass
class _Source:
    """A module's statements by the names that they define, and where its other names come from."""

    text: str
    statements: list[ast.stmt]
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)  # name -> module
    foreign: dict[str, str] = field(default_factory=dict)  # name -> line that imports it


@cache
def _source(module: str) -> _Source:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    source = _Source(text, ast.parse(text).body)
    for statement in source.statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            origin = f"from {statement.module} " if isinstance(statement, ast.ImportFrom) else ""
            for name in statement.names:
                if origin.startswith("from sparsight"):
                    assert name.asname is None, f"{module}: {name.name} is imported under another name"
                    source.ours[name.name] = str(statement.module)  # type: ignore[union-attr]
                else:
                    known = name.asname or name.name.partition(".")[0]
                    source.foreign[known] = f"{origin}import {ast.unparse(name)}"
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            source.defined[statement.name] = statement
        else:
            stored = (n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            source.defined |= dict.fromkeys(stored, statement)
    return source


def standalone_source(config: SparsightConfig) -> str:
    """The text of a module with the Auto classes of a model of this configuration."""
    imports: set[str] = set()
    kept: dict[str, tuple[str, ast.stmt]] = {}  # by name, each behind those that it needs
    asked: set[tuple[str, str]] = set()

    def keep(module: str, name: str) -> None:
        source = _source(module)
        if name in source.ours:
            keep(source.ours[name], name)
        elif name in source.foreign:
            imports.add(source.foreign[name])
        elif (statement := source.defined.get(name)) is not None and (module, name) not in asked:
            asked.add((module, name))
            reach(module, statement)
            assert kept.get(name, (module,))[0] == module, f"{name} is defined in {module} and {kept[name][0]}"
            kept[name] = module, statement

    def reach(module: str, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith("sparsight"), f"{module}: an import inside of a function"
            if isinstance(node, ast.Name):
                keep(module, node.id)

    for name in ("COMPOSING", "_check"):
        keep("sparsight.compat", name)
    roots = list(SparsightConfig._auto_map.values())
    if encoder := config.vision_config.model_type == EfficientNetLiteConfig.model_type:
        roots += EfficientNetLiteConfig._auto_map.values()
    for name in dict.fromkeys([*roots, "SparsightProcessor"]):
        keep(f"sparsight.modeling.{_MODULES[name]}", name)
    texts = {id(s): _INSTEAD.get(name) or _segment(module, s) for name, (module, s) in kept.items()}
    texts[id(kept["_check"][1])] += '\n\n\n_check("this model needs", COMPOSING)'
    # Auto classes find this encoder as a part of the model; the model itself they find by its folder.
    for module in ("configuration", "vlm") if encoder else ():
        for statement in _source(f"sparsight.modeling.{module}").statements:
            text = ast.unparse(statement)
            if isinstance(statement, ast.Expr) and ".register(EfficientNetLite" in text:
                reach(f"sparsight.modeling.{module}", statement)
                texts[id(statement)] = text
    found = {name: version(name) for name in ("sparsight", "transformers", "torch")}
    head = _HEAD.format(composing=COMPOSING, **found)
    return head + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(texts.values()) + "\n"


def _segment(module: str, statement: ast.stmt) -> str:
    """A statement's text, decorators too."""
    first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", ()))])
    return "\n".join(_source(module).text.splitlines()[first - 1 : statement.end_lineno])
