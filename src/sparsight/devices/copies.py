"""Copies between host and device that seldom let the host wait: while it does, the device's queue runs dry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def may_overlap(device: torch.device) -> bool:
    """Whether the host may go on while a copy to the device, or from it, is under way; else it reads too early."""
    return device.type not in ("mps", "xpu")


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device; the host goes on at once."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=may_overlap(device))


class Sent:
    """A small tensor on its way to the host; only ``read`` waits for it, and for nothing that was asked for later."""

    def __init__(self, tensor: torch.Tensor) -> None:
        on_gpu = tensor.is_cuda
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self.copy.copy_(tensor, non_blocking=may_overlap(tensor.device))
        self.event = torch.cuda.Event() if on_gpu else None
        if self.event is not None:
            self.event.record()

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.copy.tolist()


class Host:
    """Integer tensors as arrays on the host: called with one of ``batch``'s, all of these come over in one copy.

    Args:
        batch: tensors that are likely to be asked for, by name.
        known: the same, as the host has them already.
    """

    def __init__(self, batch: Mapping[str, Any] | None = None, known: Mapping[str, Any] | None = None) -> None:
        self.known, self.arrays, self.held = known or {}, dict[int, np.ndarray](), list[torch.Tensor]()
        self.due = []
        for name, tensor in (batch or {}).items():
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                if (same := self.known.get(name)) is not None and same.shape == tensor.shape:
                    self._hold(tensor, same.numpy())
                else:
                    self.due.append(tensor)

    def _hold(self, tensor: torch.Tensor, array: np.ndarray) -> None:
        self.arrays[id(tensor)] = array
        self.held.append(tensor)  # else another one could get its id

    def __call__(self, tensor: torch.Tensor) -> np.ndarray:
        if id(tensor) not in self.arrays:
            due = self.due if any(each is tensor for each in self.due) else [tensor]
            self.due = [] if due is self.due else self.due
            for each, array in zip(due, _together(due), strict=True):
                self._hold(each, array)
        return self.arrays[id(tensor)]


def _together(tensors: list[torch.Tensor]) -> Iterable[np.ndarray]:
    """Tensors of one device in one copy."""
    if len(tensors) == 1 or any(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.cpu().numpy() for tensor in tensors]
    flat = torch.cat([tensor.flatten().long() for tensor in tensors]).cpu().numpy()
    parts = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
