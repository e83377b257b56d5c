"""FLOPs of real modules, for which no closed form is at hand, as torch counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsight.devices.precision import forked_rng


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
