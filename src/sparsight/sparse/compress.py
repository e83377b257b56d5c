"""Visual Token Compressor (Sparse Training Scheme, stage I): pure functions from many visual tokens to few.

Shapes: B images, N visual tokens, K kept ones, D width, T text positions, H x W grid of the tokens, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.nn import functional as F

from sparsight.errors import UserError
from sparsight.schedules import kept_tokens

Compressed = tuple[torch.Tensor, torch.Tensor]


def compress(
    tokens_BND: torch.Tensor,
    keep: float,
    method: str = "uniform",
    *,
    grid: tuple[int, ...] | None = None,
    text_BTD: torch.Tensor | None = None,
    text_mask_BT: torch.Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Compressed:
    """Keep a share of the visual tokens of each image, in their order.

    Args:
        method: "uniform", "random", "text" (Sparse Training Scheme, figure); "pool", "similarity", "merge" (ours).
        grid: rows and columns of the tokens, or frames, rows and columns, for "pool" and "similarity"; without it they
            go along the sequence. Frames are not mixed, unless "pool" keeps fewer tokens than there are frames.
        text_BTD: the text's embeddings, for "text".
        text_mask_BT: which of them are text; all if not given.
        generators: for "random", one for each image.

    Returns:
        Tokens (B, K, D) and, for each, the position (B, K) that it had, or for a token made of several, that of one of
        them; positions rise. With ``keep`` 1 the tokens are returned as they are.

    Raises:
        UserError: ``keep`` is out of range, the method is unknown, or it lacks what it needs.
    """
    if method not in METHODS:
        raise UserError(f"method '{method}': expected one of {', '.join(METHODS)}")
    batch, tokens = tokens_BND.shape[:2]
    if grid is not None and prod(grid) != tokens:
        raise UserError(f"a grid of {' x '.join(map(str, grid))} has {prod(grid)} tokens, found {tokens}")
    kept = kept_tokens(tokens, keep)
    if kept == tokens:
        return tokens_BND, torch.arange(tokens, device=tokens_BND.device).expand(batch, -1)
    given: dict[str, Any] = {"text": text_BTD, "mask": text_mask_BT, "generators": generators}
    return METHODS[method](tokens_BND, kept, grid=grid or (1, tokens), **given)


def _pick(tokens_BND: torch.Tensor, index_BK: torch.Tensor) -> Compressed:
    index_BK = index_BK.sort(dim=1).values
    return tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[2])), index_BK


def _best(tokens_BND: torch.Tensor, score_BN: torch.Tensor, kept: int) -> Compressed:
    # Stable: of equal tokens the first ones stay, on every device.
    return _pick(tokens_BND, score_BN.argsort(dim=1, descending=True, stable=True)[:, :kept])


def _uniform(tokens_BND: torch.Tensor, kept: int, **_: Any) -> Compressed:
    tokens = tokens_BND.shape[1]
    index_K = (2 * torch.arange(kept, device=tokens_BND.device) + 1) * tokens // (2 * kept)
    return _pick(tokens_BND, index_K.expand(tokens_BND.shape[0], -1))


def _random(tokens_BND: torch.Tensor, kept: int, generators: Sequence[torch.Generator] | None, **_: Any) -> Compressed:
    # Drawn on the CPU: the same tokens whatever the device; by image: whatever the batch.
    batch, tokens = tokens_BND.shape[:2]
    each: Sequence[torch.Generator | None] = generators or [None] * batch
    draws_BN = torch.stack([torch.rand(tokens, generator=generator) for generator in each])
    return _best(tokens_BND, draws_BN.to(tokens_BND.device), kept)


@torch.no_grad()
def _relevance(tokens_BND: torch.Tensor, text_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """The best cosine similarity of a visual token with any text embedding, (B, N)."""
    similar_BNT = F.normalize(tokens_BND.float(), dim=-1) @ F.normalize(text_BTD.float(), dim=-1).transpose(1, 2)
    if mask_BT is not None:
        # No text at all: nothing is more relevant than anything else.
        similar_BNT = similar_BNT.masked_fill(~mask_BT[:, None], -2.0)
    return similar_BNT.amax(-1)


def _text(
    tokens_BND: torch.Tensor, kept: int, text: torch.Tensor | None, mask: torch.Tensor | None, **_: Any
) -> Compressed:
    if text is None:
        raise UserError("method 'text' needs the text's embeddings (text_BTD)")
    return _best(tokens_BND, _relevance(tokens_BND, text, mask), kept)


def _cells(kept: int, rows: int, columns: int) -> torch.Tensor:
    """The cell, from 0, of each token of one frame, (N,).

    Cells are cut so that exactly ``kept`` come out: rows of cells first, then each row into as equal parts as can be.
    """
    bands = min(rows, max(1, round((kept * rows / columns) ** 0.5)), kept)
    bands = max(bands, -(-kept // columns))
    cell_HW = torch.empty(rows, columns, dtype=torch.long)
    start = 0
    for band in range(bands):
        parts = (band + 1) * kept // bands - band * kept // bands
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        cell_HW[top:bottom] = start + torch.arange(columns) * parts // columns
        start += parts
    return cell_HW.flatten()


def _pool(tokens_BND: torch.Tensor, kept: int, grid: tuple[int, ...], **_: Any) -> Compressed:
    """Averages of neighbours: along the rows of the grid's coarser version, as near to ``kept`` as whole cells allow.

    Each frame gets its share of them; where there are fewer than frames, neighbouring frames become one cell.
    """
    *outer, rows, columns = grid
    frames = prod(outer)
    if kept < frames:
        cell_N = (torch.arange(frames) * kept // frames).repeat_interleave(rows * columns)
    else:
        first = [frame * kept // frames for frame in range(frames + 1)]
        cell_N = torch.cat([start + _cells(end - start, rows, columns) for start, end in pairwise(first)])
    count_K = torch.bincount(cell_N, minlength=kept)
    share_KN = F.one_hot(cell_N, kept).T / count_K[:, None]
    # The place of a cell is that of its member in the middle.
    order = cell_N.argsort(stable=True)
    middle_K = order[count_K.cumsum(0) - count_K + count_K // 2]
    place_K, by_place_K = middle_K.sort()
    pooled_BKD = share_KN[by_place_K].to(tokens_BND) @ tokens_BND
    return pooled_BKD, place_K.to(tokens_BND.device).expand(tokens_BND.shape[0], -1)


@torch.no_grad()
def redundancy(tokens_BND: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """How well a token's neighbours on the grid of its frame (above, below, left, right) say what it says: their mean
    cosine similarity to it, (B, N)."""
    *outer, rows, columns = grid
    unit_BFHWD = F.normalize(tokens_BND.float(), dim=-1).unflatten(1, (prod(outer), rows, columns))
    total_BFHW = unit_BFHWD.new_zeros(unit_BFHWD.shape[:4])
    count_BFHW = torch.zeros_like(total_BFHW)
    for axis in (2, 3):
        size = unit_BFHWD.shape[axis]
        one, other = unit_BFHWD.narrow(axis, 0, size - 1), unit_BFHWD.narrow(axis, 1, size - 1)
        similar = (one * other).sum(-1)
        for start in (0, 1):
            total_BFHW.narrow(axis, start, size - 1).add_(similar)
            count_BFHW.narrow(axis, start, size - 1).add_(1)
    return (total_BFHW / count_BFHW.clamp(min=1)).flatten(1)


def _similarity(tokens_BND: torch.Tensor, kept: int, grid: tuple[int, ...], **_: Any) -> Compressed:
    return _best(tokens_BND, -redundancy(tokens_BND, grid), kept)


def _merge(tokens_BND: torch.Tensor, kept: int, **_: Any) -> Compressed:
    """Bipartite soft matching (Token Merging, arXiv 2210.09461).

    Every other token looks for the most similar one of the rest; the most similar pairs become their mean, weighted
    by how many tokens they stand for; at most half of the tokens go in a round.
    """
    batch, tokens, width = tokens_BND.shape
    x_BND, size_BN = tokens_BND, tokens_BND.new_ones(batch, tokens)
    place_BN = torch.arange(tokens, device=tokens_BND.device).expand(batch, -1)
    while (count := x_BND.shape[1]) > kept:
        gone = min(count - kept, count // 2)
        with torch.no_grad():
            unit_BND = F.normalize(x_BND.float(), dim=-1)
            similar = unit_BND[:, 1::2] @ unit_BND[:, 0::2].transpose(1, 2)
            best, target = similar.max(-1)
            order = best.argsort(dim=1, descending=True, stable=True)
            leaving, staying = order[:, :gone], order[:, gone:].sort(dim=1).values
            into = target.gather(1, leaving)

        def wide(index: torch.Tensor) -> torch.Tensor:
            return index[..., None].expand(-1, -1, width)

        weighted_BND = x_BND * size_BN[..., None]
        even, odd = weighted_BND[:, 0::2], weighted_BND[:, 1::2]
        even = even.scatter_add(1, wide(into), odd.gather(1, wide(leaving)))
        even_size = size_BN[:, 0::2].scatter_add(1, into, size_BN[:, 1::2].gather(1, leaving))
        size_BN = torch.cat([even_size, size_BN[:, 1::2].gather(1, staying)], 1)
        place_BN = torch.cat([place_BN[:, 0::2], place_BN[:, 1::2].gather(1, staying)], 1)
        x_BND = torch.cat([even, odd.gather(1, wide(staying))], 1) / size_BN[..., None]
        place_BN, back = place_BN.sort(dim=1)
        x_BND, size_BN = x_BND.gather(1, wide(back)), size_BN.gather(1, back)
    return x_BND, place_BN


METHODS: dict[str, Callable[..., Compressed]] = {
    "uniform": _uniform,
    "random": _random,
    "text": _text,
    "pool": _pool,
    "similarity": _similarity,
    "merge": _merge,
}
