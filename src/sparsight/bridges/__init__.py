"""Bridges: modules from an encoder's feature levels to visual tokens.

All take the levels, lower first, each (B, H, W, C_level), and give (B, N, E). ``sizes_B2`` holds the rows and columns
of each image's own map, where maps of several sizes are padded to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsight.bridges.patchwise import PatchwiseBridge
from sparsight.bridges.windowed import WindowedResampler
from sparsight.settings.bridges import bridge_settings

__all__ = ["PatchwiseBridge", "WindowedResampler", "build_bridge"]


def build_bridge(settings: Any, level_widths: Sequence[int], out_width: int) -> nn.Module:
    """A bridge with its start values.

    Args:
        settings: bridge settings, or anything that `bridge_settings` takes; it also says which errors are raised.
        level_widths: channels of each feature level, lower first.
        out_width: width of the language model, E.
    """
    bridge = bridge_settings(settings)
    if bridge.kind in ("resampler", "chain_of_sight"):
        return WindowedResampler(bridge, level_widths, out_width)
    return PatchwiseBridge(bridge.kind, level_widths, out_width, factor=getattr(bridge, "factor", 1))
