"""Where visual tokens stand in a batch: inputs by name, labels, and how many tokens each image or video has.

Shapes: B samples, T positions, M visual tokens of the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import isqrt, prod
from typing import Any, NamedTuple

import numpy as np
import torch

from sparsight.devices.copies import Host, to_device

_IGNORED = -100  # what the loss of transformers leaves out
Grid = tuple[int, ...]


class Run(NamedTuple):
    """The visual tokens of an image, of a video, or of one of its frames: the first one's number among all of the
    batch, how many, their grid (rows and columns, or frames, rows and columns), if they stand in one, and whether it is
    the frame behind that of the run before."""

    start: int
    length: int
    grid: Grid | None
    follows: bool = False


def named(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass by name, also those given by position."""
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)


def without_visual_labels(
    inputs: dict[str, Any], visual_BT: np.ndarray, kinds: str, host: Host
) -> tuple[dict[str, Any], str]:
    """A batch whose visual (and audio) positions carry no label, and a warning; "" where none did.

    ``num_items_in_batch``, which the Trainer has counted over all micro-batches before, goes down in proportion to this
    batch's labels, so that the loss is a mean over the labels that are left.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.shape != visual_BT.shape:
        return inputs, ""
    supervised_BT = host(labels) != _IGNORED
    visual, count = int((supervised_BT & visual_BT).sum()), int(supervised_BT.sum())
    if not visual:
        return inputs, ""
    inputs = inputs | {"labels": labels.masked_fill(to_device(visual_BT, labels.device), _IGNORED)}
    if isinstance(shifted := inputs.get("shift_labels"), torch.Tensor) and shifted.shape == visual_BT.shape:
        next_BT = np.pad(visual_BT[:, 1:], ((0, 0), (0, 1)))
        inputs["shift_labels"] = shifted.masked_fill(to_device(next_BT, shifted.device), _IGNORED)
    if inputs.get("num_items_in_batch") is not None and visual < count:
        inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * ((count - visual) / count)
    return inputs, (
        f"{visual} of the {count} labels of this batch stood on {kinds} tokens (placeholders), and were masked: "
        "they are no text, and the compressor drops most of them. Data of the form prompt / completion, or "
        "assistant-only labels, have none"
    )


def sizes_of(owner: Any, found: Any, pixels: Any) -> list[int]:
    """Visual tokens of each image, or video, from what ``get_..._features`` gave; empty ones are left out."""
    if (features := getattr(found, "pooler_output", found)) is None:
        return []
    sizes = [int(tokens.shape[-2]) for tokens in features]
    per_sample = "pixel_attention_mask" in inspect.signature(owner.get_image_features).parameters
    if per_sample and isinstance(pixels, torch.Tensor) and pixels.ndim == 5 and len(sizes) == len(pixels):
        # SmolVLM, Idefics3: all images of a sample in one; those of zeros are padding, the others have equally many.
        images = len(found.last_hidden_state)
        if images and sum(sizes) % images == 0:
            sizes = [sum(sizes) // images] * images
    return [size for size in sizes if size]


def unbroken(positions_M2: np.ndarray) -> list[int]:
    """Lengths of the runs of positions (sample, position) that follow one another."""
    offset_M = positions_M2 @ (2**32, 1) - np.arange(len(positions_M2))
    ends = np.flatnonzero(np.diff(offset_M, append=-1)) + 1
    return np.diff(ends, prepend=0).tolist()


def audio_runs(positions_M2: np.ndarray, first: int) -> list[Run]:
    """The clips of a batch, or their pieces where a video's tokens stand between; the first token is number ``first``.
    Clips with nothing between them are one."""
    lengths = unbroken(positions_M2)
    starts = accumulate(lengths, initial=first)
    return [Run(start, length, None) for start, length in zip(starts, lengths, strict=False)]


def runs(
    positions_M2: np.ndarray,
    video_M: np.ndarray,
    sizes: Mapping[str, list[int]],
    inputs: Mapping[str, Any],
    config: Any,
    *,
    on_grid: bool,
    newline: bool = False,
) -> list[Run]:
    """The runs of a batch, in reading order.

    Args:
        video_M: which tokens are those of videos.
        sizes: tokens of each "image" and each "video", as their features say.
        inputs: of the model; ``image_grid_thw``, ``image_merge_sizes`` (also of videos), ``image_sizes``, and the
            frames of ``pixel_values_videos`` give grids.
        on_grid: whether tokens of images stand in grids at all: not queries, nor tiles.
        newline: whether the model may put a token for the end of a line behind a video.
    """
    found = []
    for kind, of_kind_M in (("image", ~video_M), ("video", video_M)):
        starts = np.flatnonzero(of_kind_M)
        grids = _grids(kind, unbroken(positions_M2[starts]), sizes.get(kind, []), inputs, config, newline)
        firsts = accumulate((length for length, *_ in grids), initial=0)
        for (length, grid, follows), first in zip(grids, firsts, strict=False):
            fits = (on_grid or kind == "video") and grid is not None and prod(grid) == length
            found.append(Run(int(starts[first]), length, grid if fits else None, follows))
    return sorted(found, key=lambda run: run.start)


def _grids(
    kind: str, pieces: list[int], sizes: list[int], inputs: Mapping[str, Any], config: Any, newline: bool
) -> list[tuple[int, Grid | None, bool]]:
    """Length and grid of each run of a kind, and whether it follows the one before. A square is taken for granted of
    images, and of frames whose number is known."""
    count, vision = sum(pieces), getattr(config, "vision_config", None)
    patches, given = inputs.get(f"{kind}_grid_thw"), inputs.get("image_sizes")
    if patches is not None:
        merge = inputs.get(f"{kind}_merge_sizes")
        merges = [getattr(vision, "spatial_merge_size", 1)] * len(patches) if merge is None else merge.tolist()
        grids = [(t, h // m, w // m) for (t, h, w), m in zip(patches.tolist(), merges, strict=True)]
        frames = [(h * w, (h, w), frame > 0) for t, h, w in grids for frame in range(t)]
        if pieces == [length for length, *_ in frames]:  # Qwen3-VL: something stands between frames
            return list(frames)
        if count == sum(map(prod, grids)):
            return [(prod(grid), grid if grid[0] > 1 else grid[1:], False) for grid in grids]
    lengths = sizes if sum(sizes) == count else pieces
    if kind == "video" and patches is None:
        pixels = inputs.get("pixel_values_videos")
        known = isinstance(pixels, torch.Tensor) and pixels.ndim == 5 and len(pixels) == len(lengths)
        frames_of_each = pixels.shape[1] if known else 0  # type: ignore[union-attr]
        return [run for length in lengths for run in _video(length, frames_of_each, newline)]
    if patches is not None:
        return [(length, None, False) for length in lengths]
    if given is not None and len(given) == len(lengths) and hasattr(config, "spatial_merge_size"):
        pixels = vision.patch_size * config.spatial_merge_size  # type: ignore[union-attr]
        tall = np.asarray(given).tolist()
        return [(length, (h // pixels, w // pixels), False) for length, (h, w) in zip(lengths, tall, strict=True)]
    return [(length, (round(length**0.5),) * 2, False) for length in lengths]


def _video(length: int, frames: int, newline: bool) -> list[tuple[int, Grid | None, bool]]:
    """The runs of a video of so many square frames (0: not known) and, where the model puts one (LLaVA-OneVision), a
    token for the end of a line behind them."""
    side = isqrt(length // frames) if frames else 0
    ends = newline and length == frames * side**2 + 1
    if not side or length != frames * side**2 + ends:
        return [(length, None, False)]
    return [(length - ends, (frames, side, side), False), *[(1, (1, 1), False)] * ends]
