"""Composed models as models of transformers' own classes: the same modules under other names, so the same logits.

Our patchwise bridges begin with a LayerNorm, which LLaVA's and Idefics3's projectors lack. Two classes have it:
ViP-LLaVA (any encoder with one token before its patches, several levels) and InternVL (its own encoder, one level).
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from sparsight.errors import UserError
from sparsight.modeling.encoders import encode, takes_grids


def patchwise_parts(model: Any, form: str) -> tuple[Any, list[int], int]:
    """What forms without our code can be made of: the encoder for images of the model's size, its feature levels, and
    how many tokens it puts before its patches.

    Raises:
        UserError: the model has something that ``form`` cannot express.
    """
    config, bridge = model.config, model.config.bridge
    tower, side, (rows, columns) = model.model.vision_tower, config.image_size, config.map_size
    plain = bridge.kind in ("linear", "mlp", "pixel_shuffle")
    if not plain:
        lack = f"a bridge of kind {bridge.kind}; there are linear, mlp and pixel_shuffle"
    elif config.feature_positions or not hasattr(tower.config, "patch_size"):
        lack = f"{type(tower).__name__} with feature maps and positions added to them; there are encoders of patches"
    elif takes_grids(tower) or tower.config.model_type == "siglip2_vision_model":
        lack = f"{type(tower).__name__} with images as patches; there are encoders of pixels"
    elif config.lm_head_bias:
        lack = "an output layer with a bias; there are those without"
    elif rows != columns or rows % getattr(bridge, "factor", 1):
        lack = f"a map of {rows}x{columns} patches that is padded before {bridge.factor}x{bridge.factor} are folded"
    else:
        tower = _at_size(tower, side, form)
        with torch.no_grad():
            _, output, levels = encode(
                tower, next(tower.parameters()).new_zeros(1, 3, side, side), config.vision_levels
            )
        return tower, levels, output.hidden_states[levels[0]].shape[1] - rows * columns
    raise UserError(f"--to {form} has no place for {lack}. --to remote-code takes any bridge")


def _at_size(tower: Any, side: int, form: str) -> Any:
    """The encoder, or a copy for images of another size: its positions are interpolated once, as it does it itself."""
    if side == tower.config.image_size or "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        return tower
    if not isinstance(getattr(tower.embeddings, "position_embedding", None), nn.Embedding):
        raise UserError(
            f"--to {form}: {type(tower).__name__} was made for images of {tower.config.image_size} px and gets {side}; "
            "only CLIP's and SigLIP's positions can be interpolated beforehand. --to remote-code takes any encoder"
        )
    tower = deepcopy(tower)
    embeddings, patch = tower.embeddings, tower.config.patch_size
    own, width = embeddings.position_embedding.weight.shape
    count = own - (tower.config.image_size // patch) ** 2 + (side // patch) ** 2
    with torch.no_grad():
        table = embeddings.interpolate_pos_encoding(torch.zeros(1, count, width), side, side)[0]
    embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    embeddings.position_ids, embeddings.num_positions = torch.arange(count)[None], count
    embeddings.image_size = tower.config.image_size = side
    return tower


def to_native(model: Any, processor: Any) -> tuple[Any, LlavaProcessor]:
    """A composed model and its processor as transformers' own; the modules are shared, not copied.

    Raises:
        UserError: transformers has no class for it; the message says what is in the way.
    """
    tower, levels, prefix = patchwise_parts(model, "transformers")
    config, bridge = model.config, model.config.bridge
    factor, vip = getattr(bridge, "factor", 1), prefix == 1 and bridge.kind != "pixel_shuffle"
    if not vip and (len(levels) > 1 or tower.config.model_type != "internvl_vision"):
        raise UserError(
            f"--to transformers: none of its classes has a bridge of kind {bridge.kind} with a norm, on {len(levels)} "
            f"feature levels of {type(tower).__name__}, which has {prefix} tokens before its patches. ViP-LLaVA takes "
            "linear and mlp behind encoders with 1 such token, InternVL all kinds on one level of its own encoder. "
            "--to remote-code takes any"
        )
    tied = config.tie_word_embeddings and hasattr(model.model.language_model, "embed_tokens")
    values: dict[str, Any] = {
        "vision_config": tower.config.to_dict(),
        "text_config": config.text_config.to_dict(),
        "image_seq_length": config.num_image_tokens,
        "projector_hidden_act": "linear" if bridge.kind == "linear" else "gelu",
        "tie_word_embeddings": tied,
    }
    kind: Any
    if vip:
        layers = levels if len(levels) > 1 else levels[0]
        values |= {"image_token_index": config.image_token_id, "vision_feature_layer": layers}
        kind, settings = VipLlavaForConditionalGeneration, VipLlavaConfig(**values)
    else:
        values |= {"image_token_id": config.image_token_id, "vision_feature_layer": levels[0]}
        values["downsample_ratio"] = 1 / factor
        kind, settings = InternVLForConditionalGeneration, InternVLConfig(**values)
    with torch.device("meta"):
        native = kind(settings)
    ours, projector = model.model.multi_modal_projector, native.model.multi_modal_projector
    setattr(projector, "projector_layernorm" if vip else "layer_norm", ours.norm)
    if bridge.kind == "linear":  # their second map then changes nothing
        projector.linear_1, projector.linear_2 = ours.proj, nn.Linear(*2 * [ours.proj.out_features])
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
        projector.linear_2.to(ours.proj.weight.dtype)
    else:
        projector.linear_1, projector.linear_2 = ours.proj[0], ours.proj[2]
    native.model.vision_tower, native.model.language_model = tower, model.model.language_model
    native.lm_head = model.lm_head if tied or not config.tie_word_embeddings else deepcopy(model.lm_head)
    native.generation_config = model.generation_config
    patch, own = tower.config.patch_size, processor
    side = (patch if isinstance(patch, int) else patch[0]) * factor  # of what becomes a token: LLaVA's counts those
    options = {"chat_template": own.chat_template, "image_token": own.image_token, "patch_size": side}
    native_processor = LlavaProcessor(
        own.image_processor, own.tokenizer, vision_feature_select_strategy="full", **options
    )
    return native.eval(), native_processor
