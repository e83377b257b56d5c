"""The trainable parts of a stage. One function decides, and its decision is printed."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sparsight.bridges.windowed import Matrix
from sparsight.devices.precision import forked_rng
from sparsight.errors import UserError
from sparsight.modeling import SparsightForConditionalGeneration
from sparsight.modeling.quantised import count
from sparsight.settings.recipe import Lora, Stage

PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "bridge": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    return next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))


def select_trainable(model: SparsightForConditionalGeneration, stage: Stage) -> dict[str, tuple[int, int]]:
    """Switch gradients on for what trains in this stage, and off for all else. With LoRA, only its adapters train in
    the language model.

    Trainable weights are fp32 from now on, also where it was stored in 16 bits: most updates are too small for those.

    Returns:
        Part -> how many of its parameters train, and how many it has.
    """
    rates, adapters = stage.learning_rate.parts(), stage.lora is not None
    for part in rates:
        for prefix in PARTS[part] if part != "language" or not adapters else ():
            model.get_submodule(prefix.rstrip(".")).float()  # with its buffers
    trainable, total = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        part, adapter = part_of(name), ".lora_" in name
        trains = part in rates and (adapter or part != "language" or not adapters)
        parameter.requires_grad_(trains)
        if adapter:
            parameter.data = parameter.data.float()
        trainable[part] += count(parameter) * trains
        total[part] += count(parameter)
    return {part: (trainable[part], total[part]) for part in PARTS}


def parameter_groups(model: nn.Module, stage: Stage, by_layer: bool = False) -> list[dict[str, Any]]:
    """Optimizer groups: one for each part, with its learning rate; vectors (norms, biases) are not decayed. With
    ``by_layer``, each of the language model's layers has its own, for `LayerwiseAdamW`.

    With Muon, the weights of linear maps are in groups that say ``muon``; without the output layer and adapters, as
    Muon is for full matrices between layers.
    """
    rates = stage.learning_rate.parts()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Matrix) and ".lora_" not in name and module.weight is not head.weight
    }
    groups: dict[tuple[str, bool, bool, int | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = stage.optimizer == "muon" and parameter in linear
            layer = re.search(r"^model\.language_model\.layers\.(\d+)\.", name) if by_layer else None
            of = part_of(name), parameter.ndim >= 2, inside, layer and int(layer[1])
            groups.setdefault(of, []).append(parameter)
    return [
        {"params": params, "lr": rates[part], "weight_decay": stage.weight_decay if decays else 0.0}
        | {"part": part, "muon": inside}
        | ({"layer": layer, "skipped": False} if by_layer else {})
        for (part, decays, inside, layer), params in groups.items()
    ]


def add_lora(model: SparsightForConditionalGeneration, lora: Lora | None, seed: int, keep: bool = False) -> Any:
    """Put adapters on linear maps of the language model's layers, and nowhere else. Undone by `merge_lora`, unless
    they are to ``keep``; those of an earlier stage go on.

    Raises:
        UserError: there is no linear map of a name in ``lora.targets``.
    """
    if lora is None or getattr(model, "_hf_peft_config_loaded", False):
        return None
    from peft import LoraConfig, LoraModel

    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in inside if name.startswith("model.language_model.")]
    named = {name.rpartition(".")[2] for name in inside}
    if lacks := set(lora.targets or ()) - named:
        raise UserError(f"lora.targets: the language model has no {sorted(lacks)}; its linear maps are {sorted(named)}")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[name for name in inside if name.rpartition(".")[2] in (lora.targets or named)],
        use_rslora=lora.scaling == "rslora",
    )
    with forked_rng():
        torch.manual_seed(seed)
        adapted = LoraModel(model, config, "default")
    model._hf_peft_config_loaded = keep  # as after transformers' own `add_adapter`: it saves them apart
    return None if keep else adapted


def narrow_adapters(model: nn.Module, stage: Stage, bf16: bool) -> AbstractContextManager[None]:
    """Within, and under autocast, adapters take bf16 as it comes: peft would widen it to their own weights' fp32, for
    autocast to narrow it again. The bits are the same, but for what dropout draws."""
    if stage.lora is None or not bf16:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)


def merge_lora(lora: Any) -> None:
    """Fold the adapters into the weights: the model is an ordinary one again."""
    if lora is not None:
        lora.merge_and_unload()
