"""On two ranks (all_ranks.py) under the Trainer's own FSDP2: a run, and the same resumed from its middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from families import made
from killed import COMMON, Images
from transformers import Trainer, TrainingArguments

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.callback import SparsightCallback

NAME = "llava, clip + llama"  # saved under other names than the model's
FSDP = {
    "version": 2,
    "state_dict_type": "FULL_STATE_DICT",  # writes model.safetensors beside FSDP's own file
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def trained(folder: Path, resume: Path | None = None, itself: bool = False) -> dict[str, torch.Tensor]:
    """Parameters at the end; attached by hand, or by the callback itself, behind FSDP2's wrapping."""
    model = made(NAME)
    methods: Any = {"compressor": CompressorConfig(keep=0.25), "skipper": SkipperConfig(alpha=0.6, epsilon=0.3)}
    arguments: dict[str, Any] = COMMON | {"max_steps": 4, "fsdp": True, "fsdp_config": FSDP}
    data = Images(NAME, model)
    methods["seed"] = 3
    callbacks = [SparsightCallback(**methods) if itself else SparsightCallback(attach(model, **methods))]
    trainer = Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return {name: parameter.full_tensor() for name, parameter in trainer.model.named_parameters()}


def pretend() -> None:
    """accelerate shards on accelerators alone: tell it that CPUs are some."""
    plain = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def main(folder: Path, kind: str) -> None:
    pretend()
    whole = trained(folder / "run")
    resumed = trained(folder / "run", folder / "run" / "checkpoint-2")
    itself = trained(folder / "itself", itself=True)
    torch.save([whole, resumed, itself], folder / f"rank{torch.distributed.get_rank()}.pt")
