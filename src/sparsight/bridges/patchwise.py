"""Bridges that keep one token per patch, or fold a square of patches into one. They are the usual baselines.

Shapes: B images, H x W patches, C channels of all levels together, N tokens, E language width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from sparsight.bridges.base import check_levels
from sparsight.errors import UserError


def pixel_shuffle(x_BHWC: torch.Tensor, factor: int) -> torch.Tensor:
    """Fold ``factor`` x ``factor`` patches into the channels: (B, H, W, C) -> (B, H/f, W/f, C*f*f).

    A map that does not divide is padded with zeros at the bottom and right, never cropped.
    """
    if factor == 1:
        return x_BHWC
    height, width = x_BHWC.shape[1:3]
    x_BHWC = F.pad(x_BHWC, (0, 0, 0, -width % factor, 0, -height % factor))
    return x_BHWC.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).transpose(2, 3).flatten(3)


class PatchwiseBridge(nn.Module):
    """``linear``, ``mlp`` or ``pixel_shuffle``; feature levels are joined along the channels."""

    def __init__(self, kind: str, level_widths: Sequence[int], out_width: int, factor: int = 1) -> None:
        super().__init__()
        self.level_widths = tuple(level_widths)
        self.factor = factor
        in_width = sum(level_widths) * factor**2
        self.norm = nn.LayerNorm(in_width)
        if kind == "linear":
            self.proj: nn.Module = nn.Linear(in_width, out_width)
        else:
            self.proj = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, levels_BHWC: Sequence[torch.Tensor], sizes_B2: torch.Tensor | None = None) -> torch.Tensor:
        check_levels(levels_BHWC, self.level_widths)
        if sizes_B2 is not None and (sizes_B2 != sizes_B2.new_tensor(levels_BHWC[0].shape[1:3])).any():
            raise UserError(
                f"a bridge with a token for each patch needs maps of one size, found {sizes_B2.tolist()}: "
                "use images of one size, or a resampler or chain_of_sight"
            )
        x_BHWC = pixel_shuffle(torch.cat(list(levels_BHWC), dim=-1), self.factor)
        x_BNE = self.proj(self.norm(x_BHWC.flatten(1, 2)))
        return x_BNE
