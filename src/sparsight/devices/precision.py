"""The device that is used, its name and the precision that it is fast in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from sparsight.devices.peaks import cpu_bf16, cpu_name


def forked_rng() -> AbstractContextManager[None]:
    """`torch.random.fork_rng` for the devices that are in use, of which it would warn at length."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """As its maker calls it; of a CPU also the number of threads, as its peak is theirs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def fast_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16, and does not emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_bf16())


def precision_on(device: torch.device, precision: str) -> str:
    """bf16 or fp32: what ``auto`` is on this device, others as they are."""
    return precision if precision != "auto" else "bf16" if fast_bf16(device) else "fp32"
