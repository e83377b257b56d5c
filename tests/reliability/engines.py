"""Whole runs of two stages on two ranks, under an engine of accelerate, run by test_engines.py.

engines.py FOLDER OUT CASE,CASE [resume] [watch]: each case's recipe, from the encoder in FOLDER, trained in OUT/CASE;
or OUT/CASE.refused says why not. With ``watch``, OUT/watched-RANK.json says what each step did to each layer. The
engine is in the environment, as `accelerate launch` says it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from sharded import pretend

from small_runs import FINER, quiet, recipe_values, save_encoder, stage_values
from sparsight.devices.ranks import leave
from sparsight.errors import UserError
from sparsight.pipeline import run
from sparsight.settings.recipe import Recipe
from sparsight.training import trainer
from tiny import make_image

LORA = {"rank": 4, "dropout": 0.0}
VISION = {"vision": 1e-3, "bridge": 2e-3, "language": 1e-3}
SKIPPER = {"alpha": 0.5, "epsilon": 0.5, "schedule": "constant"}
SPLIT = SKIPPER | {"tokens": "visual"}
PACKING = {"packing": True, "pack_length": 192}
# What both stages are given.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "encoder": {"learning_rate": VISION},
    "lora": {"lora": LORA},
    "adapters": {"lora": LORA | {"keep": True}},
    "compressor": {"compressor": {"keep": 0.5}},
    "skipper": {"skipper": SKIPPER, "max_grad_norm": 0.05},  # a norm that counts what it should not would show
    "packing": PACKING,
    "checkpointing": {"gradient_checkpointing": True},
    "cached": {"cache_features": True},
    "muon": {"optimizer": "muon"},
    "text": {},
    "bf16": {},
}
# As the table of docs/engines.md calls them.
SAID = {
    "full": "two stages, tokens scaled in between, all trained but the encoder",
    "encoder": "the encoder trains, too",
    "lora": "LoRA, merged between stages",
    "adapters": "LoRA, adapters kept",
    "compressor": "compressor",
    "skipper": "skipper",
    "packing": "packing",
    "checkpointing": "activation checkpointing",
    "cached": "cached features",
    "text": "conversations without an image",
    "muon": "Muon",
    "bf16": "bf16",
    "resume": "resumed from a checkpoint",
}
# Much at once, so that few runs see it.
MIXED = (
    {"learning_rate": VISION, "gradient_checkpointing": True, "skipper": SKIPPER, "compressor": {"keep": 0.5}}
    | {"max_grad_norm": 0.05},
    {"lora": LORA, "skipper": SPLIT} | PACKING,
)
SPLIT_LORA = {"lora": LORA, "skipper": SPLIT, "max_grad_norm": 0.05}
# Without the encoder: beyond one process, weights of it that nothing reaches get gradients of zero, and decay.
DECAYED: tuple[dict[str, Any], ...] = ({"skipper": SKIPPER, "weight_decay": 0.5}, {})


def recipe(folder: Path, case: str) -> Recipe:
    """Few visual tokens, then more of them: tokens are scaled in between; four steps each, a checkpoint every two."""
    first, second = {"mixed": MIXED, "decayed": DECAYED, "split": (SPLIT_LORA,) * 2}.get(case) or (CASES[case],) * 2
    more: dict[str, Any] = {}
    if case == "text":  # half of the conversations have no image, so that a rank has none
        more["data"] = {"kind": "json", "path": str(folder / "text.json")}
    if case == "bf16":
        more["precision"] = "bf16"
    stages = [stage_values(checkpoints=2, **first), stage_values("finetune", bridge=FINER, checkpoints=2, **second)]
    values = {"stages": stages, "evaluation": {"kind": "none"}} | more
    return Recipe.model_validate(recipe_values(folder / "encoder", **values))


def prepare(folder: Path) -> None:
    """The encoder, and the conversations of ``text``."""
    save_encoder(folder / "encoder")
    rows = []
    for number in range(32):
        image = [{"image": f"{number}.png"}, {}][number % 2]
        if image:
            make_image(number).save(folder / image["image"])
        asked = "<image>\nRead it." * bool(image) or "Say a number."
        talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It is {number}."}]
        rows.append({"id": str(number), "conversations": talk} | image)
    (folder / "text.json").write_text(json.dumps(rows), encoding="utf-8")


class Watching(trainer._Recorder):
    """Compares each layer's weights and moments, bit by bit, before a step with those behind it."""

    found: list[dict[str, Any]] = []

    def held(self, optimizer: Any) -> list[list[torch.Tensor]]:
        handle = self.trainer.handle
        layers = [] if handle is None else [list(layer.parameters()) for layer in handle.layers]
        flat: list[list[Any]] = [[] for _ in layers]  # DeepSpeed's, of a layer's groups
        for group in optimizer.param_groups:
            if group.get("layer") is not None:
                flat[group["layer"]] += group["params"]
        moments = [
            [optimizer.state.get(p, {}).get("exp_avg") for p in more or own]
            for own, more in zip(layers, flat, strict=True)
        ]
        every = [[*own, *(m for m in more if m is not None)] for own, more in zip(layers, moments, strict=True)]
        return [[getattr(t, "_local_tensor", t).detach().clone() for t in each] for each in every]

    def on_step_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        super().on_step_begin(*args, optimizer=optimizer, **kwargs)
        self.skipped, self.before = getattr(self.trainer.handle, "resting", ()), self.held(optimizer)

    def on_step_end(self, args: Any, state: Any, *more: Any, optimizer: Any, **kwargs: Any) -> None:
        for layer, (was, now) in enumerate(zip(self.before, self.held(optimizer), strict=True)):
            same = [torch.equal(a, b) for a, b in zip(was, now, strict=False)]
            seen = {"skipped": self.skipped[layer], "all": all(same), "held": len(was), "later": len(now)}
            self.found.append({"step": state.global_step, "layer": layer} | seen)
        super().on_step_end(args, state, *more, optimizer=optimizer, **kwargs)


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    if "ACCELERATE_USE_FSDP" in os.environ:
        pretend()
    if "watch" in sys.argv:
        trainer._Recorder = Watching  # type: ignore[misc]
    for case in sys.argv[3].split(","):
        try:
            run(recipe(folder, case), out / case, quiet(), resume="resume" in sys.argv)
        except UserError as error:  # on all ranks
            (out / f"{case}.refused").write_text(str(error), encoding="utf-8")
    if "watch" in sys.argv:
        (out / f"watched-{os.environ['RANK']}.json").write_text(json.dumps(Watching.found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
