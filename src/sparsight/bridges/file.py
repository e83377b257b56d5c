"""A bridge alone in a file: whole, also where ranks hold shards of its weights (FSDP version 2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from sparsight.devices.ranks import several_ranks
from sparsight.errors import UserError
from sparsight.settings.bridges import bridge_settings


def save_bridge(model: Any, file: str | Path) -> None:
    """Write the bridge of a composed model, and its settings, as one safetensors file.

    Where weights are sharded, all ranks call this together, and the first one writes.

    Raises:
        UserError: the model has no bridge.
    """
    file, (bridge, settings) = Path(file), _bridge_of(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(bridge, options=options)
    if state:  # the first rank's alone
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file, metadata={"format": "pt", "bridge": json.dumps(settings)})
    if several_ranks():
        torch.distributed.barrier()


def load_bridge(model: Any, file: str | Path) -> None:
    """Give a composed model the bridge of `save_bridge`, in place, sharded as the model's own is.

    Raises:
        UserError: ``file`` holds no bridge, one with other settings, or one for another encoder or language model.
    """
    bridge, settings = _bridge_of(model)
    with safe_open(Path(file), framework="pt") as tensors:
        found = json.loads((tensors.metadata() or {}).get("bridge", "null"))
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    if found != settings:
        raise UserError(f"{file} holds the bridge {found}, and the model's is {settings}: expected the same")
    own = bridge.state_dict()
    if other := [n for n in own.keys() | state if n not in own or n not in state or own[n].shape != state[n].shape]:
        shapes = {n: [tuple(each[n].shape) if n in each else None for each in (own, state)] for n in sorted(other)[:3]}
        raise UserError(f"{file} is for another encoder or language model, these differ (model, file): {shapes}")
    set_model_state_dict(bridge, state, options=StateDictOptions(full_state_dict=True))


def _bridge_of(model: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    bridge = getattr(getattr(model, "model", None), "multi_modal_projector", None)
    settings = getattr(getattr(model, "config", None), "bridge_config", None)
    if bridge is None or settings is None:
        raise UserError(f"{type(model).__name__} has no bridge of Sparsight's; expected a model of `sparsight.build`")
    return bridge, bridge_settings(settings).model_dump(mode="json")
