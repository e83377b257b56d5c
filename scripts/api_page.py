"""Write docs/api.md: every public name, its signature, and the first sentence of its docstring.

python scripts/api_page.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import sparsight

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
# Methods that are part of the contract, beside the names themselves.
METHODS = {
    "SparseHandle": ("step", "report", "detach", "clear_gradients", "take_passes"),
    "Layout": ("parse", "source_scales", "positions", "children"),
}
HEAD = """# Every public name

Made by `scripts/api_page.py`. Everything here is imported from `sparsight`; heavy modules load when a name is asked
for. Names that are not here may change at any time.
"""


def sentence(value: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", text)[0]


def annotation(value: Any) -> str:
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:\w+\.)+(\w)", r"\1", text)


def default(value: Any) -> str:
    return repr(str(value)) if isinstance(value, sparsight.Layout) else repr(value)


def signature(name: str, value: Any) -> str:
    """A call as it can be written, with types and defaults; keys of recipes stand in docs/recipes.md."""
    if value is sparsight.Recipe:
        return f"{name}.model_validate(values: dict[str, Any]) -> Recipe"
    if inspect.isclass(value) and issubclass(value, BaseModel):
        fields = [
            f"{key}: {annotation(field.annotation)}"
            + ("" if field.default is PydanticUndefined else f" = {default(field.default)}")
            for key, field in value.model_fields.items()
            if key != "kind"
        ]
        return f"{name}({', '.join(fields)})"
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    shown, parameters = [], [each for each in found.parameters.values() if each.name not in ("self", "cls")]
    for number, each in enumerate(parameters):
        if each.kind is each.KEYWORD_ONLY and (
            number == 0 or parameters[number - 1].kind is each.POSITIONAL_OR_KEYWORD
        ):
            shown.append("*")
        stars = "**" if each.kind is each.VAR_KEYWORD else "*" if each.kind is each.VAR_POSITIONAL else ""
        text = stars + each.name
        text += "" if each.annotation is each.empty else f": {annotation(each.annotation)}"
        shown.append(text + ("" if each.default is each.empty else f" = {each.default!r}"))
    returns = found.return_annotation
    back = "" if returns is found.empty or inspect.isclass(value) else f" -> {annotation(returns)}"
    return f"{name}({', '.join(shown)}){back}"


def entry(name: str, value: Any) -> list[str]:
    lines = [f"### `{name}`", "", "```text", signature(name, value), "```", "", sentence(value), ""]
    for method in METHODS.get(name, ()):
        if (found := getattr(value, method, None)) is not None:
            lines += [f"- `.{signature(method, found)}`: {sentence(found)}"]
    return [*lines, ""] if name in METHODS else lines


def page() -> str:
    names = {name: getattr(sparsight, name) for name in sparsight.__all__ if name != "__version__"}
    text = "\n".join(line for name in sorted(names, key=str.lower) for line in entry(name, names[name]))
    return f"{HEAD}\n{re.sub(chr(10) + '{3,}', chr(10) * 2, text).rstrip()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
