"""Read YAML recipes, and apply overrides and presets."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from sparsight.errors import UserError, warn_renamed
from sparsight.settings.base import RENAMED
from sparsight.settings.bridges import WindowedSettings, spelled_out
from sparsight.settings.recipe import Comparison, Recipe


def builtin_recipe(name: str) -> Path:
    """A recipe that comes with Sparsight: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"recipe '{name}' is not part of this installation of Sparsight")


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
    return Recipe.read(values, path)


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> Comparison:
    """Read the YAML of a comparison; overrides and errors as in `load_recipe`."""
    values = _read_yaml(Path(path), overrides)
    if "stages" in values and "runs" not in values:
        raise UserError(f"{path} is the recipe of one run; it is for: sparsight train {path}")
    return Comparison.read(values, path)


def load_recipes(path: str | Path, overrides: list[str] | None = None, preset: str | None = None) -> list[Recipe]:
    """The recipe of a YAML file, or those of a comparison; arguments and errors as in `load_recipe`."""
    if "runs" not in _read_yaml(Path(path)):
        return [load_recipe(path, overrides, preset)]
    if preset is not None:
        raise UserError(f"--preset {preset}: {path} compares runs; a preset is for one recipe")
    return load_comparison(path, overrides).recipes()


def _read_yaml(file: Path, overrides: list[str] | None = None, preset: str | None = None) -> dict[str, Any]:
    if not file.is_file():
        file = _builtin_named(file)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(
            f"{file}: nested too deeply to be a recipe: expected keys, values and lists of stages"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a mapping of keys to values, found {type(values).__name__}")
    if preset is not None:
        _lay_over(values, overrides or [], preset)
        return values
    for override in overrides or []:
        _apply(values, override)
    return values


def _builtin_named(file: Path) -> Path:
    """The built-in recipe that ``recipes/NAME`` stands for where there is no such file. A bare name may be a user's
    file in another folder, so that it is only named."""
    folder = builtin_recipe("demo.yaml").parent
    known = (folder / file.name).is_file()
    if known and file == Path("recipes", file.name):
        return folder / file.name
    raise FileNotFoundError(
        f"no recipe at {file.absolute()}; those that come with Sparsight are called "
        f"recipes/{file.name if known else 'NAME.yaml'} and lie in {folder}"
    )


_OLD_PRESETS = {"fast": "few-tokens", "balanced": "scale-settled", "quality": "scale"}  # until the next release
_OF_PRESETS = ("bridge", "compressor", "skipper", "position_layout", "places_of", "proportional_attention")


def _lay_over(values: dict[str, Any], overrides: list[str], name: str) -> None:
    """Overrides, then the preset, which splits the last stage as they have left it, then again overrides of keys that
    it has replaced, and those of its own stage. Numbers are those of the recipe's own stages."""
    again = []
    for override in overrides:
        _, stage, key = (*override.partition("=")[0].split(".", 2), "", "")[:3]
        if override.startswith("stages.settle."):
            again.append(override)
            continue
        _apply(values, override)
        if override.startswith("stages.") and key.partition(".")[0] in _OF_PRESETS:
            number = _number(values["stages"], stage, override)  # a later override may rename the stage
            again.append(f"stages.{number}.{override.removeprefix(f'stages.{stage}.')}")
    if name in _OLD_PRESETS:
        warn_renamed(f"--preset {name}", _OLD_PRESETS[name])
        name = _OLD_PRESETS[name]
    presets = yaml.safe_load(builtin_recipe("presets.yaml").read_text(encoding="utf-8"))
    if name not in presets:
        raise UserError(f"--preset {name}: expected one of {', '.join(presets)}")
    preset, stages, settle = presets[name], values.get("stages"), None
    if not isinstance(stages, list) or len(stages) < 2 or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"--preset {name}: expected a recipe of two stages or more: it scales between them")
    last, whole = stages[-1], stages[-1].get("samples")
    # A wrong number of samples is told when the recipe is read.
    if isinstance(whole, int) and (samples := int(preset.get("settle", 0) * whole)):
        settle = deepcopy(last) | {"name": "settle", "samples": samples, "schedule": "constant_with_warmup"}
        last["samples"] = whole - samples
        stages.append(settle)  # at the end for now, so that numbers stay
    # Scaling does not change a bridge's width and the like: all take them from the first stage that gives any.
    bridges = [stage["bridge"] for stage in stages if isinstance(stage.get("bridge"), dict)]
    sizes = [{key: bridge[key] for key in WindowedSettings.model_fields.keys() & bridge.keys()} for bridge in bridges]
    kept = next(filter(None, sizes), {})
    for stage in stages:
        new = preset["late" if stage is last else "early"]
        for key in _OF_PRESETS:
            stage.pop(key, None)
        stage |= new | {"bridge": kept | new["bridge"], "proportional_attention": stage is settle}
    for override in again:
        _apply(values, override)
    if settle is not None:
        stages.insert(-1, stages.pop())


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': expected key=value, such as seed=1")
    *path, last = key.split(".")
    node: Any = values
    for index, part in enumerate(path):
        if isinstance(node, list):
            node = node[_number(node, part, override)]
        elif isinstance(node, dict):
            node[part] = {} if node.get(part) is None else spelled_out(node[part]) if part == "bridge" else node[part]
            node = node[part]
        else:
            raise UserError(f"override '{override}': '{'.'.join(path[:index])}' is not a mapping, found {node!r}")
    if not isinstance(node, dict):
        raise UserError(f"override '{override}': '{'.'.join(path)}' is not a mapping, found {type(node).__name__}")
    for names in RENAMED.items():
        if last in names:  # it takes the place of either
            node.pop(names[last == names[0]], None)
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"override '{override}': not valid YAML: {error}") from None


def _number(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise UserError(f"override '{override}': no item '{part}'; there are {[name for name in names if name]}")
