"""Closed-form FLOPs of what a step executes, by part. No torch.

One multiply-add is two FLOPs; matrix products and attention are counted, elementwise work is not, as
``torch.utils.flop_counter`` does. Attention is counted in full (a causal kernel may do half of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsight.config import bridge_settings
from sparsight.layouts import Layout, absorbs


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a decoder-only language model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool = True

    @classmethod
    def from_config(cls, config: Any) -> LanguageShape:
        """Read a transformers text config; names differ between families."""
        heads = config.num_attention_heads
        hidden = config.hidden_size
        named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        intermediate = next((size for size in named if size), 4 * hidden)
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            intermediate=intermediate,
            vocabulary=config.vocab_size,
            gated=hasattr(config, "rms_norm_eps") or getattr(config, "hidden_act", "") in ("silu", "swish"),
        )

    def linear_maps(self) -> list[tuple[int, int]]:
        """(in, out) of each linear map of a layer."""
        attention = self.heads * self.head_dim
        key_value = self.kv_heads * self.head_dim
        mlp = [(self.hidden, self.intermediate)] * (2 if self.gated else 1) + [(self.intermediate, self.hidden)]
        return [
            (self.hidden, attention),
            (self.hidden, key_value),
            (self.hidden, key_value),
            (attention, self.hidden),
            *mlp,
        ]


@dataclass(frozen=True)
class Trains:
    """What a step updates."""

    vision: bool = False
    bridge: bool = True
    language: bool = True
    lora_rank: int = 0


def language_flops(shape: LanguageShape, batch: int, positions: int, labels: int, trains: Trains) -> dict[str, float]:
    """Executed FLOPs of the language model, forward and backward.

    Args:
        batch: rows; positions: tokens in a row, padding included; labels: positions put on the vocabulary.
    """
    tokens = batch * positions
    # Backward costs one forward for the input's gradient and one more for the weights'.
    flows_back = trains.language or trains.bridge or trains.vision
    full = trains.language and not trains.lora_rank
    linear = sum(2 * a * b for a, b in shape.linear_maps()) * tokens * shape.layers
    adapters = sum(2 * trains.lora_rank * (a + b) for a, b in shape.linear_maps()) * tokens * shape.layers
    first = 0
    if trains.language and trains.lora_rank and not (trains.bridge or trains.vision):
        # Nothing trains below the first layer: its queries, keys and values pass no gradient on.
        first = sum(2 * (a * b + trains.lora_rank * a) for a, b in shape.linear_maps()[:3]) * tokens
    attention = 4 * batch * positions**2 * shape.heads * shape.head_dim * shape.layers
    vocabulary = 2 * labels * shape.hidden * shape.vocabulary
    return {
        "language_linear": linear * (1 + flows_back + full) + adapters * 3 * trains.language - first,
        "language_attention": attention * (3 if flows_back else 1),
        "vocabulary": vocabulary * (1 + flows_back + full),
    }


def bridge_flops(
    settings: Any, level_widths: Sequence[int], out_width: int, map_size: tuple[int, int], images: int, trains: Trains
) -> float:
    """Executed FLOPs of a bridge for ``images`` pictures, forward and backward."""
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
    images: int,
    trains: Trains,
) -> float:
    width, hidden = bridge.width, int(bridge.width * bridge.mlp_ratio)
    linear = 2.0 * images * layout.tokens * width * out_width
    queries = attention = frozen = 0.0
    flows_back = trains.bridge or trains.vision
    for scale in layout.scales:
        # Windows of unequal size are padded to the largest.
        seen = -(-map_size[0] // scale.grid) * -(-map_size[1] // scale.grid)
        for number, level in enumerate(list(level_widths) * bridge.depth):
            query = 2 * scale.tokens * width * width
            if number:
                linear += images * query
            else:  # the first level's queries are the same for every picture and projected once
                queries += query
            linear += 2 * images * scale.tokens * (width * width + 2 * width * hidden)
            if absorbs(scale.queries, seen, width // bridge.heads):
                # Queries go through the key's weights, what they took through the value's; the first level's go once.
                if number:
                    linear += 2 * images * scale.tokens * width * level
                else:
                    queries += 2 * scale.tokens * width * level
                linear += 2 * images * scale.tokens * width * level
                attention += 4 * images * scale.tokens * bridge.heads * seen * level
                if trains.vision and not (number or trains.bridge):
                    # Frozen queries: the scores pass a gradient back to the patches alone, one product less.
                    frozen += 2 * images * scale.tokens * bridge.heads * seen * level
            else:
                linear += 2 * images * map_size[0] * map_size[1] * level * 2 * width
                attention += 4 * images * scale.tokens * seen * width
    return (
        linear * (1 + flows_back + trains.bridge)
        + queries * (3 if trains.bridge else 1)
        + attention * (3 if flows_back else 1)
        - frozen
    )


def step_flops(
    shape: LanguageShape,
    bridge: Any,
    level_widths: Sequence[int],
    map_size: tuple[int, int],
    encoder_flops: float,
    batch: int,
    positions: int,
    labels: int,
    images: int,
    trains: Trains,
) -> dict[str, float]:
    """Executed FLOPs of one forward and backward pass, by part.

    Args:
        encoder_flops: one picture's pass (``encoders.count_flops``); 0 where features come from a cache.
    """
    parts = {
        "encoder": encoder_flops * images,
        "bridge": bridge_flops(bridge, level_widths, shape.hidden, map_size, images, trains),
    }
    return parts | language_flops(shape, batch, positions, labels, trains)
