"""The baselines: one token per patch, or a square of patches folded into one.

Shapes: B images, H x W patches, C channels of all levels together, N tokens, E language width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsight.errors import UserError


def check_levels(levels_BHWC: Sequence[Tensor], level_widths: Sequence[int]) -> None:
    """Fail with the counts when the features are not what a bridge was built for."""
    found = [tuple(level.shape) for level in levels_BHWC]
    if [shape[3:] for shape in found] != [(width,) for width in level_widths]:
        raise UserError(
            f"the bridge expects {len(level_widths)} levels (B, H, W, C) with C = {list(level_widths)}, found {found}"
        )
    if len({shape[:3] for shape in found}) > 1:
        raise UserError(f"feature levels must have the same batch, height and width, found {found}")


def pixel_shuffle(x_BHWC: Tensor, factor: int) -> Tensor:
    """Fold ``factor`` x ``factor`` patches into the channels: (B, H, W, C) -> (B, H/f, W/f, C*f*f).

    A map that does not divide is padded with zeros at the bottom and right, never cropped.
    """
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
        first = nn.Linear(in_width, out_width)
        self.proj = first if kind == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, levels_BHWC: Sequence[Tensor], sizes_B2: Tensor | None = None) -> Tensor:
        check_levels(levels_BHWC, self.level_widths)
        if sizes_B2 is not None and (sizes_B2 != sizes_B2.new_tensor(levels_BHWC[0].shape[1:3])).any():
            raise UserError(
                f"a bridge with a token for each patch needs maps of one size, found {sizes_B2.tolist()}: "
                "use images of one size, or a resampler or chain_of_sight"
            )
        x_BHWC = torch.cat(list(levels_BHWC), dim=-1)
        x_BHWC = x_BHWC if self.factor == 1 else pixel_shuffle(x_BHWC, self.factor)
        return self.proj(self.norm(x_BHWC.flatten(1, 2)))
