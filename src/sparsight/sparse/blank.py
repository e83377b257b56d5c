"""A blank image for any VLM: a rank with fewer inputs than others sends it through its vision tower."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from sparsight.errors import UserError


def blank_features(owner: Any, like: torch.Tensor) -> torch.Tensor:
    """The sum of what the language model is given of one blank image, through ``owner.get_image_features``.

    Raises:
        UserError: the model takes images in a form that we do not know.
    """
    try:
        found = owner.get_image_features(**blank_image(owner, like), return_dict=True)
    except Exception as error:
        raise UserError(
            f"{type(owner).__name__}: this rank's batch has no image, or no video, while others may have some, and all "
            f"ranks must go through the vision tower together. A blank image did not fit this model ({error}): put one "
            "image into every rank's batch, and one video if there are any"
        ) from error
    if hasattr(found, "pooler_output"):  # the tower's other outputs reach nothing, nor may they get gradients here
        found = [found.pooler_output, getattr(found, "deepstack_features", None)]
    return torch.stack([tensor.float().sum() for tensor in tensors(found)]).sum()


def blank_image(owner: Any, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of ``get_image_features`` for one black image; small where the encoder takes any size."""
    config = owner.config
    accepted = inspect.signature(owner.get_image_features).parameters
    vision = config if hasattr(config, "image_size") else config.vision_config
    if "image_grid_thw" in accepted and not hasattr(vision, "image_size"):
        merge, patch = getattr(vision, "spatial_merge_size", 1), vision.patch_size
        channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
        pixels = like.new_zeros(merge**2, channels * getattr(vision, "temporal_patch_size", 1) * patch**2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, merge, merge]], device=like.device)}
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = like.new_zeros(1, 3, height, width)
    if "pixel_attention_mask" in accepted:  # an image of zeros is taken for padding there, and thrown away
        return {"pixel_values": pixels[:, None] + 1.0}
    tiled = hasattr(config, "image_grid_pinpoints")  # the whole image, and one tile
    if tiled or getattr(vision, "model_type", "") == "pixtral":
        pixels = pixels[:, None].repeat(1, 2, 1, 1, 1) if tiled else pixels
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]], device=like.device)}
    return {"pixel_values": pixels}


def tensors(found: Any) -> list[torch.Tensor]:
    """The tensors in a nest of lists and tuples, in order."""
    if isinstance(found, (list, tuple)):
        return [tensor for value in found for tensor in tensors(value)]
    return [found] if isinstance(found, torch.Tensor) else []
