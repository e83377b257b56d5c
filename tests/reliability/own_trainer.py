"""transformers' own Trainer on two ranks, under an engine that knows no layers; run by test_engines.py.

own_trainer.py OUT ENGINE: a tiny LLaVA, text through skipped layers; the weights behind it in OUT/ENGINE.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from families import made
from killed import COMMON, Images
from sharded import FSDP, NAME, pretend
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

from sparsight.devices.ranks import leave
from sparsight.settings.methods import SkipperConfig
from sparsight.sparse.callback import SparsightCallback

SKIPPER = SkipperConfig(alpha=0.5, epsilon=0.5, schedule="constant", tokens="visual")
BATCH = {"max_steps": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 0.05, "save_strategy": "no"}
# Gradients that are rounding alone, as those of keys' biases, move nothing; nor does decay what no gradient reaches.
BATCH |= {"adam_epsilon": 1e-4, "weight_decay": 0.0}


def settings(engine: str) -> dict[str, Any]:
    if engine == "fsdp1":
        flat = {"version": 1, "use_orig_params": True, "sync_module_states": False}
        return {"fsdp": True, "fsdp_config": FSDP | flat}
    zero = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
    ours = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"deepspeed": {"zero_optimization": zero} | dict.fromkeys(ours, "auto")}


def trained(out: Path, engine: str | None = None) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights at the end, and what the callback logged."""
    model = made(NAME)
    given = COMMON | BATCH | {"per_device_train_batch_size": 2 if engine else 4}
    arguments = TrainingArguments(str(out), **given | (settings(engine) if engine else {}))
    callbacks = [SparsightCallback(skipper=SKIPPER, seed=3)]
    trainer = Trainer(model, arguments, train_dataset=Images(NAME, model), callbacks=callbacks)
    trainer.train()
    whole = trainer.model_wrapped
    if not isinstance(whole, FullyShardedDataParallel):
        return trainer.accelerator.get_state_dict(whole), trainer.state.log_history
    with FullyShardedDataParallel.summon_full_params(whole, writeback=False):
        found = {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in whole.named_parameters()}
    return found, trainer.state.log_history


def main() -> None:
    out, engine = Path(sys.argv[1]), sys.argv[2]
    pretend()
    # FSDP version 1 takes accelerate's cpu:0 for another device than cpu.
    plain, cpu = FullyShardedDataParallel.__init__, {"device_id": torch.device("cpu")}
    FullyShardedDataParallel.__init__ = lambda *args, **kwargs: plain(*args, **kwargs | cpu)  # type: ignore[method-assign]
    found = trained(out / engine, engine)
    if torch.distributed.get_rank() == 0:
        torch.save(found, out / f"{engine}.pt")
    leave()


if __name__ == "__main__":
    main()
