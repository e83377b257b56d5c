"""Attention for packed rows without a mask: each sample by itself, as a batch padded at the right.

A block mask over a whole row costs the square of the row's length, and rules out fused causal kernels. Causal attention
never looks at what stands behind, so samples side by side need no mask at all. Where the backend has attention over
samples of various lengths (flash attention), that is better still, and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from sparsight.errors import UserError
from sparsight.modeling.short import attention, short_attention

NAME = "sparsight_packed"


class _Rows(torch.autograd.Function):
    """Rows ``there`` of x; ``back`` is the way back. What is there twice, or not inside, is padding: no gradient."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        context.save_for_backward(back, inside)
        return x.index_select(0, there)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        back, inside = context.saved_tensors
        found = gradient.index_select(0, back)  # not the sum over equal rows that autograd would take
        return torch.where(inside.view(-1, *[1] * (found.ndim - 1)), found, 0), None, None, None


def segments(position_ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """First place, end, and longest, of samples that begin where ``position_ids`` (B or 1, T) are 0, in flat rows."""
    starts_S = (position_ids.expand(rows, -1).reshape(-1) == 0).nonzero()[:, 0]
    ends_S = torch.cat([starts_S[1:], starts_S.new_tensor([rows * position_ids.shape[1]])])
    return starts_S, ends_S, int((ends_S - starts_S).max())


def _apart(position_ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat places of samples side by side, padded to the longest (S, L); which are real, flat; and the way back."""
    starts_S, ends_S, longest = segments(position_ids, rows)
    places_SL = starts_S[:, None] + torch.arange(longest, device=position_ids.device)
    inside_SL = places_SL < ends_S[:, None]
    inside = inside_SL.flatten()
    return torch.where(inside_SL, places_SL, starts_S[:, None]), inside, inside.nonzero()[:, 0]


def compared(language_model: PreTrainedModel, inputs: Mapping[str, Any]) -> float | None:
    """Positions that attention compares with one another; None for those of whole rows."""
    if language_model.config._attn_implementation != NAME:
        return None
    starts_S, _, longest = segments(inputs["position_ids"], len(inputs["input_ids"]))
    return float(len(starts_S) * longest**2)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within samples, which begin where ``position_ids`` (B, T) are 0.

    Args:
        query: (B, heads, T, D); ``key`` and ``value`` may have fewer heads.
        kwargs: as transformers gives them; with ``sliding_window``, a position sees so many, itself included.

    Returns:
        (B, T, heads, D)
    """
    assert position_ids is not None and attention_mask is None
    batch, heads, length, width = query.shape
    # All layers get the same tensor: what follows from it, and makes a GPU wait, is found once a pass.
    found = getattr(position_ids, "_sparsight_apart", None)
    if found is None:
        found = position_ids._sparsight_apart = _apart(position_ids, batch)  # type: ignore[attr-defined]
    places_SL, inside, back = found
    there, longest, real = places_SL.flatten(), places_SL.shape[1], torch.ones_like(back, dtype=torch.bool)

    def apart(x: torch.Tensor) -> torch.Tensor:
        rows = _Rows.apply(x.transpose(1, 2).flatten(0, 1), there, back, real)
        return rows.view(*places_SL.shape, *rows.shape[1:]).transpose(1, 2)

    seen, window = None, kwargs.get("sliding_window")
    if window is not None and window < longest:
        seen = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]
    kwargs |= {"is_causal": seen is None}
    out_SLHD, _ = short_attention(module, apart(query), apart(key), apart(value), seen, **kwargs)
    out = _Rows.apply(out_SLHD.flatten(0, 1), back, there, inside)
    return out.view(batch, length, heads, width), None


AttentionInterface.register(NAME, packed_attention)


def attention_for_packed_rows(language_model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within, ``language_model`` takes packed rows only; no change where it has attention over various lengths.

    Raises:
        UserError: its attention is cut into chunks.
    """
    if "chunked_attention" in (getattr(language_model.config, "layer_types", None) or ()):
        raise UserError(f"{type(language_model).__name__} attends in chunks: set packing: false")
    return attention(language_model, NAME, of=("sdpa", "eager"))
