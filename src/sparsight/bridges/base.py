"""What a bridge is, and the one function that builds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from sparsight.config import bridge_settings


class Bridge(Protocol):
    """From feature levels, lower level first, each (B, H, W, C_level), to visual tokens (B, N, E).

    ``sizes_B2``: rows and columns of each picture's own map, where maps of several sizes are padded to one.
    """

    def __call__(self, levels_BHWC: Sequence[torch.Tensor], sizes_B2: torch.Tensor | None = None) -> torch.Tensor: ...


def build_bridge(settings: Any, level_widths: Sequence[int], out_width: int) -> nn.Module:
    """Build a bridge.

    Args:
        settings: bridge settings, a dict of them, a kind, or a layout (see ``config.bridge_settings``).
        level_widths: channels of each feature level.
        out_width: width of the language model, E.

    Raises:
        ValueError: the settings are wrong, or there is no feature level.
    """
    from sparsight.bridges.patchwise import PatchwiseBridge
    from sparsight.bridges.windowed import WindowedResampler

    bridge = bridge_settings(settings)
    if not level_widths:
        raise ValueError("a bridge needs at least one feature level, found none")
    if bridge.kind in ("resampler", "chain_of_sight"):
        return WindowedResampler(bridge, level_widths, out_width)
    return PatchwiseBridge(bridge.kind, level_widths, out_width, factor=getattr(bridge, "factor", 1))


def check_levels(levels_BHWC: Sequence[torch.Tensor], level_widths: Sequence[int]) -> None:
    """Fail with the counts when the features are not what the bridge was built for."""
    found = [tuple(level.shape) for level in levels_BHWC]
    if len(found) != len(level_widths) or any(
        len(shape) != 4 or shape[3] != width for shape, width in zip(found, level_widths, strict=True)
    ):
        raise ValueError(
            f"bridge expects {len(level_widths)} levels (B, H, W, C) with C = {list(level_widths)}, found {found}"
        )
    if len({shape[:3] for shape in found}) > 1:
        raise ValueError(f"feature levels must have the same batch, height and width, found {found}")
