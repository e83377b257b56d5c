"""``sparsight train --engine``: writes accelerate's configuration, and becomes its launcher."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from sparsight.errors import UserError

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
_MACHINE: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0}
_FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # checkpoints by all ranks, for any number of them
    "fsdp_cpu_ram_efficient_loading": False,  # it would leave out buffers
}

_FROM_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def launch(engine: str, ranks: int | None, out: Path, arguments: Sequence[str]) -> NoReturn:
    """Become the launcher of ``sparsight train ARGUMENTS`` on several ranks. Its configuration lies beside ``out``, for
    machines that are to join by `accelerate launch`.

    Raises:
        UserError: there is no such engine, it needs GPUs, or a launcher has started this process.
    """
    gpus = torch.cuda.device_count()
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if "LOCAL_RANK" in os.environ:
        raise UserError(f"--engine {engine} starts the ranks itself, and a launcher has done so: leave one of them out")
    ranks = ranks or gpus
    if not ranks or (engine == "fsdp2" and not gpus):
        need = "accelerate shards on GPUs alone" if engine == "fsdp2" else "say how many ranks there are to be: --ranks"
        raise UserError(f"--engine {engine}: this machine shows no GPU; {need}")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    if engine != "ddp":
        file = write_config(engine, ranks, out)
        command = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    os.execv(sys.executable, [sys.executable, *command, "-m", "sparsight", "train", *arguments])


def write_config(engine: str, ranks: int, out: Path) -> Path:
    """Accelerate's configuration for an engine, as ``OUT-ENGINE.yaml``."""
    file, values = out.with_name(f"{out.name}-{engine}.yaml"), _MACHINE | {"num_processes": ranks}
    file.parent.mkdir(parents=True, exist_ok=True)
    if engine == "fsdp2":
        values |= {"distributed_type": "FSDP", "fsdp_config": _FSDP2}
    else:
        settings = file.with_suffix(".json")
        zero = {"zero_optimization": {"stage": int(engine[-1])}} | dict.fromkeys(_FROM_RECIPE, "auto")
        settings.write_text(json.dumps(zero, indent=2), encoding="utf-8")
        deepspeed = {"deepspeed_config_file": str(settings.absolute()), "zero3_init_flag": False}
        values |= {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file
