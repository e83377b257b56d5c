"""Memory of a training step, in bytes (ours): what stays, and what a forward pass keeps for the backward pass.

Reckoned for AdamW and PyTorch's autograd as transformers' models use it: RMSNorm keeps its input, the normalised input,
and its output; fused attention keeps queries, keys, values and output; a gated MLP keeps its four products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsight.cost.shapes import EncoderShape, LanguageShape, LiteShape, Trains, bridge_parameters, pick_levels
from sparsight.layouts import absorbs
from sparsight.settings.bridges import bridge_settings


@dataclass(frozen=True)
class Parts:
    """Parameters of each part, in all and those that train. ``weights``: bytes of all weights."""

    total: dict[str, int]
    trains: dict[str, int]
    weights: int
    trained_bytes: int

    @classmethod
    def of(
        cls, encoder: EncoderShape, levels: Sequence[int] | None, bridge: Any, language: LanguageShape, trains: Trains
    ) -> Parts:
        sizes = {"vision": encoder.weight_bytes, "bridge": 4, "language": language.weight_bytes}
        built = bridge_parameters(bridge, encoder.level_widths(levels), language.hidden)
        total = {"vision": encoder.parameters, "bridge": built, "language": language.parameters}
        weights = sum(count * sizes[part] for part, count in total.items())
        trainable = {part: count * getattr(trains, part) for part, count in total.items()}
        trained = sum(count * sizes[part] for part, count in trainable.items())
        if trains.lora_rank and trains.language:
            trained -= trainable["language"] * sizes["language"]
            trainable["language"] = language.lora_parameters(trains.lora_rank)
            total["language"] += trainable["language"]
            weights += 4 * trainable["language"]
            trained += 4 * trainable["language"]
        return cls(total, trainable, weights, trained)


def language_activations(shape: LanguageShape, batch: float, positions: float, trains: Trains, bf16: bool) -> float:
    """Bytes that the layers keep for the backward pass."""
    if not trains.flows_back:
        return 0.0
    narrow, wide = 2 if bf16 else 4, shape.weight_bytes
    heads, adapted = shape.heads * shape.head_dim, trains.language and trains.lora_rank > 0
    full = trains.language and not adapted
    # Norm's input; normalised, if its weight trains; output, if a linear map behind it trains.
    norms = 2 * shape.hidden * (wide + wide * full + narrow * trains.language)
    attention = narrow * 4 * heads
    mlp = narrow * shape.intermediate * (2 + shape.gated + (full or adapted) - (not shape.gated))
    layer = norms + attention + mlp + 4 * shape.heads
    tokens = batch * positions
    if trains.recompute:  # inputs of the layers, and one layer at work
        return tokens * (shape.layers * wide * shape.hidden + layer)
    return tokens * shape.layers * layer


def bridge_activations(
    settings: Any, level_widths: Sequence[int], out_width: int, map_size: tuple[int, int], images: float, bf16: bool
) -> float:
    """Bytes that a bridge keeps; recomputation is not reckoned with, as a bridge is small."""
    bridge, narrow, patches = bridge_settings(settings), 2 if bf16 else 4, map_size[0] * map_size[1]
    if bridge.kind not in ("resampler", "chain_of_sight"):
        width = sum(level_widths) * getattr(bridge, "factor", 1) ** 2
        tokens = bridge.visual_tokens(map_size)
        return images * tokens * ((4 + narrow) * width + narrow * out_width * (1 if bridge.kind == "linear" else 3))
    kept = float(patches * sum(level_widths) * (4 + narrow))  # the maps, and normalised
    for scale in bridge.scales.scales:
        seen = -(-map_size[0] // scale.grid) * -(-map_size[1] // scale.grid)
        for level in list(level_widths) * bridge.depth:
            if absorbs(scale.queries, seen, bridge.width // bridge.heads):
                kept += scale.tokens * bridge.heads * (seen * (4 + narrow) + 2 * narrow * level)
                kept += patches * level * narrow * (scale.grid > 1)  # cut into windows
            else:
                kept += patches * 2 * bridge.width * narrow
            kept += scale.tokens * bridge.width * (8 + narrow * (4 + 2 * bridge.mlp_ratio))
    return images * (kept + bridge.scales.tokens * bridge.width * 8)


def encoder_activations(
    encoder: EncoderShape, side: int, levels: Sequence[int] | None, images: float, trains: Trains, bf16: bool
) -> float:
    """Bytes that an encoder keeps, or, frozen, holds while it runs."""
    narrow = 2 if bf16 else 4
    if isinstance(encoder, LiteShape):  # its widest block, in the middle; trained, the sum of all, about six of those
        return images * 3 * 96 * (side / 2) ** 2 * narrow * (6 if trains.vision else 1)
    tokens, h = (side // encoder.patch) ** 2 + encoder.prefix, encoder.hidden
    block = h * (2 * (4 + narrow) + 4 * narrow) + 2 * encoder.intermediate * narrow
    states = (encoder.layers + 1) * h * 4
    if not trains.vision:
        return images * tokens * (states + block)
    used = max(pick_levels(encoder.layers + 1, False, levels, encoder.family))
    return images * tokens * (states + block * (1 if trains.recompute else used))


def step_memory(parts: Parts, kept: float, running: float, work: float, accumulates: bool) -> dict[str, float]:
    """Bytes at the peak of a step, by part.

    Args:
        kept: activations and logits at the end of the forward pass; running: what a frozen encoder held before; work:
            what the backward pass of a layer needs besides; accumulates: gradients of earlier micro-batches are there.
    """
    activations, gradients = max(kept, running), float(parts.trained_bytes)
    if not accumulates:  # gradients grow while activations go
        gradients, activations = (0.0, activations) if activations > gradients else (gradients, 0.0)
    return {
        "weights": float(parts.weights),
        "optimizer": 2.0 * parts.trained_bytes,
        "gradients": gradients,
        "activations": activations + work,
    }
