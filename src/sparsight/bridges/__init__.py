"""Bridges: a list of feature levels, each (B, H, W, C), becomes visual tokens (B, N, E)."""

from sparsight.bridges.base import Bridge, build_bridge
from sparsight.bridges.patchwise import PatchwiseBridge
from sparsight.bridges.windowed import WindowedResampler

__all__ = ["Bridge", "PatchwiseBridge", "WindowedResampler", "build_bridge"]
