"""A decoder's inputs cut to the positions that stay, and its outputs put back where they were.

Shapes: B samples, T positions, K kept ones, D width, M visual tokens of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sparsight.compat import CACHE
from sparsight.errors import UserError


@dataclass(frozen=True)
class Kept:
    """Where the kept positions of a pass come from. ``index_BK``; ``valid_BK``: no padding; length T.

    The parts of a model may lie on several devices: indices follow the tensor that they are used on.
    """

    index_BK: torch.Tensor
    valid_BK: torch.Tensor
    length: int

    @classmethod
    def of(cls, keep_BT: torch.Tensor) -> Kept:
        """From which positions are kept; rows that keep fewer than the fullest one are padded at the end."""
        lengths_B = keep_BT.sum(1)
        kept = int(lengths_B.max())
        index_BK = (~keep_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
        valid_BK = torch.arange(kept, device=keep_BT.device) < lengths_B[:, None]
        return cls(index_BK, valid_BK, keep_BT.shape[1])

    def gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Keep these positions along ``axis``; the samples stand on axis 0, or on the one before ``axis``."""
        sample = 0 if axis == 1 else axis - 1
        batch, kept = self.index_BK.shape
        if x.shape[sample] == 1:
            x = x.expand(*(batch if a == sample else -1 for a in range(x.ndim)))
        shape = [1] * x.ndim
        shape[sample], shape[axis] = batch, kept
        wide = [batch if a == sample else kept if a == axis else size for a, size in enumerate(x.shape)]
        return x.gather(axis, self.index_BK.to(x.device).view(shape).expand(wide))

    def scatter(self, x_BKD: torch.Tensor) -> torch.Tensor:
        """Put back, zeros where nothing was kept, (B, T, D)."""
        x_BKD = x_BKD * self.valid_BK[..., None].to(x_BKD)
        empty = x_BKD.new_zeros(x_BKD.shape[0], self.length, x_BKD.shape[2])
        return empty.scatter_add(1, self.index_BK.to(x_BKD.device)[..., None].expand_as(x_BKD), x_BKD)


_UNEVEN = (
    "this cache was filled from padded rows, or from rows that keep different numbers of positions, whose visual "
    "tokens were compressed: what follows cannot tell which of its positions are padding. Use rows of one length "
    "without padding, or use_cache=False, or train_only=True"
)
_UNKNOWN = (
    "position_ids are missing behind a cache whose visual tokens were compressed, and this model counts them along "
    "several axes: pass position_ids, as generate() does, or use_cache=False, or train_only=True"
)


def mark_cache(cache: Any, dropped: int, even: bool) -> None:
    """Let a cache of keys and values know what a pass left out of it: later passes count positions by its length."""
    if cache is not None:
        cache._sparsight_dropped = getattr(cache, "_sparsight_dropped", 0) + dropped
        cache._sparsight_uneven = getattr(cache, "_sparsight_uneven", False) or not even


def behind_cache(inputs: dict[str, Any], embeds_BTD: Any, renumbered: bool, given: bool) -> dict[str, Any]:
    """A decoder's inputs with the positions that follow a cache which `mark_cache` has marked; others as they are.

    Args:
        given: whether ``position_ids`` are the caller's, and not counted by the model from the cache's length.

    Raises:
        UserError: padding, or positions along several axes, that cannot be told from the cache.
    """
    cache: Any = inputs.get(CACHE)
    if getattr(cache, "_sparsight_uneven", False):
        raise UserError(_UNEVEN)
    if not getattr(cache, "_sparsight_dropped", 0) or embeds_BTD is None or (given and not renumbered):
        return inputs
    positions = inputs.get("position_ids")
    if not renumbered and positions is not None and positions.ndim == 3:
        raise UserError(_UNKNOWN)
    start = cache.get_seq_length() + (0 if renumbered else cache._sparsight_dropped)
    return inputs | {"position_ids": start + torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device)[None]}


# Names in transformers for features of deeper layers: where they go, and what they are.
_DEEP = {"visual_pos_masks": "deepstack_visual_embeds", "vision_mask": "deepstack_features"}
_KNOWN = ("inputs_embeds", "attention_mask", "position_ids", *_DEEP, *_DEEP.values())


def gather_inputs(
    inputs: dict[str, Any], kept: Kept, keep_BT: torch.Tensor, renumbered: bool, config: Any
) -> dict[str, Any]:
    """Every input of a decoder that runs along the sequence, cut to the kept positions; embeddings are left alone.

    Args:
        renumbered: places without gaps (from 0 in each packed sample), in place of those that tokens had.
        config: the decoder's, which says what its attention takes.

    Raises:
        UserError: the mask, or packed samples, in a form that cannot be cut.
    """
    inputs, (batch, length) = dict(inputs), keep_BT.shape
    for key, value in inputs.items():
        if key not in _KNOWN and isinstance(value, torch.Tensor) and tuple(value.shape[:2]) == (batch, length):
            inputs[key] = kept.gather(value, 1)
    segment_BT = packed_samples(inputs, batch, length)
    segment_BT = None if segment_BT is None else segment_BT.to(keep_BT.device)
    segment_BK = None if segment_BT is None else kept.gather(segment_BT, 1)
    if segment_BK is None:
        inputs["attention_mask"] = _gather_mask(inputs.get("attention_mask"), kept)
    else:
        inputs |= _packed(segment_BK, kept, config, inputs["inputs_embeds"].dtype)
    places = inputs.get("position_ids")
    if renumbered:
        place_K = torch.arange(kept.index_BK.shape[1], device=keep_BT.device)
        first_BK = torch.zeros_like(kept.index_BK)
        if segment_BK is not None:  # the first position of the same sample
            first_BK = (segment_BK[..., None] == segment_BK[:, None]).int().argmax(-1)
        inputs["position_ids"] = place_K - first_BK
    else:
        inputs["position_ids"] = kept.index_BK if places is None else kept.gather(places, places.ndim - 1)
    _gather_deep(inputs, kept, keep_BT)
    return inputs


def _gather_deep(inputs: dict[str, Any], kept: Kept, keep_BT: torch.Tensor) -> None:
    """Features that are added in deeper layers: one for each visual position (M), a list or by layer."""
    for places, features in _DEEP.items():
        if (mask := inputs.get(places)) is None:
            continue
        kept_M = keep_BT[(mask if mask.ndim == 2 else mask[..., 0]).to(keep_BT.device)]
        levels = inputs[features]
        if isinstance(levels, dict):
            inputs[features] = {layer: level[kept_M.to(level.device)] for layer, level in levels.items()}
        else:
            inputs[features] = [level[kept_M.to(level.device)] for level in levels]
        valid = kept.valid_BK if mask.ndim == 2 else kept.valid_BK[..., None]
        inputs[places] = kept.gather(mask, 1) & valid.to(mask.device)


def packed_samples(inputs: dict[str, Any], batch: int, length: int) -> torch.Tensor | None:
    """The number of the packed sample that a position belongs to, (B, T); None where a row is one sample.

    As transformers tells them: by the boundaries of variable-length attention, or, where there is no mask, by places
    that do not go on.
    """
    places = inputs.get("position_ids")
    if (edges := inputs.get("cu_seq_lens_q")) is not None:
        at_T = torch.arange(length, device=edges.device)
        return torch.bucketize(at_T, edges[1:].contiguous(), right=True)[None]
    if inputs.get("attention_mask") is not None or places is None:
        return None
    if places.ndim == 3:  # several axes; where there are four, the first one is the text's
        if places.shape[0] != 4:
            return None
        places = places[0]
    segment_BT = (places.diff(prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1).expand(batch, -1)
    return segment_BT if bool(segment_BT.any()) else None


def _packed(segment_BK: torch.Tensor, kept: Kept, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What keeps packed samples apart: boundaries for variable-length attention, else a mask of blocks."""
    backend, places = getattr(config, "_attn_implementation", None) or "", segment_BK.shape[1]
    if "flash" in backend:
        if len(segment_BK) != 1:
            raise UserError(f"packed samples in {len(segment_BK)} rows under {backend}: expected one row")
        counts = torch.bincount(segment_BK[0])
        edges = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(counts.max())
        cut = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
        return cut | {"attention_mask": None}
    if backend not in ("sdpa", "eager") or (getattr(config, "sliding_window", None) or places) < places:
        raise UserError(
            f"packed samples cannot be compressed under attention '{backend}' with a sliding window of "
            f"{getattr(config, 'sliding_window', None)}: use sdpa, eager or flash attention without a window"
        )
    seen = (segment_BK[:, None, :] == segment_BK[..., None]).tril()[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": _apart_from_padding(mask if backend == "eager" else seen, kept)}


def _gather_mask(mask: Any, kept: Kept) -> Any:
    """The mask of any backend that is a tensor, for the kept positions."""
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return kept.valid_BK.long()
    if isinstance(mask, dict):  # one for each kind of layer
        return {key: _gather_mask(value, kept) for key, value in mask.items()}
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise UserError(f"cannot compress under an attention mask of type {type(mask).__name__}: use sdpa or eager")
    rows = kept.gather(mask.transpose(1, 2), 1).transpose(1, 2)
    return _apart_from_padding(kept.gather(rows.permute(0, 3, 1, 2), 1).permute(0, 2, 3, 1), kept)


def _apart_from_padding(mask_BHKK: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Padding at the end sees and is seen by nothing but itself: causal, behind all that counts."""
    eye = torch.eye(mask_BHKK.shape[-1], dtype=torch.bool, device=mask_BHKK.device)
    blocked = False if mask_BHKK.dtype == torch.bool else torch.finfo(mask_BHKK.dtype).min
    return mask_BHKK.masked_fill(~(kept.valid_BK[:, None, None].to(eye.device) | eye), blocked)
