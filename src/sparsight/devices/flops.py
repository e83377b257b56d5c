"""FLOPs of modules that have no closed form, as torch counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsight.devices.precision import forked_rng


def recomputes(module: torch.nn.Module) -> bool:
    """Whether any part recomputes its activations (gradient checkpointing)."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


class _Whole(nullcontext[None]):
    parents = ("Global",)


@contextmanager
def _plain_products(model: torch.nn.Module) -> Iterator[None]:
    """Linear maps with a product of their own, as packed weights have, multiply plainly with zeros: the counter sees
    into no kernel of bitsandbytes or quanto."""
    plain = torch.nn.Linear.forward
    packed = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and type(m).forward is not plain]
    before = [module.__dict__.get("forward") for module in packed]

    def forward(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, x.new_zeros(1).expand(module.out_features, module.in_features))

    for module in packed:
        module.forward = partial(forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in zip(packed, before, strict=True):
            del module.forward
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def flop_counter(encoder: Any, model: Any = None) -> Iterator[FlopCounterMode]:
    """Count what runs within, and leave no trace of it in ``encoder`` or in the random generators. The encoder is in
    eval mode, unless it recomputes activations, which it does in training alone. ``model``: around the encoder, where
    more of it runs."""
    kernel, was_training = getattr(getattr(encoder, "config", None), "_attn_implementation", None), encoder.training
    on_cpu = next(encoder.parameters()).device.type == "cpu"  # there, the counter does not see into fused kernels
    foreign = kernel not in (None, "eager", "sdpa") and hasattr(encoder, "set_attn_implementation")
    encoder.train(was_training and recomputes(encoder))
    if foreign:
        encoder.set_attn_implementation("eager" if on_cpu else "sdpa")
    try:
        unfused = sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()
        counter = FlopCounterMode(display=False)
        # Sums by module are not wanted, and torch's tracker cannot bear a parameter as a module's input.
        counter.mod_tracker = _Whole()  # type: ignore[assignment]
        with forked_rng(), unfused, _plain_products(model or encoder), counter:
            yield counter
    finally:
        if foreign:
            encoder.set_attn_implementation(kernel)
        encoder.train(was_training)
