"""Sparsight in Axolotl: its class in ``plugins``, its settings under ``sparsight``. Only Axolotl loads this module.

plugins: [sparsight.integrations.axolotl.SparsightPlugin]
sparsight: {compressor: {keep: 0.25}, skipper: {alpha: 0.6}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, field_validator

from sparsight.errors import UserError
from sparsight.integrations import callback_from
from sparsight.sparse.callback import SparsightCallback

try:
    from axolotl.integrations.base import BasePlugin
except ModuleNotFoundError:  # our own tests, where Axolotl is not installed
    BasePlugin = object

# Axolotl's key -> the values that are fine, and why others are not.
_REFUSED = {
    "sample_packing": "several samples in one row: the compressor would shorten the row under its boundaries",
    "context_parallel_size": "each rank holds a part of the sequence, and does not see which visual tokens stay",
    "sequence_parallel_degree": "each rank holds a part of the sequence, and does not see which visual tokens stay",
}


class SparsightArgs(BaseModel):
    """What Axolotl's schema gets: ``sparsight``, with the keys of `callback_from`.

    Raises:
        pydantic.ValidationError: it is absent, or a key or value in it is wrong.
    """

    sparsight: dict[str, Any]

    @field_validator("sparsight")
    @classmethod
    def _check(cls, value: dict[str, Any]) -> dict[str, Any]:
        callback_from(value)
        return value


class SparsightPlugin(BasePlugin):
    """Gives the trainer a callback that attaches when training begins."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SparsightArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Mapping[str, Any], model: Any) -> list[SparsightCallback]:
        """Before the trainer exists, for the callback to stand before those that print.

        Raises:
            UserError: the run splits or packs sequences, which the compressor cannot shorten then.
        """
        callback = callback_from(cfg["sparsight"])
        compresses = callback.settings()["compressor"] is not None
        for key, why in _REFUSED.items():
            if compresses and int(cfg.get(key) or 0) > (key != "sample_packing"):
                raise UserError(
                    f"sparsight.compressor cannot work with {key}: {cfg[key]} ({why}); leave one of them out"
                )
        return [callback]
