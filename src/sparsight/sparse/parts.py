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
    """The parts of a model: the paths of its parts, the number of layers, and the ids of visual tokens. ``vision``
    and the ids may be empty: a skipper needs neither."""

    decoder: str
    layers: int
    head: str
    vision: str
    visual_token_ids: tuple[int, ...]

    def __str__(self) -> str:
        ids = ", ".join(map(str, self.visual_token_ids))
        return (
            f"decoder              {self.decoder or 'the model itself'}, {self.layers} layers\n"
            f"output layer         {self.head}\n"
            f"vision tower         {self.vision or 'none: only a skipper can be attached'}\n"
            f"ids of visual tokens {ids or 'none: only a skipper can be attached'}"
        )


def find_parts(model: Any, needs_vision: bool = False) -> Parts:
    """The parts that `attach` would touch. Nothing is changed; ``print`` shows it, a part to a line.

    Args:
        needs_vision: refuse a model without a vision tower or ids of visual tokens, as `attach` does with a compressor.

    Raises:
        UserError: the model lacks a part, or is built so that nothing can be attached; the message says which.
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
    try:
        vision: Any = model.get_encoder(modality="image")
    except (TypeError, AttributeError, ValueError):
        vision = None
    paths = {module: path for path, module in model.named_modules()}
    if vision not in paths or any(module is decoder for module in vision.modules()):
        vision = None
    if needs_vision and vision is None:
        raise UserError(f"{name} has no vision tower: expected a model that encodes images before its decoder")
    ids = {getattr(config, key, None) for key in ("image_token_id", "image_token_index", "video_token_id")}
    known = tuple(sorted(i for i in ids if isinstance(i, int)))
    if needs_vision and not known:
        raise UserError(f"{name} has no id of a visual token in its config, so its visual tokens cannot be found")
    head = model.get_output_embeddings() or getattr(language, "get_output_embeddings", lambda: None)()
    if head is None:
        raise UserError(f"{name} has no output layer: attach to the model that computes the loss")
    if decoder not in paths or head not in paths:
        raise UserError(f"{name}: its parts are not its own modules")
    return Parts(paths[decoder], len(layers), paths[head], paths.get(vision, ""), known)


def find_splicer(model: nn.Module, vision: str) -> Any:
    """The module that puts visual tokens into the sequence: the innermost one around the vision tower that has them,
    also inside of adapters."""
    while vision:
        vision = vision.rpartition(".")[0]
        if hasattr(type(owner := model.get_submodule(vision)), "get_image_features"):
            return owner
    return model


def check_skippable(model: Any, layers: Sequence[nn.Module]) -> None:
    """Raises UserError if layers hand more to one another than hidden states: then none of them can be left out."""
    name, taken = type(model).__name__, inspect.signature(type(layers[0]).forward).parameters
    shared = any(getattr(module, "is_kv_shared_layer", False) for layer in layers for module in layer.modules())
    handed = [key for key in taken if key.startswith("prev_")]
    if shared or handed:
        what = "keys and values" if shared else "the choice of what is attended to"
        what = "the routing of experts" if "prev_router_hidden_states" in handed else what
        raise UserError(f"{name}: layers share {what}, so none can be skipped: attach the compressor alone")
