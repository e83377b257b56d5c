"""Chain-of-Sight's multi-scale visual resampler, and the single-scale resampler, which is one scale of it.

Shapes: B images, L x M patches of C channels, G x G windows (W = G*G) of P patches and Q queries each,
D bridge width, A heads of K = D / A, N visual tokens, E language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from sparsight.bridges.base import check_levels
from sparsight.layouts import Layout, Scale, window_bounds


@lru_cache(maxsize=64)
def window_index(height: int, width: int, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches each window sees, for maps that do not divide by the grid.

    Returns:
        index_WP: patch numbers (row-major), padded with 0.
        valid_WP: bool, False on the padding.
    """
    windows = [
        [row * width + column for row in range(*rows) for column in range(*columns)]
        for rows in window_bounds(height, grid)
        for columns in window_bounds(width, grid)
    ]
    longest = max(map(len, windows))
    index_WP = torch.tensor([window + [0] * (longest - len(window)) for window in windows])
    valid_WP = torch.tensor([[place < len(window) for place in range(longest)] for window in windows])
    return index_WP, valid_WP


def cut_windows(x_BLMD: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut a map into grid x grid windows: (B, L, M, D) -> (B, W, P, D) and a mask of real patches, or None."""
    height, width = x_BLMD.shape[1:3]
    if grid == 1:
        return x_BLMD.flatten(1, 2)[:, None], None
    if height % grid == 0 and width % grid == 0:
        x_BGIGJD = x_BLMD.unflatten(2, (grid, -1)).unflatten(1, (grid, -1))
        return x_BGIGJD.transpose(2, 3).flatten(3, 4).flatten(1, 2), None
    index_WP, valid_WP = (t.to(x_BLMD.device) for t in window_index(height, width, grid))
    return x_BLMD.flatten(1, 2)[:, index_WP], valid_WP


class ResamplerBlock(nn.Module):
    """Pre-norm cross-attention of a window's queries to its patches, then an MLP; both residual.

    q and kv without bias, output with bias, no attention among queries (Chain-of-Sight, port).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, q_BWQD: torch.Tensor, x_BLMC: torch.Tensor, grid: int) -> torch.Tensor:
        batch = x_BLMC.shape[0]
        # Keys and values are made before the windows are cut: one product for the whole map.
        kv_BLMD = self.key_value(self.norm_context(x_BLMC))
        kv_BWPD, valid_WP = cut_windows(kv_BLMD, grid)
        # The first level's queries are the same for every image (batch 1): projected once, expanded as a view.
        h_BWQD = self.query(self.norm_query(q_BWQD)).expand(batch, -1, -1, -1)
        q_XAQK = h_BWQD.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_XAPK, v_XAPK = (
            t.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in kv_BWPD.chunk(2, dim=-1)
        )
        mask = None if valid_WP is None else valid_WP.repeat(batch, 1)[:, None, None, :]
        o_XAQK = F.scaled_dot_product_attention(q_XAQK, k_XAPK, v_XAPK, attn_mask=mask)
        o_BWQD = o_XAQK.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
        q_BWQD = q_BWQD + self.out(o_BWQD)
        return q_BWQD + self.mlp(self.norm_mlp(q_BWQD))


class ScaleResampler(nn.Module):
    """One scale: a query row for each output token, one block per feature level, lower level first."""

    def __init__(self, scale: Scale, width: int, heads: int, mlp_ratio: float, level_widths: Sequence[int]) -> None:
        super().__init__()
        self.grid = scale.grid
        self.queries = nn.Parameter(torch.empty(scale.grid**2, scale.queries, width))
        self.blocks = nn.ModuleList(ResamplerBlock(width, heads, mlp_ratio, level) for level in level_widths)

    def forward(self, levels_BLMC: Sequence[torch.Tensor]) -> torch.Tensor:
        q_BWQD = self.queries[None]
        for block, x_BLMC in zip(self.blocks, levels_BLMC, strict=True):
            q_BWQD = block(q_BWQD, x_BLMC, self.grid)
        return q_BWQD.flatten(1, 2)


class WindowedResampler(nn.Module):
    """Multi-scale visual resampler (Chain-of-Sight, section 3.1). With the layout ``1:n``, a plain resampler.

    Weights are shared by the windows of a scale and differ between scales. Tokens run from coarse to fine, then
    one LayerNorm and one linear map, shared by all scales, lead to the language model's width.
    """

    def __init__(
        self,
        layout: Layout,
        width: int,
        heads: int,
        mlp_ratio: float,
        level_widths: Sequence[int],
        out_width: int,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.heads = heads
        self.level_widths = tuple(level_widths)
        # Named by grid, so that a checkpoint says by itself which scales it has.
        self.scales = nn.ModuleDict(
            {str(s.grid): ScaleResampler(s, width, heads, mlp_ratio, level_widths) for s in layout.scales}
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, out_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal; biases zero (port). The port's std of 0.02 belongs to its width of 1024.

        At other widths it goes with 1 / sqrt(width), so that signals keep the paper's size (ours).
        """
        std = 0.02 * (1024 / self.proj.in_features) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ScaleResampler):
                nn.init.trunc_normal_(module.queries, std=0.02)

    def forward(self, levels_BLMC: Sequence[torch.Tensor]) -> torch.Tensor:
        check_levels(levels_BLMC, self.level_widths)
        x_BND = torch.cat([scale(levels_BLMC) for scale in self.scales.values()], dim=1)
        assert x_BND.shape[1] == self.layout.tokens
        return self.proj(self.norm(x_BND))
