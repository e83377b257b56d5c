"""Engines that shard a model over ranks, as accelerate starts them: which one it is, and the model whole again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn
from torch.distributed.tensor import DTensor

_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
}


def engine() -> str:
    """What accelerate's launcher has said in the environment: ``fsdp1``, ``fsdp2``, ``zero0`` to ``zero3``, the name of
    another one; or ``ddp``, where weights are whole."""

    def says(name: str) -> bool:
        return os.environ.get(name, "").lower() not in ("", "0", "false", *(["1"] if name.endswith("_SIZE") else []))

    if other := [name for variable, name in _REFUSED.items() if says(variable)]:
        return other[0]
    if says("ACCELERATE_USE_FSDP"):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    if says("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if (file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
            stage = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
        return f"zero{stage}"
    return "ddp"


def make_whole(model: nn.Module, keep: bool) -> None:
    """Gather a sharded model, one parameter after the other, in place: whole on the CPU of ranks that ``keep`` it, and
    empty on others. All ranks call this together. The engine's hooks stay: the model can be saved, and not run."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay so
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                made[parameter] = nn.Parameter(full.detach().to("cpu" if keep else "meta"), parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.cpu()
