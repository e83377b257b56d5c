"""Bridges from feature maps to visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsight.bridges.base import Bridge
from sparsight.bridges.patchwise import PatchwiseBridge
from sparsight.bridges.windowed import WindowedResampler
from sparsight.errors import UserError
from sparsight.settings.bridges import bridge_settings

__all__ = ["Bridge", "PatchwiseBridge", "WindowedResampler", "build_bridge"]


def build_bridge(settings: Any, level_widths: Sequence[int], out_width: int) -> nn.Module:
    """Build a bridge.

    Args:
        settings: bridge settings, a dict of them, a kind, or a layout (see ``config.bridge_settings``).
        level_widths: channels of each feature level.
        out_width: width of the language model, E.

    Raises:
        UserError: the settings are wrong, or there is no feature level.
    """
    bridge = bridge_settings(settings)
    if not level_widths:
        raise UserError("a bridge needs at least one feature level, found none")
    if bridge.kind in ("resampler", "chain_of_sight"):
        return WindowedResampler(bridge, level_widths, out_width)
    return PatchwiseBridge(bridge.kind, level_widths, out_width, factor=getattr(bridge, "factor", 1))
