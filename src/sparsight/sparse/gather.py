"""A decoder's inputs cut to the positions that stay, and its outputs put back where they were.

Shapes: B samples, T positions, K kept ones, H heads, D width, M visual tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from sparsight.compat import COUNTED
from sparsight.devices.copies import Host, to_device
from sparsight.errors import UserError


@dataclass(frozen=True)
class Kept:
    """Where the kept positions of a pass come from. ``index_BK``; ``valid_BK``: no padding; length T.

    The parts of a model may lie on several devices: indices follow the tensor that they are used on.
    """

    index_BK: torch.Tensor
    valid_BK: torch.Tensor
    length: int
    even: bool = False  # all rows keep as many: under a causal mask, none of these sees the padding behind them

    @classmethod
    def of(cls, keep_BT: torch.Tensor, lengths: np.ndarray | None = None, multiple: int = 1) -> Kept:
        """From which positions are kept; rows are padded at the end, to a multiple of the fullest one's length.

        ``lengths``: positions that each row keeps, if the host knows them.
        """
        lengths_B = keep_BT.sum(1)
        lengths = lengths_B.cpu().numpy() if lengths is None else lengths
        kept = -(-int(lengths.max()) // multiple) * multiple
        index_BK = (~keep_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
        index_BK = F.pad(index_BK, (0, kept - index_BK.shape[1]))
        valid_BK = torch.arange(kept, device=keep_BT.device) < lengths_B[:, None]
        return cls(index_BK, valid_BK, keep_BT.shape[1], bool((lengths == lengths[0]).all()))

    def gather(self, x: torch.Tensor, axis: int, samples: int = 0) -> torch.Tensor:
        """Keep these positions along ``axis``; the samples stand on axis ``samples``."""
        shape = [1] * x.ndim
        shape[samples], shape[axis] = self.index_BK.shape
        return x.take_along_dim(self.index_BK.to(x.device).view(shape), axis)

    def scatter(self, x_BKD: torch.Tensor) -> torch.Tensor:
        """Put back, zeros where nothing was kept, (B, T, D)."""
        x_BKD = x_BKD * self.valid_BK[..., None].to(x_BKD)
        empty = x_BKD.new_zeros(x_BKD.shape[0], self.length, x_BKD.shape[2])
        return empty.scatter_add(1, self.index_BK.to(x_BKD.device)[..., None].expand_as(x_BKD), x_BKD)


@dataclass(frozen=True)
class Beside:
    """The text of a pass, which goes through a layer that the other positions pass by. ``text_BT``: where it stands."""

    kept: Kept
    text_BT: torch.Tensor

    def through(self, layer: Callable[..., Any], hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives for the text alone, and the other positions as they were.

        Raises:
            UserError: the attention mask, or another argument, in a form that cannot be cut.
        """
        cut = {key: self._cut_mask(x) if key == "attention_mask" else self._cut(x) for key, x in kwargs.items()}
        found = layer(self.kept.gather(hidden_BTD, 1), *map(self._cut, args), **cut)
        few_BKD, *rest = found if isinstance(found, tuple) else (found,)
        y_BTD = torch.where(self.text_BT.to(few_BKD.device)[..., None], self.kept.scatter(few_BKD), hidden_BTD)
        return (y_BTD, *rest) if isinstance(found, tuple) else y_BTD

    def _cut(self, value: Any) -> Any:
        """An argument of a layer, and all that it holds: (B, T, ...), one for all samples (1, T, ...), or, of several
        axes of positions, (3, B, T, ...)."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._cut, value))
        if not isinstance(value, torch.Tensor):
            return value
        rows, length = len(self.text_BT), self.kept.length
        pairs = list(zip(value.shape, value.shape[1:], strict=False))
        at = next((axis for axis, pair in enumerate(pairs[:2]) if pair in ((rows, length), (1, length))), None)
        if at is None and value.ndim > 1 and length in value.shape:
            shape = tuple(value.shape)
            raise UserError(f"a layer is given {shape}, which cannot be cut to its text: take a skipper's tokens 'all'")
        if at is None:
            return value
        whole = value.expand(*value.shape[:at], rows, *value.shape[at + 1 :])
        return self.kept.gather(whole, at + 1, at)

    def _cut_mask(self, mask: Any) -> Any:
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            mask = mask.expand(len(self.text_BT), -1, -1, -1)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return self.kept.gather(mask, 1) * self.kept.valid_BK.to(mask)
        return None if mask is None else _gather_mask(mask, self.kept)


def mark_cache(cache: Any, countable: bool) -> None:
    """Note in a cache of keys and values that positions were dropped, and whether given position ids suffice to go on:
    not where rows are padded, or keep different numbers of positions, or are renumbered."""
    if cache is not None:
        cache._sparsight_countable = countable and getattr(cache, "_sparsight_countable", True)


def check_cache(cache: Any, given: bool) -> None:
    """Raises UserError behind a marked cache, from which positions cannot be told; ``given``: ``position_ids`` are."""
    if (countable := getattr(cache, "_sparsight_countable", None)) is not None and not (countable and given):
        raise UserError(
            "the visual tokens in this cache were compressed, so the positions of what follows cannot be told from it: "
            "pass position_ids, as generate() does, and rows of one length without padding, and use "
            'positions="original"; or use_cache=False, or train_only=True'
        )


# Names in transformers for features of deeper layers: their positions, and what they are.
_DEEP = {"visual_pos_masks": "deepstack_visual_embeds", "vision_mask": "deepstack_features"}
_KNOWN = ("inputs_embeds", "attention_mask", "position_ids", *_DEEP, *_DEEP.values())


def gather_inputs(
    inputs: dict[str, Any],
    kept: Kept,
    keep_BT: torch.Tensor,
    renumbered: bool,
    config: Any,
    host: Host | None = None,
    visual: tuple[np.ndarray, int] = (np.empty(0), 0),
) -> dict[str, Any]:
    """Every input of a decoder that runs along the sequence, cut to the kept positions; embeddings are left alone.

    Args:
        renumbered: position ids without gaps (from 0 in each packed sample), in place of those that tokens had.
        config: the decoder's, which says what its attention takes.
        host: of the batch.
        visual: visual tokens' positions in the flattened batch, (M,), and how many of them stay.

    Raises:
        UserError: the mask, or packed samples, in a form that cannot be cut.
    """
    inputs = {key: value for key, value in inputs.items() if key != COUNTED}
    for key, value in inputs.items():
        if key not in _KNOWN and isinstance(value, torch.Tensor) and value.shape[:2] == keep_BT.shape:
            inputs[key] = kept.gather(value, 1)
    positions, first_BK = inputs.get("position_ids"), torch.zeros_like(kept.index_BK)
    host = host or Host()
    if (packed := packed_samples(inputs, keep_BT, host)) is None:
        inputs["attention_mask"] = _gather_mask(inputs.get("attention_mask"), kept)
    else:
        segment_BK = kept.gather(packed.segment_BT, 1)
        first_BK = (segment_BK[..., None] == segment_BK[:, None]).int().argmax(-1)  # of the same sample
        inputs |= _packed(segment_BK, packed, kept, config, inputs["inputs_embeds"].dtype)
    if renumbered:
        inputs["position_ids"] = torch.arange(kept.index_BK.shape[1], device=keep_BT.device) - first_BK
    elif positions is None:
        inputs["position_ids"] = kept.index_BK
    else:  # (B, T), or one for each of several axes
        inputs["position_ids"] = kept.gather(positions, positions.ndim - 1, positions.ndim - 2)
    for where, features in _DEEP.items():  # one for each visual position (M), in a list or by layer
        if (mask := inputs.get(where)) is None:
            continue
        levels, (at_M, count) = inputs[features], visual
        levels = levels if isinstance(levels, dict) else dict(enumerate(levels))
        if any(len(level) != len(at_M) for level in levels.values()):  # not of those that we take for visual
            at_M = np.flatnonzero(host(mask if mask.ndim == 2 else mask[..., 0]))
            count = int(keep_BT.flatten()[to_device(at_M, keep_BT.device)].sum())
        keep_M = keep_BT.flatten()[to_device(at_M, keep_BT.device)]
        kept_M = (~keep_M).to(torch.uint8).argsort(stable=True)[:count]
        levels = {layer: level[kept_M.to(level.device)] for layer, level in levels.items()}
        inputs[features] = levels if isinstance(inputs[features], dict) else [*levels.values()]
        valid = kept.valid_BK if mask.ndim == 2 else kept.valid_BK[..., None]
        inputs[where] = kept.gather(mask, 1) & valid.to(mask.device)
    return inputs


class Packed(NamedTuple):
    """Samples that share rows: the number of the one that a position belongs to, (B, T) or (1, T), how many there are
    in a row, and the most positions that one has."""

    segment_BT: torch.Tensor
    samples: int
    longest: int


def packed_samples(inputs: Mapping[str, Any], like: torch.Tensor, host: Host) -> Packed | None:
    """The packed samples of positions such as those of ``like`` (B, T, ...); None where a row is one sample.

    By the boundaries of variable-length attention, or, where there is no mask, by position ids that do not go on.
    """
    positions = inputs.get("position_ids")
    if (edges := inputs.get("cu_seq_lens_q")) is not None:
        at_T = torch.arange(like.shape[1], device=edges.device)
        segment_1T = torch.bucketize(at_T, edges[1:].contiguous(), right=True)[None]
        return Packed(segment_1T.to(like.device), len(edges) - 1, int(inputs["max_length_q"]))
    if inputs.get("attention_mask") is not None or positions is None or (positions.ndim == 3 and len(positions) != 4):
        return None
    at_BT = host(positions)
    if positions.ndim == 3:  # of four axes, the first one is the text's
        positions, at_BT = positions[0], at_BT[0]
    if not (starts := np.diff(at_BT) != 1).any():
        return None
    segment_BT = _segments(positions).expand(len(like), -1).to(like.device)
    return Packed(segment_BT, int(starts.sum(1).max()) + 1, int(at_BT.max()) + 1)


def _packed(segment_BK: torch.Tensor, packed: Packed, kept: Kept, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs that keep packed samples apart: boundaries for variable-length attention, else a mask of blocks."""
    backend, length = getattr(config, "_attn_implementation", None) or "", segment_BK.shape[1]
    if "flash" in backend:
        if len(segment_BK) != 1:
            raise UserError(f"packed samples in {len(segment_BK)} rows under {backend}: expected one row")
        counts = segment_BK.new_zeros(packed.samples).scatter_add(0, segment_BK[0], torch.ones_like(segment_BK[0]))
        edges = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        longest = min(packed.longest, length)  # at most: what is dropped of which sample need not be known here
        cut = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
        return cut | {"attention_mask": None}
    window = getattr(config, "sliding_window", None)
    if backend not in ("sdpa", "eager") or (window or length) < length:
        raise UserError(
            f"packed samples cannot be compressed under attention '{backend}' with a sliding window of {window}: "
            "use sdpa, eager or flash attention without a window"
        )
    seen = (segment_BK[:, None, :] == segment_BK[..., None]).tril()[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": _apart_from_padding(mask if backend == "eager" else seen, kept)}


def causal_mask(mask_BT: Any, positions_BT: Any, config: Any) -> Any:
    """The mask (B, 1, T, T) that transformers makes of padding or packed samples for "sdpa". It looks at the values
    first, so that the host would wait for a GPU. On the CPU, and for other kinds of attention, the mask as it was."""
    if (like := positions_BT if mask_BT is None else mask_BT) is None:
        return None
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    plain = kinds <= {"full_attention"} and (window is None or window >= like.shape[1])
    if like.device.type == "cpu" or config._attn_implementation != "sdpa" or not plain or like.ndim != 2:
        return mask_BT
    if mask_BT is not None:
        return mask_BT.bool()[:, None].expand(-1, mask_BT.shape[1], -1).tril()[:, None]
    segment_BT = _segments(positions_BT)
    return (segment_BT[:, None] == segment_BT[..., None]).tril()[:, None]


def _segments(positions_BT: torch.Tensor) -> torch.Tensor:
    """The number of the packed sample of each position."""
    return (positions_BT.diff(prepend=positions_BT[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _gather_mask(mask: Any, kept: Kept) -> Any:
    """The mask of any backend that is a tensor, for the kept positions."""
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):  # the decoder makes it causal
        return (kept.valid_BK | kept.even).long()
    if isinstance(mask, dict):  # one for each kind of layer
        return {key: _gather_mask(value, kept) for key, value in mask.items()}
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise UserError(f"cannot compress under an attention mask of type {type(mask).__name__}: use sdpa or eager")
    return _apart_from_padding(kept.gather(kept.gather(mask, 2), 3), kept)


def _apart_from_padding(mask_BHKK: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Padding at the end sees and is seen by nothing but itself: causal, behind all that counts."""
    eye = torch.eye(mask_BHKK.shape[-1], dtype=torch.bool, device=mask_BHKK.device)
    blocked = False if mask_BHKK.dtype == torch.bool else torch.finfo(mask_BHKK.dtype).min
    return mask_BHKK.masked_fill(~(kept.valid_BK[:, None, None].to(eye.device) | eye), blocked)
