"""Where visual tokens stand in a batch: inputs by name, labels, and how many tokens each image or video has.

Shapes: B samples, T positions, M visual tokens of the whole batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import torch

_IGNORED = -100  # what the loss of transformers leaves out
# What says where tokens stand in an image or a video.
GRID_INPUTS = ("image_grid_thw", "video_grid_thw", "image_merge_sizes", "video_merge_sizes", "image_sizes")
Grid = tuple[int, ...]


class Run(NamedTuple):
    """The visual tokens of an image, of a video, or of one of its frames: the first one's number among all of the
    batch, how many, and their grid (rows and columns, or frames, rows and columns), if they stand in one."""

    start: int
    length: int
    grid: Grid | None


def named(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass by name, also those given by position."""
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)


def without_visual_labels(inputs: dict[str, Any], visual_BT: torch.Tensor) -> tuple[dict[str, Any], int, int]:
    """A batch whose visual positions carry no label, how many did, and how many labels there were.

    ``num_items_in_batch``, which the Trainer has counted over all micro-batches before, goes down in proportion to this
    batch's labels, so that the loss is a mean over the labels that are left.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.shape != visual_BT.shape:
        return inputs, 0, 0
    visual_BT = visual_BT.to(labels.device)
    labelled_BT = labels != _IGNORED
    visual, count = int((labelled_BT & visual_BT).sum()), int(labelled_BT.sum())
    if not visual:
        return inputs, 0, count
    inputs = inputs | {"labels": labels.masked_fill(visual_BT, _IGNORED)}
    if isinstance(shifted := inputs.get("shift_labels"), torch.Tensor) and shifted.shape == visual_BT.shape:
        next_BT = torch.cat([visual_BT[:, 1:], torch.zeros_like(visual_BT[:, :1])], 1)
        inputs["shift_labels"] = shifted.masked_fill(next_BT.to(shifted.device), _IGNORED)
    if inputs.get("num_items_in_batch") is not None and visual < count:
        inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * ((count - visual) / count)
    return inputs, visual, count


def tell_of_visual_labels(visual: int, count: int) -> None:
    warnings.warn(
        f"{visual} of the {count} labels of this batch stood on visual tokens (image placeholders), and were masked: "
        "they are no text, and the compressor drops most of them. Data of the form prompt / completion, or "
        "assistant-only labels, have none",
        stacklevel=2,
    )


def sizes_of(owner: Any, features: Any, pixels: Any) -> list[int]:
    """Visual tokens of each image, or video, from what ``get_..._features`` gave; empty ones are left out."""
    if features is None:
        return []
    sizes = [int(tokens.shape[-2]) for tokens in features]
    per_sample = "pixel_attention_mask" in inspect.signature(owner.get_image_features).parameters
    if per_sample and isinstance(pixels, torch.Tensor) and pixels.ndim == 5 and len(sizes) == len(pixels):
        # SmolVLM, Idefics3: all images of a sample in one; those of zeros are padding, the others have equally many.
        images = int((pixels != 0).flatten(2).any(-1).sum())
        if images and sum(sizes) % images == 0:
            sizes = [sum(sizes) // images] * images
    return [size for size in sizes if size]


def unbroken(places_M2: torch.Tensor) -> list[int]:
    """Lengths of the runs of positions (sample, position) that follow one another."""
    if not len(places_M2):
        return []
    step_M = places_M2[1:] - places_M2[:-1]
    breaks = ((step_M[:, 0] != 0) | (step_M[:, 1] != 1)).nonzero().flatten().add(1).tolist()
    return [end - start for start, end in pairwise([0, *breaks, len(places_M2)])]


def runs(
    places_M2: torch.Tensor,
    video_M: torch.Tensor,
    sizes: Mapping[str, list[int]],
    inputs: Mapping[str, Any],
    config: Any,
    on_grid: bool,
) -> list[Run]:
    """The runs of a batch, in reading order.

    Args:
        video_M: which tokens are those of videos.
        sizes: tokens of each "image" and each "video", as their features say.
        inputs: of the model; `GRID_INPUTS` say the grids.
        on_grid: whether tokens stand in grids at all: not queries, nor tiles.
    """
    found = []
    for kind, of_kind_M in (("image", ~video_M), ("video", video_M)):
        number_m = of_kind_M.nonzero().flatten()
        pieces = unbroken(places_M2[number_m])
        grids = _grids(kind, pieces, sizes.get(kind, []), inputs, config)
        starts = number_m.tolist()
        for (length, grid), start in zip(grids, accumulate((size for size, _ in grids), initial=0), strict=False):
            fits = on_grid and grid is not None and prod(grid) == length
            found.append(Run(starts[start], length, grid if fits else None))
    return sorted(found, key=lambda run: run.start)


def _grids(
    kind: str, pieces: list[int], sizes: list[int], inputs: Mapping[str, Any], config: Any
) -> list[tuple[int, Grid | None]]:
    """Length and grid of each run of a kind. A square is taken for granted of images alone."""
    count, vision = sum(pieces), getattr(config, "vision_config", None)
    patches = inputs.get(f"{kind}_grid_thw")
    if patches is not None:
        merge = inputs.get(f"{kind}_merge_sizes")
        merges = [getattr(vision, "spatial_merge_size", 1)] * len(patches) if merge is None else merge.tolist()
        grids = [(t, h // m, w // m) for (t, h, w), m in zip(patches.tolist(), merges, strict=True)]
        frames = [grid[1:] for grid in grids for _ in range(grid[0])]
        if pieces == [prod(frame) for frame in frames]:  # Qwen3-VL: something stands between frames
            return list(zip(pieces, frames, strict=True))
        if count == sum(map(prod, grids)):
            return [(prod(grid), grid if grid[0] > 1 else grid[1:]) for grid in grids]
    lengths = sizes if sum(sizes) == count else pieces
    if kind == "video" or patches is not None:
        return [(length, None) for length in lengths]
    given = inputs.get("image_sizes")
    if given is not None and len(given) == len(lengths) and hasattr(config, "spatial_merge_size"):
        pixels = vision.patch_size * config.spatial_merge_size  # type: ignore[union-attr]
        tall = torch.as_tensor(given).tolist()
        return [(length, (h // pixels, w // pixels)) for length, (h, w) in zip(lengths, tall, strict=True)]
    return [(length, (round(length**0.5),) * 2) for length in lengths]
