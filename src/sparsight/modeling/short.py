"""Attention over short rows on a CPU in training: plain products, where the fused kernel's backward is the slower one.

Measured on one thread in bf16 (LOG.md): a quarter of the time at about 100 positions, two thirds at 400, as long at
700. Longer rows keep the fused kernel, which also needs less memory; so do all in fp32, where it is as fast at 100 and
faster above.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

NAME, LONGEST = "sparsight_short", {torch.bfloat16: 640}


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
        attention_mask: bool, True where something is seen, or what is added to the scores, (B or 1, 1, T, T); None is
            causal.

    Returns:
        (B, T, heads, D)
    """
    length, seen = query.shape[2], attention_mask
    plain = module.training and query.device.type == "cpu" and key.shape[2] == length
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain &= length <= LONGEST.get(dtype, 0)
    plain &= seen is not None or kwargs.get("is_causal", getattr(module, "is_causal", True))
    plain &= hasattr(module, "num_key_value_groups") and not {"softcap", "position_bias"} & kwargs.keys()
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if seen is None:
        seen = query.new_ones(length, length, dtype=torch.bool).tril()
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores_BHTT = (query * (kwargs.get("scaling") or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)
    added, dtype = seen, scores_BHTT.dtype
    if seen.dtype == torch.bool:
        added = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    # Not in fp32, as transformers' plain attention takes it: the kernel does so inside, and memory is what costs here.
    weights_BHTT = F.dropout((scores_BHTT + added.to(dtype)).softmax(-1), kwargs.get("dropout", 0.0))
    return (weights_BHTT.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


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
