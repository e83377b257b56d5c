"""Vision encoders: one way to get feature levels out of any of them, and EfficientNet-lite0 without timm.

Shapes: B images, C channels, H x W patches, S sequence (prefix tokens + patches), P patch side in pixels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparsight.cost.shapes import pick_levels
from sparsight.devices.flops import flop_counter
from sparsight.errors import UserError


def _patchify(pixel_values: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, h, w) -> patches (B, H*W, P*P*C) and their grid (B, 2), as SigLIP2 takes them."""
    if any(side % patch for side in pixel_values.shape[2:]):
        raise UserError(f"images of {tuple(pixel_values.shape[2:])} pixels do not divide into patches of {patch}")
    x_BHWPPC = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
    grid = torch.tensor(x_BHWPPC.shape[1:3], device=pixel_values.device)
    return x_BHWPPC.flatten(3).flatten(1, 2), grid.expand(len(pixel_values), 2)


def takes_grids(encoder: nn.Module) -> bool:
    """Whether an encoder takes images at their native resolution: patches and a grid (Qwen2.5-VL and its like)."""
    return "grid_thw" in inspect.signature(encoder.forward).parameters


def _native_maps(
    encoder: Any, pixel_values: torch.Tensor, grids_I3: torch.Tensor | None, **asked: bool
) -> tuple[list[torch.Tensor], Any]:
    """Hidden states of a native-resolution encoder as maps (I, C, H, W), padded with zeros at the bottom and right, and
    its whole output."""
    config = encoder.config
    patch, merge = config.patch_size, config.spatial_merge_size
    if grids_I3 is None:  # square images: cut into patches as the encoder's own processor does
        images, _, height, width = pixel_values.shape
        rows, columns = height // patch, width // patch
        if height % (patch * merge) or width % (patch * merge):
            raise UserError(
                f"images of {height}x{width} pixels do not divide into {merge}x{merge} patches of {patch}: "
                f"use a multiple of {patch * merge}"
            )
        x = pixel_values.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, config.temporal_patch_size, -1, -1)
        pixel_values = x.flatten(5).flatten(0, 4)
        grids_I3 = torch.tensor([[1, rows, columns]] * images, device=pixel_values.device)
    if (grids_I3[:, 0] != 1).any():
        raise UserError(f"expected images, found videos: grids (frames, rows, columns) {grids_I3.tolist()}")
    output = encoder(pixel_values, grid_thw=grids_I3, output_hidden_states=True, **asked)
    order = None
    if hasattr(encoder, "permute_input_for_window_attn"):
        from transformers.vision_utils import get_vision_window_index

        window_index, _ = get_vision_window_index(grids_I3, merge, config.window_size, patch)
        order = torch.argsort(window_index).to(pixel_values.device)
    sizes = [(rows, columns) for _, rows, columns in grids_I3.tolist()]
    high, wide = (max(sides) for sides in zip(*sizes, strict=True))
    maps = []
    for state_SC in output.hidden_states:
        if order is not None:
            state_SC = state_SC.unflatten(0, (-1, merge * merge))[order].flatten(0, 1)
        parts = state_SC.split([rows * columns for rows, columns in sizes])
        x_ICHW = state_SC.new_zeros(len(sizes), state_SC.shape[-1], high, wide)
        for image, (part_PC, (rows, columns)) in enumerate(zip(parts, sizes, strict=True)):
            square = part_PC.view(rows // merge, columns // merge, merge, merge, -1).permute(4, 0, 2, 1, 3)
            x_ICHW[image, :, :rows, :columns] = square.reshape(-1, rows, columns)
        maps.append(x_ICHW)
    return maps, output


def _run(encoder: Any, pixel_values: torch.Tensor, **asked: bool) -> Any:
    accepted = inspect.signature(encoder.forward).parameters
    if isinstance(encoder, PreTrainedModel) and "pixel_values" not in accepted:
        raise UserError(f"{type(encoder).__name__} gives no spatial features: it takes {list(accepted)}, no pixels")
    asked["output_hidden_states"] = True
    extra: dict[str, Any] = {key: asked[key] for key in asked if key in accepted or "kwargs" in accepted}
    if "interpolate_pos_encoding" in accepted:
        extra["interpolate_pos_encoding"] = True
    if "spatial_shapes" in accepted:
        patches, grid = _patchify(pixel_values, encoder.config.patch_size)
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        extra["pixel_attention_mask"] = mask
        return encoder(patches, spatial_shapes=grid, **extra)
    return encoder(pixel_values, **extra)


def feature_levels(
    encoder: nn.Module,
    pixel_values: torch.Tensor,
    levels: Sequence[int] | None = None,
    image_grid_thw: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Feature levels of any vision encoder, lower level first, all on the grid of the finest.

    Args:
        encoder: gives ``feature_maps`` (B, C, H, W), or ``hidden_states`` as (B, S, C) or (B, C, H, W).
        pixel_values: (B, 3, h, w), normalised as the encoder expects.
        levels: indices into ``hidden_states`` (i: the output of block i) or into ``feature_maps``. ``None`` takes
            two: two thirds up and next to last (Chain-of-Sight: 16 and 23 of 24), or the last two maps.
        image_grid_thw: (I, 3), when ``pixel_values`` are the patches that a native-resolution encoder's own
            processor makes. Maps of several sizes are padded with zeros at the bottom and right.

    Returns:
        One (B, H, W, C_level) for each level. Prefix tokens (CLS, registers) are dropped.

    Raises:
        UserError: the encoder gives no spatial features, or has no such level.
    """
    return encode(encoder, pixel_values, levels, image_grid_thw)[0]


def encode(
    encoder: nn.Module,
    pixel_values: torch.Tensor,
    levels: Sequence[int] | None = None,
    image_grid_thw: torch.Tensor | None = None,
    **asked: bool,
) -> tuple[list[torch.Tensor], Any]:
    """`feature_levels`, and the encoder's whole output; ``asked`` is what else it is to give (output_attentions)."""
    states, maps, output = _states(encoder, pixel_values, image_grid_thw, **asked)
    picked = [states[level] for level in pick_levels(len(states), maps, levels, type(encoder).__name__)]
    picked = [_spatial(state, encoder, pixel_values) for state in picked]
    height, width = (max(x.shape[axis] for x in picked) for axis in (1, 2))
    return [_stretch(x_BHWC, height, width) for x_BHWC in picked], output


def _states(
    encoder: nn.Module, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None, **asked: bool
) -> tuple[Sequence[torch.Tensor], bool, Any]:
    """Everything that could be a level, whether the encoder gives maps, and its whole output."""
    name = type(encoder).__name__
    if takes_grids(encoder):
        native, output = _native_maps(encoder, pixel_values, image_grid_thw, **asked)
        return native, False, output
    if image_grid_thw is not None:
        raise UserError(f"{name} takes images of one size, but was given grids of patches (image_grid_thw)")
    output = _run(encoder, pixel_values, **asked)
    maps = getattr(output, "feature_maps", None)
    states = maps if maps is not None else getattr(output, "hidden_states", None)
    if not states:
        found = list(output) if isinstance(output, dict) else type(output).__name__
        raise UserError(f"{name} gives no spatial features: its output has no hidden states, only {found}")
    return states, maps is not None, output


@torch.no_grad()
def level_numbers(encoder: nn.Module, image_size: int, *choices: Sequence[int] | None) -> list[list[int]]:
    """Choices of feature levels as indices from 0, so that they can be compared."""
    parameter = next(encoder.parameters())
    pixels = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    states, maps, _ = _states(encoder, pixels, None)
    return [pick_levels(len(states), maps, levels, type(encoder).__name__) for levels in choices]


def _spatial(x: torch.Tensor, encoder: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    if takes_grids(encoder):
        return x.permute(0, 2, 3, 1)
    if x.shape[0] != pixel_values.shape[0]:
        raise UserError(
            f"{type(encoder).__name__} gives hidden states {tuple(x.shape)} for {pixel_values.shape[0]} images: "
            "it does not keep the images of a batch apart"
        )
    if x.ndim == 4:
        return x.permute(0, 2, 3, 1)
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if patch is None or x.ndim != 3:
        raise UserError(
            f"{type(encoder).__name__} gives no spatial features: hidden states {tuple(x.shape)}, patch size {patch}"
        )
    patch_h, patch_w = (patch, patch) if isinstance(patch, int) else patch
    height, width = pixel_values.shape[2] // patch_h, pixel_values.shape[3] // patch_w
    prefix = x.shape[1] - height * width
    if prefix < 0:
        raise UserError(
            f"{type(encoder).__name__} gives {x.shape[1]} states for {height}x{width} patches of {patch} px: "
            "these are no patch features"
        )
    return x[:, prefix:].unflatten(1, (height, width))


def _stretch(x_BHWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if x_BHWC.shape[1:3] == (height, width):
        return x_BHWC
    return F.interpolate(x_BHWC.permute(0, 3, 1, 2), size=(height, width), mode="nearest").permute(0, 2, 3, 1)


_POSITIONS = re.compile(r"position|rotary|pos_emb|\brope")


def has_own_positions(encoder: nn.Module) -> bool:
    """Whether a patch feature knows its place. Convolutional encoders do not; transformers do."""
    return any(_POSITIONS.search(name) for name in [n for n, _ in encoder.named_modules()] + list(encoder.state_dict()))


def sincos_2d(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions in units of the side, (H, W, C): the same place at any resolution."""
    quarter = -(-channels // 4)
    wave = torch.pi * 2.0 ** torch.linspace(0, 4, quarter, device=device)
    rows = ((torch.arange(height, device=device) + 0.5) / height)[:, None] * wave
    columns = ((torch.arange(width, device=device) + 0.5) / width)[:, None] * wave
    rows_HC = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(-1, width, -1)
    columns_WC = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(height, -1, -1)
    return torch.cat([rows_HC, columns_WC], -1)[..., :channels].to(dtype)


def count_flops(encoder: Any, image_size: int | tuple[int, int], levels: Sequence[int] | None = None) -> float:
    """FLOPs of one image's pass, counted on the real modules (attention in full).

    ``image_size``: the side of a square image, or height and width, in pixels.
    The backward pass is in it if parameters of the encoder train: it runs only below the last feature level.
    """
    parameter = next(encoder.parameters())
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    with flop_counter(encoder) as counter, torch.set_grad_enabled(bool(trained)):
        outputs = feature_levels(encoder, pixels, levels)
        if trained:
            torch.autograd.grad([level.sum() for level in outputs], trained, allow_unused=True)
    return float(counter.get_total_flops())
