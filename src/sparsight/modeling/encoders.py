"""Vision encoders: one way to get feature levels out of any of them.

Shapes: I images, C channels, H x W patches, S sequence (prefix tokens + patches), P patch side in pixels.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, vision_utils

from sparsight.compat import returns_tuple
from sparsight.cost.shapes import pick_levels, tell_if_cut
from sparsight.devices.copies import to_device
from sparsight.devices.flops import flop_counter
from sparsight.errors import UserError

_POSITIONS = re.compile(r"position|rotary|pos_emb|\brope")
# What makes of hidden states that which a language model or a classifier reads.
_HEADS = re.compile(r"([a-z]\w*\.)*(merger|head|pooler|deepstack_merger_list\.\d+)")


def feature_levels(
    encoder: nn.Module,
    pixel_values: Tensor,
    levels: Sequence[int] | None = None,
    image_grid_thw: Tensor | None = None,
) -> list[Tensor]:
    """Feature levels (I, H, W, C_level) of any vision encoder, lower level first, all on the grid of the finest.

    Blocks of a transformer above the last level do not run, nor heads or mergers: nobody reads them (ours). Prefix
    tokens (CLS, registers) are dropped. Raises UserError where there are no spatial features, or no such level.

    Args:
        encoder: gives ``feature_maps`` (I, C, H, W), or ``hidden_states`` as (I, S, C) or (I, C, H, W).
        pixel_values: (I, 3, h, w), normalised as the encoder expects.
        levels: indices into ``hidden_states`` (i: the output of block i) or into ``feature_maps``. ``None`` takes
            two: two thirds up and next to last (Chain-of-Sight: 16 and 23 of 24), or the last two maps.
        image_grid_thw: (I, 3), when ``pixel_values`` are the patches that a native-resolution encoder's own
            processor makes. Maps of several sizes are padded with zeros at the bottom and right.
    """
    return encode(encoder, pixel_values, levels, image_grid_thw)[0]


def encode(
    encoder: nn.Module,
    pixel_values: Tensor,
    levels: Sequence[int] | None = None,
    image_grid_thw: Tensor | None = None,
    *,
    whole: bool = False,
    **asked: bool,
) -> tuple[list[Tensor], Any, list[int]]:
    """`feature_levels`, the encoder's output, and the levels' indices from 0; ``whole``: all of the encoder runs, and
    all of its output counts; ``asked`` is what else the encoder is to give (output_attentions)."""
    name, native = type(encoder).__name__, takes_grids(encoder)
    # A compiled graph leaves out by itself what nobody reads.
    blocks = [] if whole or torch.compiler.is_compiling() else _blocks(encoder)
    states: Any
    with _unread(encoder, blocks, max(pick_levels(len(blocks) + 1, False, levels, name)) if blocks else 0):
        if native:
            states, output = _native_maps(encoder, pixel_values, image_grid_thw, **asked)
        elif image_grid_thw is not None:
            raise UserError(f"{name} takes images of one size, but was given grids of patches (image_grid_thw)")
        else:
            output = _run(encoder, pixel_values, **asked)
            states = getattr(output, "feature_maps", None) or getattr(output, "hidden_states", None)
            if not states:
                found = list(output) if isinstance(output, dict) else type(output).__name__
                raise UserError(f"{name} gives no spatial features: its output has no hidden states, only {found}")
    assert not blocks or len(states) == len(blocks) + 1
    numbers = pick_levels(len(states), getattr(output, "feature_maps", None) is not None, levels, name)
    maps = [states[n] if native else _spatial(states[n], encoder, pixel_values) for n in numbers]
    height, width = (max(x_IHWC.shape[axis] for x_IHWC in maps) for axis in (1, 2))
    return [_stretch(x_IHWC, height, width) for x_IHWC in maps], output, numbers


def _blocks(encoder: Any) -> list[nn.Module]:
    """The blocks whose inputs and last output are the hidden states; none, where they are not all alike."""
    config = getattr(encoder, "config", None)
    count = next((n for key in ("num_hidden_layers", "depth") if (n := getattr(config, key, None)) is not None), None)
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            first, last = ([p.shape for p in block.parameters()] for block in (module[0], module[-1]))
            return list(module) if first == last and len({*map(type, module)}) == 1 else []
    return []


@contextmanager
def _unread(encoder: nn.Module, blocks: Sequence[nn.Module], last: int) -> Iterator[None]:
    """Within, blocks from ``last`` on, and heads, hand on what they are given. Without blocks, all of it runs."""
    heads = [module for name, module in encoder.named_modules() if blocks and _HEADS.fullmatch(name)]
    before = {module: module.__dict__.get("forward") for module in (*blocks[last:], *heads)}
    for module in before:
        module.forward = partial(_handed_on, module not in heads and returns_tuple(module))
    try:
        yield
    finally:
        for module, plain in before.items():
            del module.forward
            if plain is not None:
                module.forward = plain


def _handed_on(as_tuple: bool, x: Tensor, *_: Any, **__: Any) -> Any:
    return (x, None) if as_tuple else x


@torch.no_grad()
def probe(encoder: nn.Module, image_size: int, levels: Sequence[int] | None) -> tuple[list[Tensor], list[int]]:
    """Feature levels of two grey images, the truth about widths and map size, and their indices from 0."""
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if isinstance(patch, int) and not takes_grids(encoder):  # which refuses such a size by itself
        tell_if_cut(type(encoder).__name__, image_size, patch, getattr(encoder.config, "image_size", None))
    was_training = encoder.training
    maps, _, numbers = encode(encoder.eval(), _grey(encoder, image_size, image_size, 2), levels)
    encoder.train(was_training)
    return [x_IHWC.float() for x_IHWC in maps], numbers


def count_flops(encoder: Any, image_size: int | tuple[int, int], levels: Sequence[int] | None = None) -> float:
    """FLOPs of the pass of an image, counted on the real modules (attention in full); sides in pixels.

    The backward pass is in it if parameters of the encoder train: it runs only below the last feature level.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    trained = [p for p in encoder.parameters() if p.requires_grad]
    with flop_counter(encoder) as counter, torch.set_grad_enabled(bool(trained)):
        maps = feature_levels(encoder, _grey(encoder, height, width, 1), levels)
        if trained:
            torch.autograd.grad([x_IHWC.sum() for x_IHWC in maps], trained, allow_unused=True)
    return float(counter.get_total_flops())


def takes_grids(encoder: nn.Module) -> bool:
    """Whether an encoder takes images at their native resolution: patches and a grid (Qwen2.5-VL and its like)."""
    return "grid_thw" in inspect.signature(encoder.forward).parameters


def has_own_positions(encoder: nn.Module) -> bool:
    """Whether a patch feature knows its position. Convolutional encoders do not; transformers do."""
    return any(_POSITIONS.search(name) for name in [n for n, _ in encoder.named_modules()] + list(encoder.state_dict()))


def sincos_2d(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed 2-D sine-cosine positions in units of the side, (H, W, C): the same point at any resolution."""
    wave = torch.pi * 2.0 ** torch.linspace(0, 4, -(-channels // 4), device=device)
    rows, columns = (((torch.arange(side, device=device) + 0.5) / side)[:, None] * wave for side in (height, width))
    rows_HWC = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(-1, width, -1)
    columns_HWC = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(height, -1, -1)
    return torch.cat([rows_HWC, columns_HWC], -1)[..., :channels].to(dtype)


def _grey(encoder: nn.Module, height: int, width: int, images: int) -> Tensor:
    like = next(encoder.parameters())
    return torch.zeros(images, 3, height, width, dtype=like.dtype, device=like.device)


def _run(encoder: Any, pixel_values: Tensor, **asked: bool) -> Any:
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
        return encoder(patches, spatial_shapes=grid, pixel_attention_mask=mask, **extra)
    return encoder(pixel_values, **extra)


def _patchify(pixel_values: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """(I, C, h, w) -> patches (I, H*W, P*P*C) and their grid (I, 2), as SigLIP2 takes them."""
    if any(side % patch for side in pixel_values.shape[2:]):
        raise UserError(f"images of {tuple(pixel_values.shape[2:])} pixels do not divide into patches of {patch}")
    x_IHWPPC = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
    grid = to_device(np.array(x_IHWPPC.shape[1:3]), pixel_values.device)
    return x_IHWPPC.flatten(3).flatten(1, 2), grid.expand(len(pixel_values), 2)


def _native_maps(
    encoder: Any, pixel_values: Tensor, grids_I3: Tensor | None, **asked: bool
) -> tuple[list[Tensor], Any]:
    """Hidden states of a native-resolution encoder as maps (I, H, W, C), padded with zeros at the bottom and right, and
    its whole output."""
    config, merge = encoder.config, encoder.config.spatial_merge_size
    if grids_I3 is None:
        pixel_values, grids_I3 = _native_patches(pixel_values, config)
    grids_I3, device = grids_I3.cpu(), pixel_values.device  # the collator's are there
    if (grids_I3[:, 0] != 1).any():
        raise UserError(f"expected images, found videos: grids (frames, rows, columns) {grids_I3.tolist()}")
    asked |= {"output_hidden_states": True}
    known = _known(encoder, grids_I3, device)
    order = known["window_index"].argsort() if "window_index" in known else None
    output = encoder(pixel_values, grid_thw=to_device(grids_I3.numpy(), device), **known, **asked)
    sizes = [(rows, columns) for _, rows, columns in grids_I3.tolist()]
    maps = []
    for state_SC in output.hidden_states:
        if order is not None:
            state_SC = state_SC.unflatten(0, (-1, merge * merge))[order].flatten(0, 1)
        x_IHWC = state_SC.new_zeros(len(sizes), *(max(sides) for sides in zip(*sizes, strict=True)), state_SC.shape[-1])
        parts = state_SC.split([rows * columns for rows, columns in sizes])
        for image, (part_PC, (rows, columns)) in enumerate(zip(parts, sizes, strict=True)):
            squares = part_PC.view(rows // merge, columns // merge, merge, merge, -1)
            x_IHWC[image, :rows, :columns] = squares.transpose(1, 2).reshape(rows, columns, -1)
        maps.append(x_IHWC)
    return maps, output


def _known(encoder: Any, grids_I3: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What an encoder would ask the device for, counted on the host, by the names under which transformers takes it."""
    used, config, known = vars(sys.modules[type(encoder).__module__]), encoder.config, dict[str, Tensor]()
    if {"get_vision_cu_seqlens", "get_vision_attention_seqlens"} & used.keys():
        known["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grids_I3)
    if "get_vision_position_ids" in used and hasattr(encoder, "spatial_merge_size"):
        known["position_ids"] = vision_utils.get_vision_position_ids(grids_I3, encoder.spatial_merge_size)
    if hasattr(encoder, "interpolation_mode"):  # of learnt positions
        how = encoder.num_grid_per_side, encoder.interpolation_mode, encoder.interpolation_align_corners
        known["interp_indices"], known["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grids_I3, *how, config.spatial_merge_size
        )
    if hasattr(encoder, "permute_input_for_window_attn"):
        known["window_index"], known["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grids_I3, config.spatial_merge_size, config.window_size, config.patch_size
        )
    flash = "flash" in (config._attn_implementation or "")  # others let the host cut at the edges of images
    return {k: v if k.startswith("cu_") and not flash else to_device(v.numpy(), device) for k, v in known.items()}


def _native_patches(pixel_values: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Images of one size (I, 3, h, w) as the patches and grids (I, 3) that a native encoder's own processor makes."""
    patch, merge, (images, _, height, width) = config.patch_size, config.spatial_merge_size, pixel_values.shape
    if height % (patch * merge) or width % (patch * merge):
        raise UserError(
            f"images of {height}x{width} pixels do not divide into {merge}x{merge} patches of {patch}: "
            f"use a multiple of {patch * merge}"
        )
    x = pixel_values.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*[-1] * 6, config.temporal_patch_size, -1, -1)
    grids_I3 = torch.tensor([[1, height // patch, width // patch]] * images)
    return x.flatten(5).flatten(0, 4), grids_I3


def _spatial(x: Tensor, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """A state (I, S, C) or (I, C, H, W) as a map (I, H, W, C)."""
    name, images = type(encoder).__name__, len(pixel_values)
    if len(x) != images:
        raise UserError(
            f"{name} gives hidden states {tuple(x.shape)} for {images} images: it does not keep the images of a batch "
            "apart"
        )
    if x.ndim == 4:
        return x.permute(0, 2, 3, 1)
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if patch is None or x.ndim != 3:
        raise UserError(f"{name} gives no spatial features: hidden states {tuple(x.shape)}, patch size {patch}")
    sides = (patch, patch) if isinstance(patch, int) else patch
    height, width = (pixels // side for pixels, side in zip(pixel_values.shape[2:], sides, strict=True))
    if x.shape[1] < height * width:
        raise UserError(
            f"{name} gives {x.shape[1]} states for {height}x{width} patches of {patch} px: these are no patch features"
        )
    return x[:, -height * width :].unflatten(1, (height, width))


def _stretch(x_IHWC: Tensor, height: int, width: int) -> Tensor:
    if x_IHWC.shape[1:3] == (height, width):
        return x_IHWC
    return F.interpolate(x_IHWC.permute(0, 3, 1, 2), size=(height, width), mode="nearest").permute(0, 2, 3, 1)
