"""The decoder, layers, head and vision tower of any VLM of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsight.errors import UserError


@dataclass(frozen=True)
class Parts:
    """What was found in a model: the paths of its parts, and the ids that stand for visual tokens. ``vision`` and the
    ids may be empty: a skipper needs neither."""

    decoder: str
    layers: int
    head: str
    vision: str
    visual_token_ids: tuple[int, ...]


def find_parts(model: Any, needs_vision: bool = True) -> tuple[Parts, Any, list[nn.Module], Any]:
    """The decoder, its layers and the output layer of a model, with their paths.

    Args:
        needs_vision: whether a model without a vision tower or ids of visual tokens is refused.

    Raises:
        UserError: the model lacks a part, or is built so that it cannot be compressed; the message says which.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or config is None:
        raise UserError(f"{name}: expected a model of transformers with get_decoder() and a config")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder: its visual tokens do not stand in the decoder's sequence")
    language = decoder = model.get_decoder()
    for inner in ("model", "decoder"):  # a causal language model inside (llama4), a decoder in its wrapping (OPT)
        decoder = decoder if hasattr(decoder, "layers") else getattr(decoder, inner, decoder)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(f"{name}: its decoder {type(decoder).__name__} has no list of layers")
    if any("cross" in child for layer in layers for child, _ in layer.named_children()):
        raise UserError(f"{name} looks at images by cross-attention: there are no visual tokens in its sequence")
    ids = [getattr(config, key, None) for key in ("image_token_id", "image_token_index", "video_token_id")]
    try:
        vision: Any = model.get_encoder(modality="image")
    except (TypeError, AttributeError, ValueError):
        vision = None
    modules = {module: path for path, module in model.named_modules()}
    if vision not in modules or any(module is decoder for module in vision.modules()):
        vision = None
    if needs_vision and vision is None:
        raise UserError(f"{name} has no vision tower: expected a model that encodes images before its decoder")
    if needs_vision and not any(isinstance(i, int) for i in ids):
        raise UserError(f"{name} has no id of a visual token in its config, so its visual tokens cannot be found")
    head = model.get_output_embeddings() or getattr(language, "get_output_embeddings", lambda: None)()
    if head is None:
        raise UserError(f"{name} has no output layer: attach to the model that computes the loss")
    if any(module not in modules for module in (decoder, head)):
        raise UserError(f"{name}: its parts are not its own modules")
    known = tuple(sorted({i for i in ids if isinstance(i, int)}))
    where = "" if vision is None else modules[vision]
    return Parts(modules[decoder], len(layers), modules[head], where, known), decoder, list(layers), head


def _splicer(model: nn.Module, vision: str) -> Any:
    """The module that puts visual tokens into the sequence: the innermost one around the vision tower that has them,
    also inside of adapters."""
    path = vision
    while path:
        path = path.rpartition(".")[0]
        if hasattr(type(owner := model.get_submodule(path)), "get_image_features"):
            return owner
    return model


def _check_layers(model: Any, layers: Sequence[nn.Module]) -> None:
    """Raises UserError if layers hand more to one another than hidden states: then none of them can be left out."""
    name, taken = type(model).__name__, inspect.signature(type(layers[0]).forward).parameters
    shared = any(getattr(module, "is_kv_shared_layer", False) for layer in layers for module in layer.modules())
    if shared or "prev_topk_indices" in taken:
        what = "keys and values" if shared else "the choice of what is attended to"
        raise UserError(f"{name}: layers share {what}, so none can be skipped: attach the compressor alone")
