"""Several values for keys of a recipe: ``layout=cos-32,cos-80 skipper.alpha=0,0.5`` -> a recipe for each pair."""

from __future__ import annotations

import itertools
import math
import re
from contextlib import suppress
from pathlib import Path

from sparsight.config import ChainOfSight, Recipe, load_recipe
from sparsight.layouts import PRESETS, Layout

_SHORT = re.compile(r"layout=|(compressor|skipper)\.")
_SCALE = re.compile(r"\s*\d+\s*:\s*\d+\s*")
MOST = 100


Swept = list[tuple[dict[str, str], Recipe]]


def sweep(path: str | Path, overrides: list[str]) -> tuple[Swept, list[str]]:
    """({key: value} of what differs, recipe) for each combination of the values that commas part, and what is wrong
    with combinations that make no recipe.

    Keys are those of overrides, or short: ``layout`` is that of all stages but the last (of the only one), which takes
    another preset of as many tokens where its own cannot be born from it; ``compressor.*`` belongs to the first stage
    and ``skipper.*`` to the last. Scales beside one another (``1:16,4:4``) are one layout; where two such stand side by
    side, part them by a semicolon.

    Raises:
        ValueError: no key has several values, or there are too many combinations, or none of them is a recipe.
    """
    values = {key: _split(text) for key, _, text in (override.partition("=") for override in overrides)}
    varied = {key: found for key, found in values.items() if len(found) > 1}
    fixed = [override for override in overrides if override.partition("=")[0] not in varied]
    count = math.prod(map(len, varied.values()))
    if not 1 < count <= MOST:
        raise ValueError(
            f"--sweep: {count} combinations; expected 2 to {MOST}, such as layout=cos-32,cos-80 skipper.alpha=0,0.5"
        )
    base = load_recipe(path, [each for each in fixed if not _SHORT.match(each)])
    names, ends = [stage.name for stage in base.stages], []
    if "layout" in varied and isinstance(last := base.stages[-1].bridge, ChainOfSight):
        ends = [name for name, scales in PRESETS.items() if Layout.parse(scales).tokens == last.scales.tokens]
    recipes: Swept = []
    refused = []
    for combination in itertools.product(*varied.values()):
        chosen = dict(zip(varied, combination, strict=True))
        overrides = fixed + [f"{key}={value}" for key, value in chosen.items()]
        try:
            recipes.append(
                (chosen, _read(path, [long for each in overrides for long in _long(each, names)], names[-1], ends))
            )
        except ValueError as error:
            refused.append(f"{', '.join(map('='.join, chosen.items()))}: {error}")
    if not recipes:
        raise ValueError("--sweep: no combination is a recipe: " + "; ".join(refused))
    return recipes, refused


def _read(path: str | Path, overrides: list[str], last: str, ends: list[str]) -> Recipe:
    """The recipe; where it is none, with the first of the layouts ``ends`` in the stage ``last`` with which it is."""
    try:
        return load_recipe(path, overrides)
    except ValueError:
        for layout in ends:
            with suppress(ValueError):
                return load_recipe(path, [*overrides, f"stages.{last}.bridge.layout={layout}"])
        raise


def _split(text: str) -> list[str]:
    if text.startswith(("[", "{")):
        return [text]
    if ";" in text:
        return text.split(";")
    found: list[str] = []
    for part in text.split(","):
        if found and _SCALE.fullmatch(part) and _SCALE.fullmatch(found[-1].rpartition(",")[2]):
            found[-1] += "," + part
        else:
            found.append(part)
    return found


def _long(override: str, names: list[str]) -> list[str]:
    """An override with a short key written out, for the stages of these names."""
    if not _SHORT.match(override):
        return [override]
    if override.startswith("layout"):
        return [f"stages.{name}.bridge.{override}" for name in names[:-1] or names]
    return [f"stages.{names[0 if override.startswith('compressor') else -1]}.{override}"]
