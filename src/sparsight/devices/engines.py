"""Engines that shard a model over ranks, as accelerate starts them: which one it is, and the model whole again."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparsight.devices.ranks import is_shard, several_ranks
from sparsight.errors import UserError

_CUTS = "it cuts the sequence before images are put into it: use fsdp2 or zero3"
_OTHERS = {
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it trains models of its own: use fsdp2 or zero3"),
    "PARALLELISM_CONFIG_TP_SIZE": ("tensor parallelism", "its Trainer cannot resume: use fsdp2 or zero3"),
    "PARALLELISM_CONFIG_CP_SIZE": ("context parallelism", _CUTS),
    "PARALLELISM_CONFIG_SP_SIZE": ("sequence parallelism", _CUTS),
}
WHY_REFUSED = dict(_OTHERS.values())


def engine() -> str:
    """What accelerate's launcher has said in the environment: ``fsdp1``, ``fsdp2``, ``zero0`` to ``zero3``, the name of
    another one; or ``ddp``, where weights are whole."""

    def says(name: str) -> bool:
        return os.environ.get(name, "").lower() not in ("", "0", "false", *(["1"] if name.endswith("_SIZE") else []))

    if other := [name for variable, (name, _) in _OTHERS.items() if says(variable)]:
        return other[0]
    if says("ACCELERATE_USE_FSDP"):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    if says("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"zero{deepspeed_config().get('zero_optimization', {}).get('stage', stage)}"
    return "ddp"


def deepspeed_config() -> dict[str, Any]:
    """DeepSpeed's own configuration, where the launcher was given one."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return {} if file == "none" else dict(json.loads(Path(file).read_text(encoding="utf-8")))


@contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif is_shard(parameter):
        with importlib.import_module("deepspeed").zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


def check_resumed(checkpoint: Path) -> None:
    """Raises UserError if this engine on this number of ranks cannot go on from a checkpoint."""
    shards, now, ranks = len(list(checkpoint.glob("global_step*/*optim_states.pt"))), engine(), 1
    before = "zero" if shards else "fsdp" if any(checkpoint.glob("pytorch_model_fsdp*")) else "ddp"
    if several_ranks():
        ranks = torch.distributed.get_world_size()
    if not now.startswith(before):
        raise UserError(f"{checkpoint} was written by {before}, and cannot be read by {now}: resume with {before}")
    if shards not in (0, ranks):
        raise UserError(
            f"{checkpoint} holds ZeRO's shards of {shards} ranks, and this is {ranks}: resume with {shards}"
        )


def settle_bf16(state: AcceleratorState, precision: str) -> None:
    """Weights that train are fp32 whatever the ``precision``, as with DDP, and so are the sums of gradients."""
    if precision == "bf16" and engine() == "fsdp2":
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    elif precision == "bf16" and engine() != "ddp":
        state.deepspeed_plugin.deepspeed_config |= {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def make_whole(model: nn.Module, keep: bool) -> None:
    """Gather a sharded model, one parameter after the other, in place: whole on the CPU of ranks that ``keep`` it, and
    empty on others. All ranks call this together. The engine's hooks stay: the model can be saved, and not run."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay so
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                with _gathered(parameter) as full:
                    copy = full.detach().to("cpu" if keep else "meta", copy=True)
                made[parameter] = nn.Parameter(copy, parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.cpu()
    unset_hf_deepspeed_config()  # else transformers would load the next model in shards
