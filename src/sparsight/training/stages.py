"""What trains in a stage, and how a model enters it. One function decides, and its decision is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsight.devices.precision import forked_rng
from sparsight.modeling import SparsightForConditionalGeneration
from sparsight.settings.recipe import Stage

PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "bridge": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}


@dataclass(frozen=True)
class PartPlan:
    """One part in one stage; counts are numbers of parameters."""

    part: str
    trainable: int
    total: int
    learning_rate: float | None
    lora: bool


def trainable_prefixes(stage: Stage) -> dict[str, tuple[str, ...]]:
    """Part -> prefixes of the parameters that train in this stage. With LoRA, only its adapters do there."""
    return {part: PARTS[part] for part in stage.learning_rate.parts()}


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    raise AssertionError(f"parameter '{name}' belongs to no part")


def select_trainable(model: SparsightForConditionalGeneration, stage: Stage) -> list[PartPlan]:
    """Switch gradients on for what trains in this stage, and off for all else.

    What trains is fp32 from now on, also where it was stored in 16 bits: most updates are too small for those.

    Returns:
        The plan, part by part, for the run log and the terminal.
    """
    prefixes = trainable_prefixes(stage)
    for module in (prefix.rstrip(".") for part in prefixes for prefix in prefixes[part]):
        if stage.lora is None or module not in ("model.language_model", "lm_head"):
            model.get_submodule(module).float()  # with its buffers
    counts: dict[str, list[int]] = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        adapter = ".lora_" in name
        trains = part in prefixes and (adapter or not (part == "language" and stage.lora is not None))
        parameter.requires_grad_(trains)
        if adapter:
            parameter.data = parameter.data.float()
        counts[part][0] += parameter.numel() * trains
        counts[part][1] += parameter.numel()
    rates = stage.learning_rate.parts()
    return [
        PartPlan(part, counts[part][0], counts[part][1], rates.get(part), part == "language" and stage.lora is not None)
        for part in PARTS
    ]


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Optimizer groups: one for each part, with its learning rate; vectors (norms, biases) are not decayed.

    With Muon, the weights of linear maps are in groups that say ``muon``; without the output layer and adapters, as
    Muon is for full matrices between layers.
    """
    rates = stage.learning_rate.parts()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and module.weight is not head.weight
    }
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = stage.optimizer == "muon" and parameter in linear
            groups.setdefault((part_of(name), parameter.ndim >= 2, inside), []).append(parameter)
    return [
        {"params": params, "lr": rates[part], "weight_decay": stage.weight_decay if decays else 0.0}
        | {"part": part, "muon": inside}
        for (part, decays, inside), params in groups.items()
    ]


def add_lora(model: SparsightForConditionalGeneration, stage: Stage, seed: int) -> Any:
    """Put adapters on all linear maps of the language model, and nowhere else. Undone by `merge_lora`."""
    from peft import LoraConfig, LoraModel

    if stage.lora is None:
        return None
    config = LoraConfig(
        r=stage.lora.rank,
        lora_alpha=stage.lora.alpha,
        lora_dropout=stage.lora.dropout,
        target_modules=[
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("model.language_model.")
        ],
    )
    with forked_rng():
        torch.manual_seed(seed)
        return LoraModel(model, config, "default")


def merge_lora(lora: Any) -> None:
    """Fold the adapters into the weights: the model is an ordinary one again."""
    if lora is not None:
        lora.merge_and_unload()
