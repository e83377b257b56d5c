"""Trainable parameters whose gradients are zero in every step: they take memory, and weight decay shrinks them."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsight.sparse.attach import SparseHandle

AFTER = 50  # steps, or the stage's last one
NAMED = 3  # parameters of a part


def _idle_parameters(optimizer: Any) -> set[nn.Parameter]:
    """Parameters that no gradient but zero has reached on any rank, as the optimizer's moments tell. Gradients would
    not: parameters that a batch leaves out are given zeros (`ranks.touched`)."""
    idle = set()
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = [moment for key, moment in optimizer.state.get(parameter, {}).items() if key != "step"]
        if not any(bool(moment.any()) for moment in moments):
            idle.add(parameter)
    return idle


def describe_idle(model: nn.Module, optimizer: Any, handle: SparseHandle | None = None) -> str:
    """The parameters that train without a gradient, by part, and what to do; empty if there are none.

    Left out are parameters that are idle for another reason than the data: blocks of the encoder behind its last
    feature level, layers that a skipper may have skipped all the time, and LoRA's first factors, which wait for the
    second to move.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = handle.layers if handle is not None and handle.skipper is not None else []
    skipped = {parameter for layer in layers for parameter in layer.parameters()}
    idle, trained = _idle_parameters(optimizer), dict[str, list[nn.Parameter]]()
    for group in optimizer.param_groups:
        known = [p for p in group["params"] if p in names and p not in skipped and ".lora_A." not in names[p]]
        trained.setdefault(group["part"], []).extend(known)
    parts, whole = [], []
    for part, parameters in trained.items():
        found = [names[parameter] for parameter in parameters if parameter in idle]
        if len(found) == len(parameters) > 0:
            whole.append(f"learning_rate.{part}")
        elif not found or part == "vision":  # an image has reached it: the others are behind the last level
            continue
        some = ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")
        parts.append(f"{part}: {len(found)} of {len(parameters)} ({some})")
    if not parts:
        return ""
    advice = f" If this data is to have no images, leave out {' and '.join(whole)}: that freezes them." if whole else ""
    return (
        f"parameters that train have had no gradient: {'; '.join(parts)}. They take the optimizer's memory, and weight "
        f"decay shrinks them.{advice}"
    )
