"""What an attached model executed: its language model in closed form, its way from pixels to visual tokens measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsight.cost import LanguageShape, Trains, language_flops
from sparsight.counting import flop_counter
from sparsight.distributed import several_ranks
from sparsight.sparse.attach import Pass, SparseHandle
from sparsight.sparse.blank import tensors


def figures(handle: SparseHandle, passes: Sequence[Pass]) -> dict[str, float]:
    """What passes executed, as it stands in the log. ``flops`` is left out where the vision tower cannot be measured:
    with several ranks, which would have to measure together."""
    config: Any = handle.model.config
    shape = LanguageShape.from_config(config.get_text_config())
    trains = _trains(handle)

    def flops(layers: int, rows: int, length: int) -> float:
        return sum(language_flops(replace(shape, layers=layers), rows, length, rows * length, trains).values())

    executed = sum(flops(done.layers_run, done.rows, done.length) for done in passes)
    plain = sum(flops(handle.parts.layers, done.rows, done.length_in) for done in passes)
    found = {
        "keep": handle.keep,
        "visual_tokens_in": sum(done.visual_in for done in passes),
        "visual_tokens_out": sum(done.visual_out for done in passes),
        "layers_run": sum(done.layers_run for done in passes) / max(1, len(passes) * handle.parts.layers),
        "language_flops": executed,
        "language_flops_ratio": executed / plain if plain else 1.0,
    }
    pixels = sum(done.pixels for done in passes)
    if pixels and handle.pixel_flops is None and not several_ranks():
        handle.pixel_flops = vision_flops(handle)
        handle.image_call = None  # its pixels are no longer needed
    if not pixels or handle.pixel_flops is not None:
        found["flops"] = executed + pixels * (handle.pixel_flops or 0.0)
    return found


def vision_flops(handle: SparseHandle) -> float:
    """FLOPs of tower and projector for each value of ``pixel_values``, forward and backward, measured once on the first
    batch. Exact for pictures of one size; at native resolution, attention within pictures of other sizes differs."""
    assert handle.image_call is not None
    args, kwargs, pixels = handle.image_call
    inside = tuple(f"{path}." for path in (handle.parts.decoder, handle.parts.head))
    trained = [p for name, p in handle.model.named_parameters() if p.requires_grad and not name.startswith(inside)]
    tower = handle.model.get_submodule(handle.parts.vision)
    with flop_counter(tower) as counter, torch.set_grad_enabled(bool(trained)):
        found = handle.splicer.get_image_features(*args, **kwargs)
        parts = [getattr(found, key, None) for key in ("pooler_output", "deepstack_features")]
        outputs = tensors([found] if parts == [None, None] else parts)
        if trained:
            torch.autograd.grad([x.sum() for x in outputs if x.requires_grad], trained, allow_unused=True)
    return counter.get_total_flops() / pixels


def _trains(handle: SparseHandle) -> Trains:
    """Which parts have parameters that train, by where they stand."""
    found, rank = set(), 0
    for name, parameter in handle.model.named_parameters():
        if parameter.requires_grad:
            in_vision, in_language = (name.startswith(p + ".") for p in (handle.parts.vision, handle.parts.decoder))
            found.add(
                "vision" if in_vision else "language" if in_language or name.startswith(handle.parts.head) else "bridge"
            )
            if "lora_A" in name and in_language:
                rank = parameter.shape[0]
    recompute = bool(getattr(handle.layers[0], "gradient_checkpointing", False))
    return Trains("vision" in found, "bridge" in found, "language" in found, rank, recompute)
