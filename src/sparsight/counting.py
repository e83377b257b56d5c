"""FLOPs counted by torch on real modules, for parts that no closed form is at hand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def flop_counter(encoder: Any) -> Iterator[FlopCounterMode]:
    """Count what runs inside, and leave no trace of it in ``encoder`` or in the random generators.

    Attention is taken apart: the counter does not see into fused kernels on CPU. Modules are in eval mode, but where
    they recompute activations, which they do in training alone.
    """
    config, was_training = getattr(encoder, "config", None), encoder.training
    kernel = getattr(config, "_attn_implementation", None)
    foreign = kernel not in (None, "eager", "sdpa") and hasattr(encoder, "set_attn_implementation")
    encoder.train(was_training and bool(getattr(encoder, "is_gradient_checkpointing", False)))
    if foreign:
        encoder.set_attn_implementation("eager")
    try:
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        if foreign:
            encoder.set_attn_implementation(kernel)
        encoder.train(was_training)
