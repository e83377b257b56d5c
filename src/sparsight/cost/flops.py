"""Closed-form FLOPs of what a step executes, by part. No torch.

One multiply-add is two FLOPs; matrix products and attention are counted, elementwise work is not, as
``torch.utils.flop_counter`` does. Attention is counted in full (a causal kernel may do half of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsight.cost.shapes import LanguageShape, Maps, Trains
from sparsight.layouts import Layout, absorbs
from sparsight.settings.bridges import bridge_settings


def language_flops(
    shape: LanguageShape, batch: float, positions: float, labels: float, trains: Trains
) -> dict[str, float]:
    """Executed FLOPs of the language model, forward and backward.

    Args:
        batch: rows; positions: tokens in a row, padding included; labels: positions put on the vocabulary.
    """
    tokens, rank = batch * positions, trains.lora_rank * trains.language
    # Backward costs one forward for the input's gradient and one more for the weights'.
    flows_back = trains.flows_back
    full = trains.language and not rank
    again = trains.recompute and flows_back

    def maps(sizes: Maps) -> float:
        linear = sum(2 * a * b for a, b in sizes) * (1 + flows_back + full + again)
        return tokens * shape.layers * (linear + sum(2 * rank * (a + b) for a, b in sizes) * (3 + again))

    projections, mlp = maps(shape.attention_maps()), maps(shape.mlp_maps())
    if rank and not (trains.bridge or trains.vision):
        # Nothing trains below the first layer: its queries, keys and values pass no gradient on.
        projections -= sum(2 * (a * b + rank * a) for a, b in shape.attention_maps()[:3]) * tokens
    if again:  # recomputation stops where nothing more is needed: before the layer's last product
        mlp -= 2 * shape.hidden * (rank or shape.intermediate) * tokens * shape.layers
    scores = 4 * batch * positions**2 * shape.heads * shape.head_dim * shape.layers
    return {
        "language_projections": projections,
        "language_attention": scores * (3 if flows_back else 1) + scores * again,
        "language_mlp": mlp,
        "vocabulary": 2 * labels * shape.hidden * shape.vocabulary * (1 + flows_back + full),
    }


def bridge_flops(
    settings: Any, level_widths: Sequence[int], out_width: int, map_size: tuple[int, int], images: float, trains: Trains
) -> float:
    """Executed FLOPs of a bridge for ``images`` images, forward and backward."""
    bridge = bridge_settings(settings)
    tokens = bridge.visual_tokens(map_size)
    if bridge.kind in ("resampler", "chain_of_sight"):
        return _windowed(bridge.scales, bridge, level_widths, out_width, map_size, images, trains)
    width = sum(level_widths) * getattr(bridge, "factor", 1) ** 2
    maps = width * out_width + (0 if bridge.kind == "linear" else out_width * out_width)
    return 2.0 * images * tokens * maps * (1 + (trains.bridge or trains.vision) + trains.bridge)


def _windowed(
    layout: Layout,
    bridge: Any,
    level_widths: Sequence[int],
    out_width: int,
    map_size: tuple[int, int],
    images: float,
    trains: Trains,
) -> float:
    width, hidden = bridge.width, int(bridge.width * bridge.mlp_ratio)
    out = 2.0 * images * layout.tokens * width * out_width
    linear = keys = 0.0
    queries = attention = absorbed = frozen = last = 0.0
    flows_back = trains.bridge or trains.vision
    again = trains.recompute and flows_back
    for scale in layout.scales:
        # Windows of unequal size are padded to the largest.
        seen = -(-map_size[0] // scale.grid) * -(-map_size[1] // scale.grid)
        for number, level in enumerate(list(level_widths) * bridge.depth):
            query = 2 * scale.tokens * width * width
            if number:
                linear += images * query
            else:  # the first level's queries are the same for every image and projected once
                queries += query
            linear += 2 * images * scale.tokens * (width * width + 2 * width * hidden)
            last += 2 * images * scale.tokens * width * hidden
            if absorbs(scale.queries, seen, width // bridge.heads):
                # Queries go through the key's weights, what they took through the value's; the first level's go once.
                if number:
                    linear += 2 * images * scale.tokens * width * level
                else:
                    queries += 2 * scale.tokens * width * level
                linear += 2 * images * scale.tokens * width * level
                absorbed += 4 * images * scale.tokens * bridge.heads * seen * level
                if trains.vision and not (number or trains.bridge):
                    # Frozen queries: the scores pass a gradient back to the patches alone, one product less.
                    frozen += 2 * images * scale.tokens * bridge.heads * seen * level
            else:
                keys += 2 * images * map_size[0] * map_size[1] * level * 2 * width
                attention += 4 * images * scale.tokens * seen * width
    recomputed = linear + keys + queries + attention + absorbed - last if again else 0.0  # see `language_flops`
    return (
        (linear + out) * (1 + flows_back + trains.bridge)
        + keys * (1 + trains.vision + trains.bridge)  # to a frozen encoder's map no gradient goes
        + queries * (3 if trains.bridge else 1)
        + attention * (3 if flows_back else 1)
        + absorbed * (1 + flows_back + trains.vision)
        - frozen
        + recomputed
    )


def step_flops(
    shape: LanguageShape,
    bridge: Any,
    level_widths: Sequence[int],
    map_size: tuple[int, int],
    encoder_flops: float,
    batch: float,
    positions: float,
    labels: float,
    images: float,
    trains: Trains,
) -> dict[str, float]:
    """Executed FLOPs of one forward and backward pass, by part.

    Args:
        batch, positions, labels: see `language_flops`.
        encoder_flops: one image's pass (``encoders.count_flops``); 0 where features come from a cache.
    """
    parts = {
        "encoder": encoder_flops * images,
        "bridge": bridge_flops(bridge, level_widths, shape.hidden, map_size, images, trains),
    }
    return parts | language_flops(shape, batch, positions, labels, trains)
