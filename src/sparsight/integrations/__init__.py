"""Plug-ins of trainers; each makes `SparsightCallback` from the settings that its trainer hands over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sparsight.errors import UserError
from sparsight.settings.methods import CallbackConfig
from sparsight.sparse.callback import SparsightCallback


def callback_from(settings: Mapping[str, Any] | str, where: str = "sparsight") -> SparsightCallback:
    """A callback that attaches by itself, from the keys of a recipe: ``compressor: {keep: 0.25}``, ``skipper``,
    ``seed`` and ``dense_probe``.

    Args:
        settings: a mapping, or the same as YAML; so may each of its values be.
        where: names the settings in errors, as the file or the arguments that they come from.

    Raises:
        UserError: a key or value is wrong; the message names it.
    """
    values = _plain(settings, where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected settings as compressor: {{keep: 0.25}}; found {settings!r}")
    read = CallbackConfig.read({key: _plain(value, f"{where}.{key}") for key, value in values.items()}, where)
    return SparsightCallback(**{key: getattr(read, key) for key in CallbackConfig.model_fields})


def _plain(value: Any, where: str) -> Any:
    """Text as what it says in YAML; any mapping as a dict."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{where}: {value!r} is not YAML: {error}") from None
    return dict(value) if isinstance(value, Mapping) else value
