"""What trains and never gets a gradient: it takes the optimizer's memory, and weight decay shrinks it."""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from sparsight.sparse.attach import SparseHandle

AFTER = 50  # steps, or the stage's last one
NAMED = 3  # parameters of a part


class _Log(Protocol):
    def write(self, type: str, **fields: Any) -> None: ...


def idle_parameters(optimizer: Any) -> set[nn.Parameter]:
    """Parameters that no gradient but zero has reached, on any rank: gradients, hence moments, are the same on all.

    The optimizer's moments tell. Gradients do not: what a batch leaves out is given zeros (`distributed.touched`).
    """
    idle = set()
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = [moment for key, moment in optimizer.state.get(parameter, {}).items() if key != "step"]
        if not any(bool(moment.any()) for moment in moments):
            idle.add(parameter)
    return idle


def describe_idle(model: nn.Module, optimizer: Any, handle: SparseHandle | None = None) -> str:
    """The parameters that train without a gradient, by part, and what to do; empty if there are none.

    Left out is what is idle for another reason than the data: blocks of the encoder behind its last feature level,
    layers that a skipper may have had off all the time, and LoRA's first factors, which wait for the second to move.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = handle.layers if handle is not None and handle.skipper is not None else []
    skipped = {parameter for layer in layers for parameter in layer.parameters()}
    idle, trained = idle_parameters(optimizer), dict[str, list[nn.Parameter]]()
    for group in optimizer.param_groups:
        known = [p for p in group["params"] if p in names and p not in skipped and ".lora_A." not in names[p]]
        trained.setdefault(group["part"], []).extend(known)
    told, whole = [], []
    for part, parameters in trained.items():
        found = [names[parameter] for parameter in parameters if parameter in idle]
        if len(found) == len(parameters) > 0:
            whole.append(f"learning_rate.{part}")
        elif not found or part == "vision":  # a image has reached it: the others are behind the last level
            continue
        some = ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")
        told.append(f"{part}: {len(found)} of {len(parameters)} ({some})")
    if not told:
        return ""
    advice = f" If this data is to have no images, leave out {' and '.join(whole)}: that freezes them." if whole else ""
    return (
        f"parameters that train have had no gradient: {'; '.join(told)}. They take the optimizer's memory, and weight "
        f"decay shrinks them.{advice}"
    )


class IdleWarning(TrainerCallback):
    """Tells, once in a stage, on the terminal and in the run log, what trains without a gradient."""

    def __init__(
        self, model: nn.Module, stage: str, log: _Log, console: Console, handle: SparseHandle | None = None
    ) -> None:
        self.model, self.stage, self.log, self.console, self.handle = model, stage, log, console, handle

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step != min(AFTER, state.max_steps):
            return
        if text := describe_idle(self.model, kwargs["optimizer"], self.handle):
            text = f"stage '{self.stage}', after {state.global_step} steps: {text}"
            self.console.print(Text(text, style="yellow"))
            self.log.write("note", stage=self.stage, text=text)
