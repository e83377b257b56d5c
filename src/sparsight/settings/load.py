"""Read YAML recipes, and apply overrides and presets."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from sparsight.errors import UserError
from sparsight.settings.base import readable
from sparsight.settings.bridges import WindowedSettings, spelled_out
from sparsight.settings.recipe import Comparison, Recipe


def builtin_recipe(name: str) -> Path:
    """A recipe that comes with Sparsight: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"recipe '{name}' is not part of this installation of Sparsight")


def _builtin_named(file: Path) -> Path:
    """The built-in recipe that ``recipes/NAME`` stands for where there is no such file.

    Raises:
        FileNotFoundError: it stands for none. A bare name may be a user's file in another folder: that is only told.
    """
    folder = builtin_recipe("demo.yaml").parent
    if file == Path("recipes", file.name) and (folder / file.name).is_file():
        return folder / file.name
    named = file.name if (folder / file.name).is_file() else "NAME.yaml"
    raise FileNotFoundError(
        f"no recipe at {file.absolute()}; those that come with Sparsight are called recipes/{named} and lie in {folder}"
    )


def load_recipe(path: str | Path, overrides: list[str] | None = None, preset: str | None = None) -> Recipe:
    """Read a YAML recipe and apply ``key=value`` overrides, dotted, list items by number or by stage name.

    ``stages.pretrain.batch_size=8`` and ``data.scenes=200`` are overrides. ``recipes/NAME.yaml``, where there is no
    such file, is the recipe of that name that comes with Sparsight.

    Args:
        preset: ``few-tokens``, ``scale-settled`` or ``scale``: bridges and methods of `recipes/presets.yaml`, in place
            of the recipe's; it splits samples as overrides have left them, and overrides of its own keys and stage
            come after it.

    Raises:
        UserError: the file is not a YAML mapping, or a key or value is wrong; the message names each. Or there is no
            such preset, or the recipe has one stage alone.
        FileNotFoundError: there is no such file.
    """
    values = _read_yaml(Path(path), overrides, preset)
    if "runs" in values:
        raise UserError(f"{path} compares runs; it is for: sparsight demo --recipe {path}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {readable(error)}") from None


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> Comparison:
    """Read the YAML of a comparison; overrides and errors as in `load_recipe`."""
    values = _read_yaml(Path(path), overrides)
    if "stages" in values and "runs" not in values:
        raise UserError(f"{path} is the recipe of one run; it is for: sparsight train {path}")
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {readable(error)}") from None


def load_recipes(path: str | Path, overrides: list[str] | None = None, preset: str | None = None) -> list[Recipe]:
    """The recipe of a YAML file, or those of a comparison; arguments and errors as in `load_recipe`."""
    if "runs" not in _read_yaml(Path(path), None):
        return [load_recipe(path, overrides, preset)]
    if preset is not None:
        raise UserError(f"--preset {preset}: {path} compares runs; a preset is for one recipe")
    return load_comparison(path, overrides).recipes()


def _read_yaml(file: Path, overrides: list[str] | None, preset: str | None = None) -> dict[str, Any]:
    if not file.is_file():
        file = _builtin_named(file)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a mapping of keys to values, found {type(values).__name__}")
    if preset is None:
        for override in overrides or []:
            _apply(values, override)
    else:
        _override_around(values, overrides or [], preset)
    return values


_OLD_PRESETS = {"fast": "few-tokens", "balanced": "scale-settled", "quality": "scale"}  # until the next release


def _lay_over(values: dict[str, Any], name: str) -> None:
    if (new := _OLD_PRESETS.get(name)) is not None:
        text = f"--preset {name} is now called {new}; the old name goes with the next release"
        warnings.warn(text, FutureWarning, stacklevel=2)
        name = new
    presets = yaml.safe_load(builtin_recipe("presets.yaml").read_text(encoding="utf-8"))
    if name not in presets:
        raise UserError(f"--preset {name}: expected one of {', '.join(presets)}")
    stages = values.get("stages")
    if not isinstance(stages, list) or len(stages) < 2 or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"--preset {name}: expected a recipe of two stages or more: it scales between them")
    preset, last, settle = presets[name], stages[-1], None
    whole = last.get("samples")
    # What is no number is told when the recipe is read; a copy of all of it, as overrides are written into it.
    if isinstance(whole, int) and (samples := int(preset.get("settle", 0) * whole)):
        settle = deepcopy(last) | {"name": "settle", "samples": samples, "schedule": "constant_with_warmup"}
        last["samples"] = whole - samples
        stages.insert(-1, settle)
    # A bridge keeps its width and the like: those of the first stage that has any, as scaling does not change them.
    own = [stage.get("bridge") for stage in stages]
    sizes = [
        {k: v for k, v in each.items() if k in WindowedSettings.model_fields} for each in own if isinstance(each, dict)
    ]
    kept = next(filter(None, sizes), {})
    for stage in stages:
        new = preset["late" if stage is last else "early"]
        stage.pop("places_of", None)  # its old name
        stage |= {
            "compressor": None,
            "skipper": None,
            "position_layout": None,
            "proportional_attention": stage is settle,
        }
        stage |= new | {"bridge": kept | new["bridge"]}


_OF_PRESETS = ("bridge", "compressor", "skipper", "position_layout", "proportional_attention")  # keys of every stage


def _override_around(values: dict[str, Any], overrides: list[str], preset: str) -> None:
    """Overrides, then the preset, which splits a stage as they have left it; then again what it has laid itself over,
    and what names its own stage. Numbers are those of the recipe's own stages."""
    after: list[tuple[dict[str, Any], str]] = []
    for override in overrides:
        place, _, rest = override.partition("=")[0].removeprefix("stages.").partition(".")
        stages = values.get("stages")
        if not override.startswith("stages.") or not rest or not isinstance(stages, list):
            _apply(values, override)
        elif place == "settle" and "settle" not in [each.get("name") for each in stages if isinstance(each, dict)]:
            after.append((values, override))
        else:
            stage, own = _list_item(stages, place, override), override.removeprefix(f"stages.{place}.")
            covered = rest.partition(".")[0] in _OF_PRESETS
            if covered:
                after.append((stage, own))
            try:
                _apply(values, override)
            except ValueError:
                if not covered:  # else it may be for what the preset is yet to put there
                    raise
    _lay_over(values, preset)
    for node, override in after:
        _apply(node, override)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': expected key=value, such as seed=1")
    *path, last = key.split(".")
    node: Any = values
    for index, part in enumerate(path):
        if isinstance(node, list):
            node = _list_item(node, part, override)
        elif isinstance(node, dict):
            if node.get(part) is None:  # also what a preset has switched off
                node[part] = {}
            if part == "bridge":
                node[part] = spelled_out(node[part])
            node = node[part]
        else:
            raise UserError(f"override '{override}': '{'.'.join(path[:index])}' is not a mapping, found {node!r}")
    if not isinstance(node, dict):
        raise UserError(f"override '{override}': '{'.'.join(path)}' is not a mapping, found {type(node).__name__}")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': not valid YAML: {error}") from None


def _list_item(items: list[Any], part: str, override: str) -> Any:
    named = {item.get("name"): item for item in items if isinstance(item, dict)}
    if part in named:
        return named[part]
    if part.isdigit() and int(part) < len(items):
        return items[int(part)]
    raise UserError(f"override '{override}': no item '{part}'; there are {[name for name in named if name]}")
