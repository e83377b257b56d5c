"""Compound token scaling: give a trained bridge a new layout, weights carried over (Chain-of-Sight, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsight.bridges.windowed import WindowedResampler
from sparsight.errors import UserError
from sparsight.settings.bridges import check_scaling


@dataclass(frozen=True)
class Born:
    """Where a part of the new bridge came from: a scale, or the norm and linear map that all scales share.

    ``copied``, ``repeated`` (queries given to child windows) and ``new`` count parameters.
    """

    part: str
    source: str
    tokens: int
    copied: int
    repeated: int
    new: int


def resize_queries(queries_WQD: torch.Tensor, windows: int) -> torch.Tensor:
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
    flat = torch.tensor([row * old + column for row in parent for column in parent], device=queries_WQD.device)
    return queries_WQD[flat]


def _born_as_identity(name: str, start: torch.Tensor) -> torch.Tensor:
    """A block for a level that the old bridge did not see: its own start values, and nothing added to the queries."""
    silent = name.endswith((".out.weight", ".out.bias", ".mlp.2.weight", ".mlp.2.bias"))
    return torch.zeros_like(start) if silent else start


@torch.no_grad()
def scale_bridge(
    bridge: WindowedResampler,
    target: WindowedResampler,
    sources: Mapping[int, int] | None = None,
    levels: Sequence[Sequence[int]] | None = None,
) -> list[Born]:
    """Copy a bridge's weights into one of another layout, in place, verbatim but for the queries.

    Args:
        bridge: the trained bridge.
        target: a bridge of the layout to reach, of the same width, heads and depth, with its start values.
        sources: overrides of the lineage, grid of the new scale -> grid of the old one.
        levels: the encoder's levels that the old and the new bridge see, where they differ. The block of a level
            that goes is left out; the block of a level that comes adds nothing at first (ours).

    Returns:
        What each part was born from, the shared part last.

    Raises:
        UserError: a new scale has no source, or the bridges differ in more than layout and levels.
    """
    born = check_scaling(bridge.settings, target.settings, sources)
    before, after = levels or ([*range(len(bridge.level_widths))], [*range(len(target.level_widths))])
    if not set(before) & set(after):
        raise UserError(f"the new feature levels {list(after)} share none with the old ones {list(before)}")
    count = {str(scale.grid): [0, 0, 0] for scale in target.layout.scales} | {"": [0, 0, 0]}
    state = bridge.state_dict()
    for name, new in target.state_dict().items():
        source, grid = name, ""
        fresh = False
        if name.startswith("scales."):
            _, grid, rest = name.split(".", 2)
            scale = next(s for s in target.layout.scales if s.grid == int(grid))
            if rest.startswith("blocks."):
                _, number, leaf = rest.split(".", 2)
                turn, place = divmod(int(number), len(after))
                fresh = after[place] not in before
                old_number = turn * len(before) + (0 if fresh else list(before).index(after[place]))
                rest = f"blocks.{old_number}.{leaf}"
            source = f"scales.{born[scale].grid}.{rest}"
        value = _born_as_identity(name, new) if fresh else state.get(source)
        if value is not None and name.endswith(".queries"):
            value = resize_queries(value, new.shape[0])
        if value is None or value.shape != new.shape:
            found = "nothing" if value is None else list(value.shape)
            raise UserError(
                f"'{name}' of the new bridge is {list(new.shape)}, but '{source}' of the old one is {found}"
            )
        kept = 0 if fresh else min(new.numel(), state[source].numel())
        counts = count[grid]
        counts[0] += kept
        counts[1 + fresh] += new.numel() - kept
        new.copy_(value)
    rows = [Born(str(s), str(p), s.tokens, *count[str(s.grid)]) for s, p in born.items()]
    return [*rows, Born("norm, linear", "the same", 0, *count[""])]
