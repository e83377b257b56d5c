"""The base of all settings, and their faults in our words."""

from __future__ import annotations

import difflib
import warnings
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    model_validator,
)

from sparsight.errors import UserError


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys are errors, the nearest right key is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    RENAMED: ClassVar[dict[str, str]] = {}  # old key -> key; old ones are read until the next release

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for old in cls.RENAMED.keys() & values.keys():
            new = cls.RENAMED[old]
            if new in values:
                raise UserError(f"{cls.__name__} has both '{new}' and '{old}', its old name: give '{new}' alone")
            warnings.warn(f"'{old}' is now called '{new}'; the old name goes with the next release", FutureWarning, 2)
            values = {new if key == old else key: value for key, value in values.items()}
        for key in values:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else "."
                known = ", ".join(cls.model_fields)
                raise UserError(f"unknown key '{key}' in {cls.__name__}{hint} Known keys: {known}")
        return values


# What pydantic says of a fault, in our words; {} are its own figures.
_SAID = {
    "missing": "expected a value, found none",
    "greater_than_equal": "expected {ge} or more",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected {le} or less",
    "less_than": "expected less than {lt}",
    "finite_number": "expected a finite number",
    "too_short": "expected {min_length} or more of them, found {actual_length}",
    "too_long": "expected {max_length} of them at most, found {actual_length}",
    "string_too_short": "expected {min_length} or more characters",
    "string_pattern_mismatch": "expected a text that matches {pattern}",
    "literal_error": "expected one of {expected}",
    "union_tag_invalid": "kind: expected one of {expected_tags}",
    "union_tag_not_found": "expected a mapping with a key 'kind'",
    "json_invalid": "expected JSON: {error}",
}
# By the beginning of the fault's type: the type of the value is wrong, or no such value can be read from a text.
_EXPECTED = {
    "model": "a mapping of keys to values",
    "dict": "a mapping of keys to values",
    "list": "a list",
    "tuple": "a list",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
}


def _said(fault: Any) -> str:
    kind, figures = fault["type"], fault.get("ctx", {})
    if kind == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    if kind in _SAID:
        return _SAID[kind].format(**figures)
    if (begin := kind.split("_")[0]) in _EXPECTED:
        return f"expected {_EXPECTED[begin]}"
    return str(fault["msg"])


def readable(error: ValidationError) -> str:
    """A pydantic error as one line per fault: where, what is wrong, what was given."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "recipe"
        given = fault["ctx"]["tag"] if fault["type"] == "union_tag_invalid" else fault.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
        lines.append(f"{where}: {_said(fault)}{shown}")
    return "\n".join(lines)
