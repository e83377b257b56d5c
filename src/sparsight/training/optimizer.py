"""Muon for the matrices inside, AdamW for all else, as one optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sparsight.devices.precision import fast_bf16
from sparsight.errors import UserError

NEWTON_SCHULZ = 3  # iterations; with torch's 5 a step takes longer, and losses fall alike (LOG.md)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups that say ``muon``, AdamW for the others; one optimizer for schedules and checkpoints.

    Muon's updates are scaled to AdamW's size, so both take the same learning rates. Source: Jordan et al., *Muon*; the
    scale: Liu et al., arXiv 2502.16982.

    Raises:
        UserError: this torch has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], **adamw: Any) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optimizer: muon needs torch 2.9 or newer, found {torch.__version__}; take adamw")
        super().__init__(groups, {})
        # Each takes the group's own dictionaries, so a schedule that sets rates here sets them there.
        self.parts: dict[bool, Any] = {}
        if muon := self._groups(True):  # none where adapters alone train
            self.parts[True] = torch.optim.Muon(muon, ns_steps=NEWTON_SCHULZ, adjust_lr_fn="match_rms_adamw")
        if others := self._groups(False):
            self.parts[False] = torch.optim.AdamW(others, **adamw)

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with nullcontext() if fast_bf16(self.param_groups[0]["params"][0].device) else _Float32():
            for muon, part in self.parts.items():
                part.state, part.param_groups = self.state, self._groups(muon)  # a checkpoint brings new ones
                part.step()


class LayerwiseAdamW(torch.optim.AdamW):
    """AdamW that leaves groups alone which say ``skipped``: their weights, moments and step counts. DeepSpeed makes one
    flat tensor of a group and steps them one by one, so a layer with a group of its own can be skipped (ours)."""

    def step(self, closure: Any = None) -> Any:
        every = self.param_groups
        self.param_groups = [group for group in every if not group["skipped"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = every


class _Float32(TorchFunctionMode):
    """Casts to bf16 stay fp32: torch's Muon iterates in bf16, which takes twenty times as long where it is emulated."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.bfloat16:
            return args[0].float().clone()  # a copy, as it would be: Muon goes on in place
        return function(*args, **(kwargs or {}))


def optimizer_flops(optimizer: torch.optim.Optimizer) -> float:
    """FLOPs of Muon's Newton-Schulz iterations in one step, over the matrices that have a gradient."""
    muon = [parameter for group in optimizer.param_groups if group.get("muon") for parameter in group["params"]]
    shapes = [sorted(parameter.shape) for parameter in muon if parameter.grad is not None]
    return float(sum(NEWTON_SCHULZ * (4 * m * m * n + 2 * m**3) for m, n in shapes))
