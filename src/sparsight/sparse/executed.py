"""What an attached model executed: its language model in closed form, its way from pixels to visual tokens measured.

All encoders that the model's inputs go through count: of images, of videos, and of sound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsight.cost import LanguageShape, Trains, language_flops
from sparsight.devices.flops import flop_counter
from sparsight.devices.ranks import several_ranks
from sparsight.sparse.attach import Pass, SparseHandle
from sparsight.sparse.blank import tensors


def figures(handle: SparseHandle, passes: Sequence[Pass]) -> dict[str, float]:
    """What passes executed, as it stands in the log. ``flops`` is left out where the vision tower cannot be measured:
    with several ranks, which would have to measure together."""
    config: Any = handle.model.config
    shapes = _shapes(config.get_text_config())
    trains = _trains(handle)

    def flops(layers: int, rows: int, length: int) -> float:
        each = [language_flops(replace(shape, layers=layers), rows, length, rows * length, trains) for shape in shapes]
        return sum(sum(parts.values()) for parts in each) / len(each)

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
    values: Counter[str] = Counter()
    for done in passes:
        values.update(done.pixels)
    for kind in [] if several_ranks() else values.keys() - handle.pixel_flops.keys():
        handle.pixel_flops[kind] = encoder_flops(handle, kind)
        del handle.encoder_calls[kind]  # its pixels are no longer needed
    if values.keys() <= handle.pixel_flops.keys():
        found["flops"] = executed + sum(count * handle.pixel_flops[kind] for kind, count in values.items())
    return found


def _shapes(config: Any) -> list[LanguageShape]:
    """The language model's sizes; where they differ by layer (Gemma 4), a shape for each layer, whose mean counts.
    With a skipper that is a mean over all layers, not over those that ran."""
    if not getattr(config, "is_heterogeneous", False):
        return [LanguageShape.from_config(config)]
    return [LanguageShape.from_config(layer) for layer in config.per_layer_config]


def encoder_flops(handle: SparseHandle, kind: str) -> float:
    """FLOPs of encoder and projector of a kind of input ("image", "video", "audio") for each of its values, forward and
    backward, measured once on the first batch. Exact for images of one size; at native resolution, attention within
    images of other sizes differs."""
    args, kwargs, pixels = handle.encoder_calls[kind]
    inside = tuple(f"{path}." for path in (handle.parts.decoder, handle.parts.head))
    trained = [p for name, p in handle.model.named_parameters() if p.requires_grad and not name.startswith(inside)]
    tower = handle.model.get_submodule(handle.parts.vision)
    with handle.disabled(), flop_counter(tower) as counter, torch.set_grad_enabled(bool(trained)):
        found = getattr(handle.splicer, f"get_{kind}_features")(*args, **kwargs)
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
