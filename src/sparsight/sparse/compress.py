"""Visual Token Compressor (Sparse Training Scheme, stage I): pure functions from many visual tokens to few.

Shapes: B samples or images, I images (or audio clips), N visual (or audio) tokens of one, K kept ones, D width, T
positions, M visual and audio tokens of the whole batch, H x W grid of the tokens, F frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sparsight.devices.copies import to_device
from sparsight.errors import UserError
from sparsight.schedules import kept_tokens
from sparsight.sparse.visual import Run

Compressed = tuple[torch.Tensor, torch.Tensor]


def compress_batch(
    embeds_BTD: torch.Tensor,
    valid_BT: np.ndarray,
    position_M2: np.ndarray,
    runs: Sequence[Run],
    keep: float,
    method: str,
    *,
    generators: Sequence[torch.Generator],
    packed_BT: torch.Tensor | None,
) -> Compressed:
    """Embeddings in which kept positions hold what they now stand for, and which positions are kept, (B, T).

    Args:
        valid_BT: which positions are no padding.
        position_M2: sample and position of each visual, then of each audio token.
        runs: tokens of each image or audio clip, by number among these.
        generators: for "random", one for each run.
        packed_BT: for "text", the packed sample that a position belongs to, (B, T) or (1, T), if there are any.
    """
    length_T, text_BT = valid_BT.shape[1], valid_BT.copy()
    text_BT[tuple(position_M2.T)] = False
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        alike[run.length, run.grid or (1, run.length)].append(number)
    at_M = position_M2 @ (length_T, 1)
    each = [at_M[np.array([runs[n].start for n in same])[:, None] + np.arange(of[0])] for of, same in alike.items()]
    # All that the device has to know, in one copy.
    sent = to_device(np.concatenate([text_BT.ravel(), *(at_IN.ravel() for at_IN in each)]), embeds_BTD.device)
    text_X, *parts = sent.split([text_BT.size, *(at_IN.size for at_IN in each)])
    embeds_XD, kept_X, mixes = embeds_BTD.flatten(0, 1), text_X.bool(), method in MIXING
    for (length, grid), members, at_X in zip(alike, alike.values(), parts, strict=True):
        at_IN, options = at_X.view(-1, length), dict[str, Any]()
        if method == "random":
            options["generators"] = [generators[number] for number in members]
        if method == "text":
            row_I = at_IN[:, 0] // length_T
            text_IT = text_X.bool().view(valid_BT.shape)[row_I]
            if packed_BT is not None:  # that of the image's own sample
                owner_BT = packed_BT.expand(len(valid_BT), -1)
                text_IT = text_IT & (owner_BT[row_I] == owner_BT.flatten()[at_IN[:, 0]][:, None])
            options |= {"text_BTD": embeds_BTD[row_I].detach(), "text_mask_BT": text_IT}
        if method == "similarity":
            options["follows"] = [runs[number].follows for number in members]
        tokens_IND = (embeds_XD if mixes else embeds_XD.detach())[at_IN]
        few_IKD, index_IK = compress(tokens_IND, keep, method, grid=grid, **options)
        # The last position of an image predicts the token behind it: that one stays.
        index_IK = torch.cat([index_IK[:, :-1], torch.full_like(index_IK[:, :1], length - 1)], 1)
        target_IK = at_IN.gather(1, index_IK)
        kept_X = kept_X.index_fill(0, target_IK.flatten(), True)
        if mixes:
            embeds_XD = embeds_XD.index_put((target_IK,), few_IKD.to(embeds_XD.dtype))
    return embeds_XD.view_as(embeds_BTD), kept_X.view(valid_BT.shape)


def compress(
    tokens_BND: torch.Tensor,
    keep: float,
    method: str = "uniform",
    *,
    grid: tuple[int, ...] | None = None,
    text_BTD: torch.Tensor | None = None,
    text_mask_BT: torch.Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
    follows: Sequence[bool] | None = None,
) -> Compressed:
    """Keep a share of the visual tokens of each image, in their order.

    Args:
        method: "uniform", "random", "text" (Sparse Training Scheme, figure); "pool", "similarity", "merge" (ours).
        grid: rows and columns of the tokens, or frames, rows and columns, for "pool" and "similarity"; without it they
            go along the sequence. "pool" does not mix frames, unless it keeps fewer tokens than there are frames;
            "similarity" looks at the frame before too.
        text_BTD, text_mask_BT: the text's embeddings, for "text", and which of them are text; all if not given.
        generators: for "random", one for each image.
        follows: for "similarity", of each image, whether it is the frame behind the image before; of none if not given.

    Returns:
        Tokens (B, K, D) and, for each, the position (B, K) that it had, or for a token made of several, that of one of
        them; positions rise. With ``keep`` 1 the tokens are returned as they are.

    Raises:
        UserError: ``keep`` is out of range, or the method lacks what it needs.
    """
    batch, tokens = tokens_BND.shape[:2]
    kept = kept_tokens(tokens, keep)
    if kept == tokens:
        return tokens_BND, torch.arange(tokens, device=tokens_BND.device).expand(batch, -1)
    given: dict[str, Any] = {"text": text_BTD, "mask": text_mask_BT, "generators": generators, "follows": follows}
    return METHODS[method](tokens_BND, kept, grid=grid or (1, tokens), **given)


def _pick(tokens_BND: torch.Tensor, index_BK: torch.Tensor) -> Compressed:
    index_BK = index_BK.sort(dim=1).values
    return tokens_BND.take_along_dim(index_BK[..., None], 1), index_BK


def _best(tokens_BND: torch.Tensor, score_BN: torch.Tensor, kept: int) -> Compressed:
    # Stable: of equal tokens the first ones stay, on every device.
    return _pick(tokens_BND, score_BN.argsort(dim=1, descending=True, stable=True)[:, :kept])


def _uniform(tokens_BND: torch.Tensor, kept: int, **_: Any) -> Compressed:
    index_K = (2 * torch.arange(kept, device=tokens_BND.device) + 1) * tokens_BND.shape[1] // (2 * kept)
    return _pick(tokens_BND, index_K.expand(tokens_BND.shape[0], -1))


def _random(tokens_BND: torch.Tensor, kept: int, generators: Any, **_: Any) -> Compressed:
    # Drawn on the CPU: the same tokens whatever the device; by image: whatever the batch.
    batch, tokens = tokens_BND.shape[:2]
    draws_BN = torch.stack([torch.rand(tokens, generator=each) for each in generators or [None] * batch])
    return _best(tokens_BND, to_device(draws_BN.numpy(), tokens_BND.device), kept)


def _text(
    tokens_BND: torch.Tensor, kept: int, text: torch.Tensor | None, mask: torch.Tensor | None, **_: Any
) -> Compressed:
    """By the best cosine similarity of a visual token with any text embedding."""
    if text is None:
        raise UserError("method 'text' needs the text's embeddings (text_BTD)")
    with torch.no_grad():
        similar_BNT = F.normalize(tokens_BND.float(), dim=-1) @ F.normalize(text.float(), dim=-1).transpose(1, 2)
        if mask is not None:  # no text at all: all tokens are alike
            similar_BNT = similar_BNT.masked_fill(~mask[:, None], -2.0)
    return _best(tokens_BND, similar_BNT.amax(-1), kept)


def _cells(kept: int, rows: int, columns: int) -> torch.Tensor:
    """The cell, from 0, of each token of one frame, (N,): ``kept`` cells, in bands of rows, as equal as possible."""
    bands = min(rows, max(1, round((kept * rows / columns) ** 0.5)), kept)
    bands = max(bands, -(-kept // columns))
    cell_HW = torch.empty(rows, columns, dtype=torch.long)
    for band in range(bands):
        start, end = band * kept // bands, (band + 1) * kept // bands
        cells_W = start + torch.arange(columns) * (end - start) // columns
        cell_HW[band * rows // bands : (band + 1) * rows // bands] = cells_W
    return cell_HW.flatten()


def _pool(tokens_BND: torch.Tensor, kept: int, grid: tuple[int, ...], **_: Any) -> Compressed:
    """Averages of neighbours on the grid. Each frame gets its share of them; where there are fewer than frames,
    neighbouring frames become one cell."""
    *outer, rows, columns = grid
    frames = prod(outer)
    if kept < frames:
        cell_N = (torch.arange(frames) * kept // frames).repeat_interleave(rows * columns)
    else:
        first = [frame * kept // frames for frame in range(frames + 1)]
        cell_N = torch.cat([start + _cells(end - start, rows, columns) for start, end in pairwise(first)])
    count_K = torch.bincount(cell_N, minlength=kept)
    share_KN = F.one_hot(cell_N, kept).T / count_K[:, None]
    # The position of a cell is that of its member in the middle.
    middle_K = cell_N.argsort(stable=True)[count_K.cumsum(0) - count_K + count_K // 2]
    position_K, order_K = middle_K.sort()
    sent_KN = to_device(share_KN[order_K].numpy(), tokens_BND.device)
    pooled_BKD = sent_KN.to(tokens_BND.dtype) @ tokens_BND
    return pooled_BKD, to_device(position_K.numpy(), tokens_BND.device).expand(tokens_BND.shape[0], -1)


@torch.no_grad()
def redundancy(tokens_BND: torch.Tensor, grid: tuple[int, ...], follows: Sequence[bool] | None = None) -> torch.Tensor:
    """How well others say what a token says, (B, N): the mean cosine similarity of its neighbours on the grid of its
    frame (above, below, left, right), or that of the same position of the frame before, if it is higher."""
    *outer, rows, columns = grid
    unit_XHWD = F.normalize(tokens_BND.float(), dim=-1).reshape(-1, rows, columns, tokens_BND.shape[2])
    total_XHW = unit_XHWD.new_zeros(unit_XHWD.shape[:3])
    count_XHW = torch.zeros_like(total_XHW)
    for axis, size in ((1, rows), (2, columns)):
        similar = (unit_XHWD.narrow(axis, 0, size - 1) * unit_XHWD.narrow(axis, 1, size - 1)).sum(-1)
        for start in (0, 1):
            total_XHW.narrow(axis, start, size - 1).add_(similar)
            count_XHW.narrow(axis, start, size - 1).add_(1)
    found_XHW = total_XHW / count_XHW.clamp(min=1)
    behind_X = [frame > 0 or first for first in follows or [False] * len(tokens_BND) for frame in range(prod(outer))]
    if any(behind_X):
        number_Y = to_device(np.flatnonzero(behind_X), tokens_BND.device)
        before_YHW = (unit_XHWD[number_Y] * unit_XHWD[number_Y - 1]).sum(-1)
        found_XHW[number_Y] = found_XHW[number_Y].maximum(before_YHW)
    return found_XHW.view(len(tokens_BND), -1)


def _similarity(
    tokens_BND: torch.Tensor, kept: int, grid: tuple[int, ...], follows: Sequence[bool] | None, **_: Any
) -> Compressed:
    return _best(tokens_BND, -redundancy(tokens_BND, grid, follows), kept)


def _merge(tokens_BND: torch.Tensor, kept: int, **_: Any) -> Compressed:
    """Bipartite soft matching (Token Merging, arXiv 2210.09461).

    Every other token looks for the most similar one of the rest; the most similar pairs become their mean, weighted
    by how many tokens they stand for; at most half of the tokens go in a round.
    """
    batch, tokens, width = tokens_BND.shape
    x_BND, size_BN = tokens_BND, tokens_BND.new_ones(batch, tokens)
    position_BN = torch.arange(tokens, device=tokens_BND.device).expand(batch, -1)
    while (count := x_BND.shape[1]) > kept:
        gone = min(count - kept, count // 2)
        with torch.no_grad():
            unit_BND = F.normalize(x_BND.float(), dim=-1)
            best, target = (unit_BND[:, 1::2] @ unit_BND[:, 0::2].transpose(1, 2)).max(-1)
            order = best.argsort(dim=1, descending=True, stable=True)
            leaving, staying = order[:, :gone], order[:, gone:].sort(dim=1).values
            into = target.gather(1, leaving)
        weighted_BND = x_BND * size_BN[..., None]
        even, odd = weighted_BND[:, 0::2], weighted_BND[:, 1::2]
        even = even.scatter_add(1, into[..., None].expand(-1, -1, width), odd.take_along_dim(leaving[..., None], 1))
        even_size = size_BN[:, 0::2].scatter_add(1, into, size_BN[:, 1::2].gather(1, leaving))
        size_BN = torch.cat([even_size, size_BN[:, 1::2].gather(1, staying)], 1)
        x_BND = torch.cat([even, odd.take_along_dim(staying[..., None], 1)], 1) / size_BN[..., None]
        position_BN = torch.cat([position_BN[:, 0::2], position_BN[:, 1::2].gather(1, staying)], 1)
        position_BN, back = position_BN.sort(dim=1)
        x_BND, size_BN = x_BND.take_along_dim(back[..., None], 1), size_BN.gather(1, back)
    return x_BND, position_BN


METHODS: dict[str, Callable[..., Compressed]] = {
    "uniform": _uniform,
    "random": _random,
    "text": _text,
    "pool": _pool,
    "similarity": _similarity,
    "merge": _merge,
}
MIXING = ("pool", "merge")  # methods whose tokens are made of several
ON_GRID = ("pool", "similarity")  # methods that go by rows and columns
