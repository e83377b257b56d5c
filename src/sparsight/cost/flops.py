"""Closed-form FLOPs of what a step executes, by part.

One multiply-add is two FLOPs; matrix products and attention are counted, elementwise work is not, as
``torch.utils.flop_counter`` does. Attention is counted in full (a causal kernel may do half of it).
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsight.cost.shapes import LanguageShape, Maps, Trains
from sparsight.layouts import absorbs
from sparsight.settings.bridges import BridgeSettings, LinearConfig, WindowedSettings


def language_flops(
    shape: LanguageShape,
    batch: float,
    positions: float,
    labels: float,
    trains: Trains,
    layers: float | None = None,
    beside: float = 0.0,
) -> dict[str, float]:
    """Executed FLOPs of the language model, forward and backward, by part.

    Args:
        batch: rows; positions: tokens in a row, padding included; labels: positions projected to the vocabulary.
        layers: those that run over all positions, all of them if not given; beside: positions in the others.
    """
    tokens, rank = batch * positions, trains.lora_rank * trains.language
    layers = shape.layers if layers is None else layers
    passed = batch * (layers * positions + (shape.layers - layers) * beside)  # tokens through layers
    met = batch * (layers * positions**2 + (shape.layers - layers) * beside**2)  # pairs in attention
    full, again = trains.language and not rank, trains.recompute and trains.flows_back
    # Backward costs one forward for the input's gradient and one more for the weights'.
    frozen, attention = 1 + trains.flows_back + again, 1 + 2 * trains.flows_back + again

    def products(maps: Maps) -> float:
        linear = sum(2 * a * b for a, b in maps) * (frozen + full)
        return passed * (linear + sum(2 * rank * (a + b) for a, b in maps) * (3 + again))

    projections, mlp = products(shape.attention_maps()), products(shape.mlp_maps())
    if rank and not (trains.bridge or trains.vision):
        # Nothing trains below the first layer: its queries, keys and values pass no gradient on.
        projections -= sum(2 * (a * b + rank * a) for a, b in shape.attention_maps()[:3]) * tokens
    if again:  # recomputation stops where nothing more is needed: before the layer's last product
        mlp -= 2 * shape.hidden * (rank or shape.intermediate) * passed
    return {
        "language_projections": projections,
        "language_attention": 4 * met * shape.heads * shape.head_dim * attention,
        "language_mlp": mlp,
        "vocabulary": 2 * labels * shape.hidden * shape.vocabulary * (1 + trains.flows_back + full),
    }


def bridge_flops(
    bridge: BridgeSettings,
    level_widths: Sequence[int],
    out_width: int,
    map_size: tuple[int, int],
    images: float,
    trains: Trains,
) -> float:
    """Executed FLOPs of a bridge for ``images`` images, forward and backward."""
    if isinstance(bridge, WindowedSettings):
        return _windowed(bridge, level_widths, out_width, map_size, images, trains)
    width = sum(level_widths) * getattr(bridge, "factor", 1) ** 2
    maps = width * out_width + (0 if isinstance(bridge, LinearConfig) else out_width * out_width)
    return 2.0 * images * bridge.visual_tokens(map_size) * maps * (1 + (trains.bridge or trains.vision) + trains.bridge)


def _windowed(
    bridge: WindowedSettings,
    level_widths: Sequence[int],
    out_width: int,
    map_size: tuple[int, int],
    images: float,
    trains: Trains,
) -> float:
    width, layout, flows_back = bridge.width, bridge.scales, trains.bridge or trains.vision
    again = trains.recompute and flows_back
    # How often a product runs: forward, for the gradient of what goes in, for that of the weights, and recomputed.
    out = 1 + flows_back + trains.bridge
    linear, attention = out + again, 1 + 2 * flows_back + again
    to_patches = 1 + trains.vision + trains.bridge + again  # to a frozen encoder's map no gradient goes
    total = 2.0 * images * layout.tokens * width * out_width * out
    for scale in layout.scales:
        # Windows of unequal size are padded to the largest.
        seen = -(-map_size[0] // scale.grid) * -(-map_size[1] // scale.grid)
        tokens = 2 * images * scale.tokens
        for number, level in enumerate(list(level_widths) * bridge.depth):
            # The first level's queries are the same for every image and projected once.
            queries = tokens * linear if number else 2 * scale.tokens * (1 + 2 * trains.bridge + again)
            mlp = tokens * width * int(width * bridge.mlp_ratio)
            total += queries * width * width + tokens * width * width * linear + mlp * (2 * linear - again)
            if absorbs(scale.queries, seen, width // bridge.heads):
                # Queries go through the key's weights, their results through the value's.
                total += (queries + tokens * linear) * width * level
                scores = tokens * bridge.heads * seen * level
                total += 2 * scores * (1 + flows_back + trains.vision + again)
                if trains.vision and not (number or trains.bridge):
                    total -= scores  # frozen queries: the scores pass a gradient to the patches alone
            else:
                total += 4 * images * map_size[0] * map_size[1] * level * width * to_patches
                total += 2 * tokens * seen * width * attention
    return total
