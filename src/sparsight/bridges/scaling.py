"""Compound token scaling: give a trained bridge a new layout, weights carried over (Chain-of-Sight, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.bridges.windowed import WindowedResampler
from sparsight.errors import UserError
from sparsight.settings.bridges import check_scaling


@dataclass
class ScaledPart:
    """A part of the new bridge, a scale or the norm and linear map that all scales share, and its source in the old.

    ``copied``, ``repeated`` (queries given to child windows) and ``new`` count parameters.
    """

    part: str
    source: str
    tokens: int
    copied: int = 0
    repeated: int = 0
    new: int = 0

    def copy(self, source: nn.Module, target: nn.Module) -> None:
        target.load_state_dict(source.state_dict())
        self.copied += _count(target)


def resize_queries(queries_WQD: Tensor, windows: int) -> Tensor:
    """Nearest neighbour over the window grid: a child window starts with exactly its parent's queries.

    Args:
        queries_WQD: (old grid^2, queries per window, width).
        windows: of the new scale, its grid^2.

    Returns:
        (windows, queries per window, width)
    """
    old, grid = round(queries_WQD.shape[0] ** 0.5), round(windows**0.5)
    # The parent of a child window is the one that holds its centre.
    parent = [(2 * index + 1) * old // (2 * grid) for index in range(grid)]
    return queries_WQD[[row * old + column for row in parent for column in parent]]


@torch.no_grad()
def scale_bridge(
    bridge: WindowedResampler,
    target: WindowedResampler,
    sources: Mapping[int, int] | None = None,
    levels: Sequence[Sequence[int]] | None = None,
) -> list[ScaledPart]:
    """Copy a bridge's weights into one of another layout, in place, verbatim but for the queries.

    Args:
        bridge: the trained bridge.
        target: a bridge of the layout to reach, of the same width, heads and depth, with its start values.
        sources: overrides of the source scales, grid of the new scale -> grid of the old one.
        levels: the encoder's levels that the old and the new bridge see, where they differ. The block of a level
            that goes is left out; the block of a level that comes adds nothing at first (ours).

    Returns:
        Each part and its source, the shared part last.

    Raises:
        UserError: a new scale has no source, or the bridges differ in more than layout and levels.
    """
    parents = check_scaling(bridge.settings, target.settings, sources)
    before, after = levels or ([*range(len(bridge.level_widths))], [*range(len(target.level_widths))])
    if not set(before) & set(after):
        raise UserError(f"the new feature levels {list(after)} share none with the old ones {list(before)}")
    parts: list[ScaledPart] = []
    old: Any
    new: Any
    for scale, parent in parents.items():
        part = ScaledPart(str(scale), str(parent), scale.tokens)
        old, new = bridge.scales[str(parent.grid)], target.scales[str(scale.grid)]
        new.queries.copy_(resize_queries(old.queries, len(new.queries)))
        part.copied = min(old.queries.numel(), new.queries.numel())
        part.repeated = new.queries.numel() - part.copied
        for number, block in enumerate(new.blocks):
            turn, index = divmod(number, len(after))
            if after[index] in before:
                part.copy(old.blocks[turn * len(before) + list(before).index(after[index])], block)
            else:
                for parameter in (*block.out.parameters(), *block.mlp[2].parameters()):
                    parameter.zero_()
                part.new += _count(block)
        parts.append(part)
    shared = ScaledPart("norm, linear", "the same", 0)
    shared.copy(bridge.norm, target.norm)
    shared.copy(bridge.proj, target.proj)
    return [*parts, shared]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
