"""Chain-of-Sight's multi-scale visual resampler, and the single-scale resampler, which is one scale of it.

Shapes: B images, L x M patches of C channels, G x G windows (W = G*G) of P patches and Q queries each,
D bridge width, A heads of K = D / A, N visual tokens, E language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsight.bridges.patchwise import check_levels
from sparsight.devices.copies import to_device
from sparsight.layouts import Scale, absorbs, window_bounds


def window_index(x_BLMD: Tensor, grid: int, sizes_B2: Tensor | None) -> tuple[Tensor, Tensor]:
    """The patches that each window sees: as equal as possible, none dropped, none counted twice (`window_bounds`).

    Returns:
        index_BWP: patch numbers in the whole map (row-major), 0 on the padding; B is 1 where all maps have one size.
        valid_BWP: bool, False on the padding.
    """
    spans = []
    for axis, longest in enumerate(x_BLMD.shape[1:3]):
        side: Any = longest if sizes_B2 is None else sizes_B2[:, axis, None]
        cuts_BG = torch.atleast_2d(side * torch.arange(grid + 1, device=x_BLMD.device) // grid)
        index_BGI = cuts_BG[:, :-1, None] + torch.arange(-(-longest // grid), device=x_BLMD.device)
        spans.append((index_BGI, index_BGI < cuts_BG[:, 1:, None]))
    (rows_BGI, real_BGI), (columns_BGJ, real_BGJ) = spans
    valid_BWP = (real_BGI[:, :, None, :, None] & real_BGJ[:, None, :, None, :]).flatten(3).flatten(1, 2)
    index_BGGIJ = rows_BGI[:, :, None, :, None] * x_BLMD.shape[2] + columns_BGJ[:, None, :, None, :]
    return index_BGGIJ.flatten(3).flatten(1, 2) * valid_BWP, valid_BWP


def checked_sizes(sizes_B2: Tensor | None, grid: int, device: torch.device) -> Tensor | None:
    """Sizes of maps on the device. Raises UserError if some window would see nothing: the host looks at them, so that
    those of the host let nobody wait."""
    if sizes_B2 is None or torch.compiler.is_compiling():
        return sizes_B2 if sizes_B2 is None else sizes_B2.to(device)
    sizes_B2 = sizes_B2.cpu()
    window_bounds(int(sizes_B2.min()), grid)
    return to_device(sizes_B2.numpy(), device)


def cut_windows(x_BLMD: Tensor, grid: int, sizes_B2: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cut a map into grid x grid windows: (B, L, M, D) -> (B, W, P, D), and a mask (B, W, P) of real patches, or None.

    Args:
        sizes_B2: as `checked_sizes` gives them.

    Raises:
        UserError: some window would see nothing.
    """
    batch, height, width = x_BLMD.shape[:3]
    if sizes_B2 is None:
        window_bounds(min(height, width), grid)
        if height % grid == 0 and width % grid == 0:
            x_BGIGJD = x_BLMD.unflatten(2, (grid, -1)).unflatten(1, (grid, -1))
            return x_BGIGJD.transpose(2, 3).flatten(3, 4).flatten(1, 2), None
    index_BWP, valid_BWP = (t.expand(batch, -1, -1) for t in window_index(x_BLMD, grid, sizes_B2))
    first_B = torch.arange(batch, device=x_BLMD.device) * (height * width)
    flat = (index_BWP + first_B[:, None, None]).flatten()
    return x_BLMD.flatten(0, 2).index_select(0, flat).unflatten(0, index_BWP.shape), valid_BWP


class Matrix(nn.Module):
    """A weight (F, C) with which its owner multiplies. No ``nn.Linear``: for those, serving engines and quantisers put
    layers of their own, which hide their weights."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Linear(inside, outside, bias=False).weight


class ResamplerBlock(nn.Module):
    """Pre-norm cross-attention of a window's queries to its patches, then an MLP; both residual.

    q and kv without bias, output with bias, no attention among queries (Chain-of-Sight, port). Patches come normalised:
    the norm's weight and bias act through those of keys and values. So all scales share one map, and no gradient has to
    go through it for their sake (ours).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = Matrix(context_width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def _key_value(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Weight (F, C) and bias (F) that make keys (the first D) and values of normalised patches."""
        weight_FC = self.key_value.weight[first:last]
        return weight_FC * self.norm_context.weight, (weight_FC * self.norm_context.bias).sum(-1)

    def attend(self, q_BWQD: Tensor, x_BLMC: Tensor, grid: int, sizes_B2: Tensor | None) -> Tensor:
        """Attention of each window's queries to its patches, (B, W, Q, D)."""
        batch, height, width = x_BLMC.shape[:3]
        queries, patches, all_D = q_BWQD.shape[2], -(-height // grid) * -(-width // grid), q_BWQD.shape[3]
        if absorbs(queries, patches, all_D // self.heads):
            weights_BWAQP, x_BWPC = self._weights(q_BWQD, x_BLMC, grid, sizes_B2)
            value_DC, bias_D = self._key_value(all_D)
            value_AKC = value_DC.unflatten(0, (self.heads, -1))
            mixed_BWAQC = (weights_BWAQP.flatten(2, 3) @ x_BWPC).unflatten(2, (self.heads, queries))
            mixed_BWQD = torch.einsum("bwaqc,akc->bwqak", mixed_BWAQC, value_AKC.to(mixed_BWAQC.dtype)).flatten(3)
            return mixed_BWQD + bias_D.to(mixed_BWQD.dtype)  # weights sum to 1
        # Keys and values are made before the windows are cut: one product for the whole map.
        kv_BWPD, valid_BWP = cut_windows(F.linear(x_BLMC, *self._key_value()), grid, sizes_B2)
        h_BWQD = self.query(self.norm_query(q_BWQD)).expand(batch, grid * grid, -1, -1)
        q_XAQK, k_XAPK, v_XAPK = (
            t.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (h_BWQD, *kv_BWPD.chunk(2, dim=-1))
        )
        mask_X11P = None if valid_BWP is None else valid_BWP.flatten(0, 1)[:, None, None]
        o_XAQK = F.scaled_dot_product_attention(q_XAQK, k_XAPK, v_XAPK, attn_mask=mask_X11P)
        return o_XAQK.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))

    def _weights(self, q_BWQD: Tensor, x_BLMC: Tensor, grid: int, sizes_B2: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention weights (B, W, A, Q, P) and the patches (B, W, P, C), without making keys: a query goes through the
        key's weights to the patches' width, q . (K x + b) = (K^T q) . x + q . b, of which the last is the same for all
        patches."""
        key_DC, _ = self._key_value(0, q_BWQD.shape[3])
        x_BWPC, valid_BWP = cut_windows(x_BLMC, grid, sizes_B2)
        h_BWQAK = self.query(self.norm_query(q_BWQD)).unflatten(-1, (self.heads, -1))
        key_AKC = key_DC.unflatten(0, (self.heads, -1))
        h_BWAQC = torch.einsum("bwqak,akc->bwaqc", h_BWQAK, key_AKC.to(h_BWQAK.dtype)) * h_BWQAK.shape[-1] ** -0.5
        x_BWPC = x_BWPC.to(h_BWAQC.dtype)
        scores_BWAQP = (h_BWAQC.flatten(2, 3) @ x_BWPC.transpose(2, 3)).unflatten(2, h_BWAQC.shape[2:4])
        if valid_BWP is not None:
            scores_BWAQP = scores_BWAQP.masked_fill(~valid_BWP[:, :, None, None], float("-inf"))
        return scores_BWAQP.softmax(-1).to(x_BWPC.dtype), x_BWPC

    def forward(self, q_BWQD: Tensor, x_BLMC: Tensor, grid: int, sizes_B2: Tensor | None = None) -> Tensor:
        q_BWQD = q_BWQD + self.out(self.attend(q_BWQD, x_BLMC, grid, sizes_B2))
        return q_BWQD + self.mlp(self.norm_mlp(q_BWQD))

    def look(self, q_BWQD: Tensor, x_BLMC: Tensor, grid: int, sizes_B2: Tensor | None) -> Tensor:
        """Where each query looks: attention weights, mean over the heads, on the whole map, (B, W, Q, L*M)."""
        weights_BWQP = self._weights(q_BWQD, x_BLMC, grid, sizes_B2)[0].mean(2)
        batch, height, width = x_BLMC.shape[:3]
        index_BWP, _ = window_index(x_BLMC, grid, sizes_B2)
        empty = weights_BWQP.new_zeros(*weights_BWQP.shape[:3], height * width)
        return empty.scatter_add_(3, index_BWP[:, :, None].expand(batch, *weights_BWQP.shape[1:]), weights_BWQP)


class ScaleResampler(nn.Module):
    """One scale: a query row for each output token; blocks go over the feature levels, lower level first."""

    gradient_checkpointing = False  # transformers' `gradient_checkpointing_enable` sets this, and the function
    _gradient_checkpointing_func: Any

    def __init__(self, scale: Scale, settings: Any, level_widths: Sequence[int]) -> None:
        super().__init__()
        self.grid = scale.grid
        windows = 1 if getattr(settings, "shared_queries", False) else scale.grid**2
        self.queries = nn.Parameter(torch.empty(windows, scale.queries, settings.width))
        self.blocks = nn.ModuleList(
            ResamplerBlock(settings.width, settings.heads, settings.mlp_ratio, level)
            for _ in range(settings.depth)
            for level in level_widths
        )

    def forward(self, levels_BLMC: Sequence[Tensor], sizes_B2: Tensor | None = None, look: bool = False) -> Tensor:
        """Tokens (B, W*Q, D) of normalised levels; with ``look``, where the last block's queries look instead,
        (B, W*Q, L, M)."""
        q_BWQD = self.queries[None].expand(-1, self.grid**2, -1, -1)
        block: Any
        for number, block in enumerate(self.blocks):
            x_BLMC = levels_BLMC[number % len(levels_BLMC)]
            if look and number + 1 == len(self.blocks):
                return block.look(q_BWQD, x_BLMC, self.grid, sizes_B2).flatten(1, 2).unflatten(2, x_BLMC.shape[1:3])
            if self.gradient_checkpointing and self.training:
                q_BWQD = self._gradient_checkpointing_func(block, q_BWQD, x_BLMC, self.grid, sizes_B2)
            else:
                q_BWQD = block(q_BWQD, x_BLMC, self.grid, sizes_B2)
        return q_BWQD.flatten(1, 2)


class WindowedResampler(nn.Module):
    """Multi-scale visual resampler (Chain-of-Sight, section 3.1). With the layout ``1:n``, a plain resampler.

    Weights are shared by the windows of a scale and differ between scales. Tokens run from coarse to fine, then
    one LayerNorm and one linear map, shared by all scales, lead to the language model's width. ``settings`` is a
    `ChainOfSightConfig` or `ResamplerConfig`; the other arguments are those of `build_bridge`.
    """

    def __init__(self, settings: Any, level_widths: Sequence[int], out_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.layout = settings.scales
        self.level_widths = tuple(level_widths)
        # Named by grid, so that a checkpoint says by itself which scales it has.
        self.scales = nn.ModuleDict(
            {str(s.grid): ScaleResampler(s, settings, level_widths) for s in self.layout.scales}
        )
        self.norm = nn.LayerNorm(settings.width)
        self.proj = nn.Linear(settings.width, out_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal; biases zero (port). The port's std of 0.02 belongs to its width of 1024.

        At other widths it goes with 1 / sqrt(width), so that signals keep the paper's size (ours). Queries have the std
        ``query_std``, and are cut at two of it or at the port's 2, whichever is wider.
        """
        std = 0.02 * (1024 / self.proj.in_features) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | Matrix):
                nn.init.trunc_normal_(module.weight, std=std)
                if (bias := getattr(module, "bias", None)) is not None:
                    nn.init.zeros_(bias)
            elif isinstance(module, ScaleResampler):
                spread = self.settings.query_std
                nn.init.trunc_normal_(module.queries, std=spread, a=-2 * max(1, spread), b=2 * max(1, spread))

    def forward(self, levels_BLMC: Sequence[Tensor], sizes_B2: Tensor | None = None) -> Tensor:
        levels_BLMC = self._normalised(levels_BLMC)
        sizes_B2 = checked_sizes(sizes_B2, self.layout.scales[-1].grid, levels_BLMC[0].device)
        scales = list(self.scales.values())
        if getattr(self.settings, "order", "coarse_to_fine") == "fine_to_coarse":
            scales.reverse()
        x_BND = torch.cat([scale(levels_BLMC, sizes_B2) for scale in scales], dim=1)
        assert x_BND.shape[1] == self.layout.tokens
        return self.proj(self.norm(x_BND))

    def _normalised(self, levels_BLMC: Sequence[Tensor]) -> list[Tensor]:
        """Each patch with mean 0 and variance 1, in the precision that the weights are worked with."""
        check_levels(levels_BLMC, self.level_widths)
        device, weight = levels_BLMC[0].device.type, self.norm.weight  # an engine may hide a map's
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return [F.layer_norm(x_BLMC, x_BLMC.shape[-1:]).to(dtype) for x_BLMC in levels_BLMC]

    @torch.no_grad()
    def attention_maps(self, levels_BLMC: Sequence[Tensor], sizes_B2: Tensor | None = None) -> dict[Scale, Tensor]:
        """Where each query of each scale looks in the last level, (B, W*Q, L, M), summing to 1 over its window."""
        levels_BLMC = self._normalised(levels_BLMC)
        sizes_B2 = checked_sizes(sizes_B2, self.layout.scales[-1].grid, levels_BLMC[0].device)
        modules = zip(self.layout.scales, self.scales.values(), strict=True)
        return {scale: module(levels_BLMC, sizes_B2, look=True) for scale, module in modules}
