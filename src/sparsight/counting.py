"""What torch counts and times: FLOPs of real modules, for which no closed form is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsight.cost.devices import cpu_bf16, cpu_name


def forked_rng() -> AbstractContextManager[None]:
    """`torch.random.fork_rng` for the devices that are in use, of which it would warn at length."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def recomputes(module: torch.nn.Module) -> bool:
    """Whether any part recomputes its activations (gradient checkpointing)."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


@contextmanager
def flop_counter(encoder: Any) -> Iterator[FlopCounterMode]:
    """Count what runs inside, and leave no trace of it in ``encoder`` or in the random generators.

    On a CPU attention is taken apart: the counter does not see into its fused kernels. On a GPU it does, and a matrix
    for each head might not fit. Modules are in eval mode, but where
    they recompute activations, which they do in training alone.
    """
    config, was_training = getattr(encoder, "config", None), encoder.training
    kernel = getattr(config, "_attn_implementation", None)
    on_cpu = next(encoder.parameters()).device.type == "cpu"
    foreign = kernel not in (None, "eager", "sdpa") and hasattr(encoder, "set_attn_implementation")
    encoder.train(was_training and recomputes(encoder))
    if foreign:
        encoder.set_attn_implementation("eager" if on_cpu else "sdpa")
    try:
        apart = sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()
        with forked_rng(), apart, FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        if foreign:
            encoder.set_attn_implementation(kernel)
        encoder.train(was_training)


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
