"""The decoder, layers, head, vision tower and audio encoder of any multimodal model of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from sparsight.errors import UserError


@dataclass(frozen=True)
class Parts:
    """The parts of a model: the paths of its parts, the number of layers, and the ids of visual and audio tokens.
    ``vision``, ``audio`` and the ids may be empty: a skipper needs none of them."""

    decoder: str
    layers: int
    head: str
    vision: str
    visual_token_ids: tuple[int, ...]
    audio: str = ""
    audio_token_ids: tuple[int, ...] = ()

    @property
    def kinds(self) -> str:
        """What a compressor drops, in words: "visual", "audio", or "visual or audio" tokens."""
        kinds = {"visual": self.visual_token_ids, "audio": self.audio_token_ids}
        return " or ".join(kind for kind, ids in kinds.items() if ids) or "visual"

    def __str__(self) -> str:
        ids, heard = (", ".join(map(str, ids)) for ids in (self.visual_token_ids, self.audio_token_ids))
        none = "none" if heard else "none: only a skipper can be attached"
        return (
            f"decoder              {self.decoder or 'the model itself'}, {self.layers} layers\n"
            f"output layer         {self.head}\n"
            f"vision tower         {self.vision or none}\n"
            f"ids of visual tokens {ids or none}"
        ) + (f"\naudio encoder        {self.audio}\nids of audio tokens  {heard}" if heard else "")


def find_parts(model: Any, needs_vision: bool = False) -> Parts:
    """The parts that `attach` would touch. Nothing is changed; ``print`` shows it, a part to a line.

    Args:
        needs_vision: refuse a model without visual or audio tokens that can be found, as `attach` does with a
            compressor: it needs a vision tower or an audio encoder, and ids.

    Raises:
        UserError: the model lacks a part, or is built so that nothing can be attached; the message says which.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or config is None:
        raise UserError(f"{name}: expected a model of transformers with get_decoder() and a config")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder: what it encodes does not stand in the decoder's sequence")
    language = decoder = model.get_decoder()
    for inner in ("model", "decoder"):  # a causal language model inside (llama4), a decoder in its wrapping (OPT)
        decoder = decoder if hasattr(decoder, "layers") else getattr(decoder, inner, decoder)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(f"{name}: its decoder {type(decoder).__name__} has no list of layers")
    if any("cross" in child for layer in layers for child, _ in layer.named_children()):
        raise UserError(f"{name} looks at images by cross-attention: there are no visual tokens in its sequence")
    paths = {module: path for path, module in model.named_modules()}
    speaks = hasattr(config, "diffusion_head_config")  # VibeVoice
    if needs_vision and speaks:
        raise UserError(f"{name} learns to speak: its loss is taken on audio tokens, so none of them can be dropped")
    vision, audio = _encoder(model, decoder, "image"), None if speaks else _encoder(model, decoder, "audio")
    if needs_vision and vision is None and audio is None:
        expected = "a model that encodes images or audio before its decoder"
        raise UserError(f"{name} has no vision tower and no audio encoder: expected {expected}")
    known = _ids(config, "image_token_id", "image_token_index", "video_token_id")
    heard = () if audio is None else _ids(config, "audio_token_id", "audio_token_index")
    if needs_vision and not (heard if vision is None else known):
        kind, its = ("an audio", "audio") if vision is None else ("a visual", "visual")
        raise UserError(f"{name} has no id of {kind} token in its config, so its {its} tokens cannot be found")
    head = model.get_output_embeddings() or getattr(language, "get_output_embeddings", lambda: None)()
    if head is None:
        raise UserError(f"{name} has no output layer: attach to the model that computes the loss")
    if decoder not in paths or head not in paths:
        raise UserError(f"{name}: its parts are not its own modules")
    found = paths[decoder], len(layers), paths[head], paths.get(vision, ""), known
    return Parts(*found, paths[audio] if heard else "", heard)


def _encoder(model: Any, decoder: nn.Module, kind: str) -> Any:
    """The vision tower, or the audio encoder; None if there is none."""
    for modality in (kind, None) if kind == "audio" else (kind,):  # Granite-Speech has one that is of no kind
        try:
            found: Any = model.get_encoder(modality=modality)
        except (TypeError, AttributeError, ValueError):
            continue
        if isinstance(found, nn.Module) and found in set(model.modules()) and decoder not in set(found.modules()):
            return found
    return None


def _ids(config: Any, *keys: str) -> tuple[int, ...]:
    return tuple(sorted({i for key in keys if isinstance(i := getattr(config, key, None), int)}))


def find_splicer(model: nn.Module, encoder: str) -> Any:
    """The module that puts visual or audio tokens into the sequence: the innermost one around the encoder that has
    them, also inside of adapters."""
    while encoder:
        encoder = encoder.rpartition(".")[0]
        owner = model.get_submodule(encoder)
        if any(hasattr(type(owner), f"get_{kind}_features") for kind in ("image", "audio")):
            return owner
    return model


def find_loss_owner(model: nn.Module) -> Any:
    """The module that takes the loss, also inside of adapters. Raises UserError unless it does so as most do."""
    for owner in model.modules():
        if hasattr(type(owner), "loss_function"):
            source = inspect.getsource(inspect.unwrap(type(owner).forward))
            if "self.loss_function(" in source and owner.loss_function is ForCausalLMLoss:
                return owner
    raise UserError(
        f"{type(model).__name__} needs the logits of all positions: supervised_logits_only expects a model whose "
        "forward takes transformers' ForCausalLMLoss, as self.loss_function(...); leave it out"
    )


def check_skippable(model: Any, layers: Sequence[nn.Module]) -> None:
    """Raises UserError if layers hand more to one another than hidden states: then none of them can be left out."""
    name, taken = type(model).__name__, inspect.signature(type(layers[0]).forward).parameters
    shared = any(getattr(module, "is_kv_shared_layer", False) for layer in layers for module in layer.modules())
    handed = [key for key in taken if key.startswith("prev_")]
    if shared or handed:
        what = "keys and values" if shared else "the choice of what is attended to"
        what = "the routing of experts" if "prev_router_hidden_states" in handed else what
        raise UserError(f"{name}: layers share {what}, so none can be skipped: attach the compressor alone")
