"""Sparsight in LLaMA-Factory, whose command line takes no callback:

    python -m sparsight.integrations.llamafactory x.yaml learning_rate=1e-5    # else: llamafactory-cli train x.yaml ...
    torchrun --nproc-per-node 8 -m sparsight.integrations.llamafactory x.yaml

The same file and overrides, with one key more: ``sparsight: {compressor: {keep: 0.25}, skipper: {alpha: 0.6}}``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from sparsight.errors import UserError
from sparsight.integrations import callback_from
from sparsight.sparse.callback import SparsightCallback

# LLaMA-Factory's key -> why the compressor or the skipper cannot work with it.
_REFUSED = {
    "packing": "several samples in one row: the compressor would shorten the row under its boundaries",
    "neat_packing": "several samples in one row: the compressor would shorten the row under its boundaries",
    "use_mca": "Megatron builds its own model, which is none of transformers",
    "use_hyper_parallel": "it shards the model by itself, and no callback sees which layers it holds",
}


def take_callback(args: Mapping[str, Any] | list[str]) -> tuple[dict[str, Any], SparsightCallback]:
    """What LLaMA-Factory is to get, and the callback of the key ``sparsight``.

    Raises:
        UserError: no file was given, it has no such key, a setting is wrong, or the run is of a kind that takes none.
    """
    if not isinstance(args, Mapping):
        raise UserError(
            "expected a YAML or JSON file of LLaMA-Factory with a key 'sparsight', then overrides key=value"
        )
    rest = dict(args)
    if (settings := rest.pop("sparsight", None)) is None:
        raise UserError("no key 'sparsight' in the arguments: add sparsight: {compressor: {keep: 0.25}}")
    if rest.get("stage") == "ppo":
        raise UserError(
            "stage: ppo cannot be trained with sparsight: rollouts see all tokens and layers, the policy not"
        )
    if os.environ.get("USE_V1", "").lower() in ("1", "true", "y"):
        raise UserError("USE_V1: LLaMA-Factory's second trainer takes no callbacks; unset it")
    callback = callback_from(settings)
    for key, why in _REFUSED.items():
        if str(rest.get(key, False)).lower() == "true":
            raise UserError(f"sparsight cannot work with {key}: {rest[key]} ({why}); leave one of them out")
    return rest, callback


def main() -> None:
    """Train as ``llamafactory-cli train`` does, with the callback."""
    try:
        from llamafactory.hparams.parser import read_args
        from llamafactory.train.tuner import run_exp
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: pip install llamafactory") from error
    args, callback = take_callback(read_args())
    run_exp(args, callbacks=[callback])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
