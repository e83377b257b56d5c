"""The base of all settings, and their faults in our words."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from sparsight.errors import UserError, warn_renamed

RENAMED = {"places_of": "position_layout", "learnt": "supervised", "course": "schedule"}  # until the next release


class Settings(BaseModel):
    """Base of all settings: frozen; an unknown key is an error that names the nearest right one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[frozenset[str]] = frozenset()  # keys of `RENAMED` that this class still reads

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for old in cls.renamed & values.keys():
            new = RENAMED[old]
            if new in values:
                raise UserError(f"{cls.__name__} has both '{new}' and '{old}', its old name: give '{new}' alone")
            warn_renamed(f"'{old}'", f"'{new}'")
            values = {new if key == old else key: value for key, value in values.items()}
        for key in (key for key in values if key not in cls.model_fields):  # the first one
            near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UserError(f"unknown key '{key}' in {cls.__name__}{hint} Known keys: {', '.join(cls.model_fields)}")
        return values

    @classmethod
    def read(cls, values: Any, where: object) -> Self:
        """Settings from the values of a file, or the like, that ``where`` names.

        Raises:
            UserError: they are wrong; a line for each fault.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{where}: {readable(error)}") from None


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
    "string_pattern_mismatch": "expected a text that matches {pattern}",
    "literal_error": "expected one of {expected}",
    "union_tag_invalid": "kind: expected one of {expected_tags}",
    "union_tag_not_found": "expected a mapping with a key 'kind'",
}
# By the first word of the fault's type: the value has another type, or cannot be read from the text.
_EXPECTED = {
    "model": "a mapping of keys to values",
    "dict": "a mapping of keys to values",
    "list": "a list",
    "tuple": "a list",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
}


def readable(error: ValidationError) -> str:
    """A pydantic error as one line per fault: where, the fault, and the value that was given."""
    lines = []
    for fault in error.errors():
        kind, figures = fault["type"], fault.get("ctx", {})
        said = str(fault["msg"]).removeprefix("Value error, ")
        if kind in _SAID:
            said = _SAID[kind].format(**figures)
        elif (begin := kind.split("_")[0]) in _EXPECTED:
            said = f"expected {_EXPECTED[begin]}"
        where = ".".join(str(part) for part in fault["loc"]) or "recipe"
        given = figures["tag"] if kind == "union_tag_invalid" else fault.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
        lines.append(f"{where}: {said}{shown}")
    return "\n".join(lines)
