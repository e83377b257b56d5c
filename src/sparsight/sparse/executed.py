"""The one accountant of executed FLOPs, of the models that we train and of any that something is attached to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsight.cost import LanguageShape, Trains, language_flops
from sparsight.devices.flops import flop_counter
from sparsight.devices.ranks import several_ranks
from sparsight.sparse.attach import Pass, SparseHandle
from sparsight.sparse.blank import tensors


def language_shapes(config: Any) -> list[LanguageShape]:
    """The language model's sizes; where they differ by layer (Gemma 4), a shape for each layer, whose mean counts. With
    a skipper that is a mean over all layers, not over those that ran."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return [LanguageShape.from_config(layer) for layer in layers]


def pass_flops(
    done: Pass, shapes: Sequence[LanguageShape], trains: Trains, labels: int | None = None
) -> dict[str, float]:
    """FLOPs of the language model in a forward and backward pass, by part, of what the methods left of it.

    ``labels``: positions that go through the vocabulary's projection; all of them if not given.
    """
    labels = done.rows * done.length if labels is None else labels
    run = done.length, labels, trains, done.layers_run, done.beside
    each = [language_flops(shape, done.rows, *run) for shape in shapes]
    return {part: sum(flops[part] for flops in each) / len(each) for part in each[0]}


def figures(handle: SparseHandle, passes: Sequence[Pass]) -> dict[str, float]:
    """Executed FLOPs, tokens and layers of passes, as they are logged. ``flops`` is left out where encoders cannot be
    measured: on several ranks, which would have to measure together, and without a function of their own."""
    config: Any = handle.model.config
    shapes, trains, layers = language_shapes(config.get_text_config()), _trains(handle), handle.parts.layers

    def flops(each: Sequence[Pass]) -> float:
        return sum(sum(pass_flops(done, shapes, trains, done.labels).values()) for done in each)

    executed = flops(passes)
    plain = flops([replace(done, length=done.length_in, layers_run=layers, labels=None) for done in passes])
    found = {
        "keep": handle.keep,
        "visual_tokens_in": sum(done.visual_in for done in passes),
        "visual_tokens_out": sum(done.visual_out for done in passes),
        "layers_run": sum(done.layers_run for done in passes) / max(1, len(passes) * layers),
        "language_flops": executed,
        "language_flops_ratio": executed / plain if plain else 1.0,
    }
    if handle.parts.audio:
        found["audio_tokens_in"] = sum(done.audio_in for done in passes)
        found["audio_tokens_out"] = sum(done.audio_out for done in passes)
    values = [(kind, count) for done in passes for kind, count in done.pixels.items()]
    for kind in set() if several_ranks() else {kind for kind, _ in values} - handle.pixel_flops.keys():
        handle.pixel_flops[kind] = _encoder_flops(handle, kind)
        del handle.encoder_calls[kind]  # its pixels are no longer needed
    seen = all("audio" in done.pixels for done in passes if done.audio_in)  # Qwen2-Audio has no get_audio_features
    if seen and all(kind in handle.pixel_flops for kind, _ in values):
        found["flops"] = executed + sum(count * handle.pixel_flops[kind] for kind, count in values)
    return found


def _encoder_flops(handle: SparseHandle, kind: str) -> float:
    """FLOPs of encoder and projector for each value of an input ("image", "video", "audio"), forward and backward,
    measured on the first batch. Exact for images of one size; at native resolution, attention differs with the size."""
    args, kwargs, pixels = handle.encoder_calls[kind]
    inside = tuple(f"{path}." for path in (handle.parts.decoder, handle.parts.head))
    trained = [p for name, p in handle.model.named_parameters() if p.requires_grad and not name.startswith(inside)]
    tower = handle.model.get_submodule(handle.parts.audio if kind == "audio" else handle.parts.vision)
    counting = flop_counter(tower, handle.model)
    with handle.disabled(), _differentiable(tower), counting as counter, torch.set_grad_enabled(bool(trained)):
        found = getattr(handle.splicer, f"get_{kind}_features")(*args, **kwargs)
        parts = [getattr(found, key, None) for key in ("pooler_output", "deepstack_features")]
        outputs = tensors([found] if parts == [None, None] else parts)
        if trained:
            torch.autograd.grad([x.sum() for x in outputs if x.requires_grad], trained, allow_unused=True)
    return counter.get_total_flops() / pixels


@contextmanager
def _differentiable(tower: nn.Module) -> Iterator[None]:
    """Recomputation in the form that `torch.autograd.grad` takes, where a trainer (ms-swift) has set the other one."""
    name = "_gradient_checkpointing_func"
    before = [(module, module.__dict__[name]) for module in tower.modules() if name in module.__dict__]
    for module, _ in before:
        setattr(module, name, partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        for module, function in before:
            setattr(module, name, function)


def _trains(handle: SparseHandle) -> Trains:
    """Which parts have parameters that train, by where these stand."""
    found, rank, parts = set(), 0, handle.parts
    for name, parameter in handle.model.named_parameters():
        if parameter.requires_grad:
            language = name.startswith((f"{parts.decoder}.", parts.head))
            encoder = name.startswith((f"{parts.vision}.", f"{parts.audio}."))
            found.add("vision" if encoder else "language" if language else "bridge")
            rank = parameter.shape[0] if language and "lora_A" in name else rank
    recompute = bool(getattr(handle.layers[0], "gradient_checkpointing", False))
    return Trains("vision" in found, "bridge" in found, "language" in found, rank, recompute)
