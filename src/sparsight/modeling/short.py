"""Attention over short rows on a CPU in training: plain products, where the fused kernel's backward is the slower one.

Measured on one thread in bf16 (LOG.md): half of the time at about 100 positions, as long at about 200. Longer rows keep
the fused kernel, which also needs less memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

NAME, LONGEST = "sparsight_short", 160


def short_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' ``sdpa``, by plain products for rows of at most `LONGEST` positions.

    Args:
        query: (B, heads, T, D); ``key`` and ``value`` may have fewer heads.
        attention_mask: bool, True where something is seen, (B or 1, 1, T, T); None is causal.

    Returns:
        (B, T, heads, D)
    """
    length = query.shape[2]
    plain = module.training and query.device.type == "cpu" and length <= LONGEST and key.shape[2] == length
    plain &= attention_mask is not None or kwargs.get("is_causal", getattr(module, "is_causal", True))
    plain &= hasattr(module, "num_key_value_groups") and not {"softcap", "position_bias"} & kwargs.keys()
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    seen = attention_mask
    if seen is None:
        seen = query.new_ones(length, length, dtype=torch.bool).tril()
    added = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    dropout = kwargs.get("dropout", 0.0)
    return eager_attention_forward(module, query, key, value, added, scaling, dropout)[0], None


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attention(language_model: PreTrainedModel, name: str = NAME, of: tuple[str, ...] = ("sdpa",)) -> Iterator[None]:
    """Within, ``language_model`` has the attention ``name``; no change if what it had is not one ``of`` these."""
    before = language_model.config._attn_implementation
    if before not in of:
        yield
        return
    language_model.set_attn_implementation(name)
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)
