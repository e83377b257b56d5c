"""Compound token scaling: give a trained bridge a new layout, weights carried over (Chain-of-Sight, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsight.bridges.windowed import WindowedResampler
from sparsight.layouts import Layout, Scale


def resize_queries(queries_WQD: torch.Tensor, grid: int) -> torch.Tensor:
    """Nearest neighbour over the window grid: a child window starts with exactly its parent's queries.

    Args:
        queries_WQD: (old grid^2, queries per window, width).
        grid: windows per side of the new scale.

    Returns:
        (grid^2, queries per window, width)
    """
    old = round(queries_WQD.shape[0] ** 0.5)
    # The parent of a child window is the one that holds its centre.
    parent = [(2 * index + 1) * old // (2 * grid) for index in range(grid)]
    flat = torch.tensor([row * old + column for row in parent for column in parent], device=queries_WQD.device)
    return queries_WQD[flat]


@torch.no_grad()
def scale_bridge(
    bridge: WindowedResampler, target: WindowedResampler, sources: Mapping[int, int] | None = None
) -> dict[Scale, Scale]:
    """Copy a bridge's weights into one of another layout, in place, verbatim but for the queries.

    Args:
        bridge: the trained bridge.
        target: a bridge of the layout to reach, of the same width, heads and levels.
        sources: overrides of the lineage, grid of the new scale -> grid of the old one.

    Returns:
        Which old scale each new one was born from.

    Raises:
        ValueError: a new scale has no source, or the bridges differ in more than the layout.
    """
    born = bridge.layout.lineage(target.layout, sources)
    if bridge.heads != target.heads:  # the weights would fit, but mean something else
        raise ValueError(f"the new bridge has {target.heads} heads, the old one {bridge.heads}")
    old_state, new_state = bridge.state_dict(), target.state_dict()
    for name, new in new_state.items():
        source, old = name, None
        if name.startswith("scales."):
            _, grid, rest = name.split(".", 2)
            scale = next(s for s in target.layout.scales if s.grid == int(grid))
            source = f"scales.{born[scale].grid}.{rest}"
        old = old_state.get(source)
        if old is not None and source.endswith(".queries"):
            old = resize_queries(old, scale.grid)
        if old is None or old.shape != new.shape:
            found = "nothing" if old is None else list(old.shape)
            raise ValueError(
                f"'{name}' of the new bridge is {list(new.shape)}, but '{source}' of the old one is {found}"
            )
        new.copy_(old)
    return born


def layout_of(bridge: torch.nn.Module) -> Layout | None:
    """The layout of a windowed bridge, None for others."""
    return bridge.layout if isinstance(bridge, WindowedResampler) else None
