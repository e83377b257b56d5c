"""Memory of a training step, in bytes (ours): parameters, and what a forward pass keeps for the backward pass.

Reckoned for AdamW and PyTorch's autograd as transformers' models use it: RMSNorm keeps its input, the normalised input,
and its output; fused attention keeps queries, keys, values and output; a gated MLP keeps its four products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sparsight.cost.shapes import EncoderShape, LanguageShape, LiteShape, Trains, bridge_parameters, pick_levels
from sparsight.layouts import absorbs
from sparsight.settings.bridges import BridgeSettings, LinearConfig, WindowedSettings


@dataclass(frozen=True)
class Parts:
    """Parameters of each part, all of them and those that train; bytes of all weights and of those that train."""

    total: dict[str, int]
    trains: dict[str, int]
    weights: float
    trained_bytes: float

    @classmethod
    def of(
        cls,
        encoder: EncoderShape,
        levels: Sequence[int] | None,
        bridge: BridgeSettings,
        language: LanguageShape,
        trains: Trains,
    ) -> Parts:
        rank = trains.lora_rank * trains.language
        joined = bridge_parameters(bridge, encoder.level_widths(levels), language.hidden)
        adapters = language.lora_parameters(rank)
        weights = (
            ("vision", encoder.parameters, encoder.parameters * encoder.weight_bytes, trains.vision),
            ("bridge", joined, joined * 4, trains.bridge),
            ("language", language.parameters, language.frozen_bytes, trains.language and not rank),
            ("language", adapters, adapters * 4, True),
        )
        total, trained = Counter[str](), Counter[str]()
        for part, count, _, active in weights:
            total[part] += count
            trained[part] += count * active
        stored = sum(size for _, _, size, _ in weights)
        return cls(total, trained, stored, sum(size * active for _, _, size, active in weights))


def language_activations(shape: LanguageShape, batch: float, positions: float, trains: Trains, bf16: bool) -> float:
    """Bytes that the layers keep for the backward pass."""
    if not trains.flows_back:
        return 0.0
    narrow, wide, tokens = 2 if bf16 else 4, shape.weight_bytes, batch * positions
    full = trains.language and not trains.lora_rank
    # Norm's input; normalised, if its weight trains; output, if a linear map behind it trains.
    norms = 2 * shape.hidden * (wide + wide * full + narrow * trains.language)
    mlp = narrow * shape.intermediate * (1 + 2 * shape.gated + trains.language)
    layer = norms + mlp + 4 * shape.heads * (narrow * shape.head_dim + 1)
    if trains.recompute:  # inputs of the layers, and one layer at work
        return tokens * (shape.layers * wide * shape.hidden + layer)
    return tokens * shape.layers * layer


def bridge_activations(
    bridge: BridgeSettings,
    level_widths: Sequence[int],
    out_width: int,
    map_size: tuple[int, int],
    images: float,
    bf16: bool,
) -> float:
    """Bytes that a bridge keeps; recomputation is left out, as a bridge is small."""
    narrow, patches = 2 if bf16 else 4, map_size[0] * map_size[1]
    if not isinstance(bridge, WindowedSettings):
        width = sum(level_widths) * getattr(bridge, "factor", 1) ** 2
        token = (4 + narrow) * width + narrow * out_width * (1 if isinstance(bridge, LinearConfig) else 3)
        return images * bridge.visual_tokens(map_size) * token
    layout = bridge.scales
    kept = patches * sum(level_widths) * (4 + narrow) + layout.tokens * bridge.width * 8.0  # maps, normalised; output
    for scale in layout.scales:
        seen = -(-map_size[0] // scale.grid) * -(-map_size[1] // scale.grid)
        for level in list(level_widths) * bridge.depth:
            if absorbs(scale.queries, seen, bridge.width // bridge.heads):
                kept += scale.tokens * bridge.heads * (seen * (4 + narrow) + 2 * narrow * level)
                kept += patches * level * narrow * (scale.grid > 1)  # cut into windows
            else:
                kept += patches * 2 * bridge.width * narrow
            kept += scale.tokens * bridge.width * (8 + narrow * (4 + 2 * bridge.mlp_ratio))
    return images * kept


def encoder_activations(
    encoder: EncoderShape, side: int, levels: Sequence[int] | None, images: float, trains: Trains, bf16: bool
) -> float:
    """Bytes that an encoder keeps, or, frozen, holds while it runs."""
    narrow = 2 if bf16 else 4
    if isinstance(encoder, LiteShape):  # its widest block, in the middle; trained, the sum of all, about six of those
        return images * 3 * 96 * (side / 2) ** 2 * narrow * (6 if trains.vision else 1)
    tokens, hidden = (side // encoder.patch) ** 2 + encoder.prefix, encoder.hidden
    block = hidden * (2 * (4 + narrow) + 4 * narrow) + 2 * encoder.intermediate * narrow
    used = max(pick_levels(encoder.layers + 1, False, levels, encoder.kind))
    kept = used if trains.vision and not trains.recompute else 1
    return images * tokens * ((used + 1) * hidden * 4 + block * kept)


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
