"""The device in use, its name, and the precision that it is fast in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from sparsight.devices.peaks import cpu_bf16, cpu_name


def forked_rng() -> AbstractContextManager[None]:
    """`torch.random.fork_rng` for the devices in use; it warns about any others."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The maker's name; for a CPU also the number of threads, which decides its peak."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def fast_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16, and does not emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else bool(cpu_bf16())


def precision_on(device: torch.device, precision: str) -> str:
    """``auto`` becomes bf16 where the device is fast in it, else fp32; bf16 and fp32 stay."""
    return precision if precision != "auto" else "bf16" if fast_bf16(device) else "fp32"
