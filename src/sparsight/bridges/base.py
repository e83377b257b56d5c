"""What a bridge is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sparsight.errors import UserError


class Bridge(Protocol):
    """From feature levels, lower level first, each (B, H, W, C_level), to visual tokens (B, N, E).

    ``sizes_B2``: rows and columns of each image's own map, where maps of several sizes are padded to one.
    """

    def __call__(self, levels_BHWC: Sequence[torch.Tensor], sizes_B2: torch.Tensor | None = None) -> torch.Tensor: ...


def check_levels(levels_BHWC: Sequence[torch.Tensor], level_widths: Sequence[int]) -> None:
    """Fail with the counts when the features are not what the bridge was built for."""
    found = [tuple(level.shape) for level in levels_BHWC]
    if len(found) != len(level_widths) or any(
        len(shape) != 4 or shape[3] != width for shape, width in zip(found, level_widths, strict=True)
    ):
        raise UserError(
            f"bridge expects {len(level_widths)} levels (B, H, W, C) with C = {list(level_widths)}, found {found}"
        )
    if len({shape[:3] for shape in found}) > 1:
        raise UserError(f"feature levels must have the same batch, height and width, found {found}")
