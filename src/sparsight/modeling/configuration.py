"""Configurations of our models. Imports no model (see ``sparsight._register``).

A module of one import lies beside what we save: Auto classes find ours by it, though nothing imported Sparsight.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from sparsight.compat import make_parts, part_specs
from sparsight.settings.bridges import bridge_settings

MODULE = "modeling_sparsight"
_KINDS = {"vision_config": "clip_vision_model", "text_config": "llama"}  # of parts that name none
_TEXT = '''"""Classes of Sparsight, where transformers' Auto classes look for them. They need Sparsight."""

from sparsight.modeling import *
'''


class Registered:
    """For classes that ``import sparsight`` registers: transformers need not copy their source beside what it saves."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: Auto classes call it for what a stub led them to, and `custom_object_save` would copy our files."""


class WithStub(Registered):
    """For configurations and processors: writes the stub beside their JSON file, and names its classes there.

    It hangs on the one method that every way of saving goes through, before files are compared for an upload.
    """

    _auto_map: ClassVar[dict[str, str]]  # Auto class -> name of ours

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        self.auto_map = {auto: f"{MODULE}.{name}" for auto, name in self._auto_map.items()}
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]
        Path(json_file_path).with_name(f"{MODULE}.py").write_text(_TEXT, encoding="utf-8")


@strict
class EfficientNetLiteConfig(WithStub, PreTrainedConfig):
    """EfficientNet-lite0. ``out_blocks``: the blocks whose outputs are feature levels."""

    model_type = "sparsight_efficientnet_lite"
    _auto_map: ClassVar = {"AutoConfig": "EfficientNetLiteConfig", "AutoModel": "EfficientNetLiteModel"}

    out_blocks: list[int] | tuple[int, ...] = (10, 15)
    image_size: int = 256


@strict
class SparsightConfig(WithStub, PreTrainedConfig):
    """Configuration of [`SparsightForConditionalGeneration`].

    Args:
        vision_config: the encoder's.
        text_config: the language model's.
        bridge_config: kind and settings of the bridge (see `bridge_settings`); ``bridge`` holds them parsed.
        vision_levels: indices of the encoder's feature levels, lower first.
        level_widths: channels of each level.
        image_size: side of the square input image in pixels.
        map_size: (H, W) of the feature map at that size.
        image_token_id: the placeholder's id; an image takes ``num_image_tokens`` of them.
        feature_positions: add fixed 2-D positions to the features (for encoders without positions of their own).
        lm_head_bias: whether the language model's output layer has a bias.
    """

    model_type = "sparsight"
    _auto_map: ClassVar = {
        "AutoConfig": "SparsightConfig",
        "AutoModel": "SparsightModel",
        "AutoModelForImageTextToText": "SparsightForConditionalGeneration",
        "AutoProcessor": "SparsightProcessor",
    }
    sub_configs: ClassVar = dict.fromkeys(_KINDS, AutoConfig)
    sub_configs_defaults: ClassVar = part_specs(_KINDS)

    # Any in place of PreTrainedConfig: the parts have fields of their own.
    vision_config: Any = None
    text_config: Any = None
    bridge_config: dict | None = None
    vision_levels: list[int] | tuple[int, ...] | None = None
    level_widths: list[int] | tuple[int, ...] = (768,)
    image_size: int = 224
    map_size: list[int] | tuple[int, ...] = (7, 7)
    image_token_id: int = 0
    feature_positions: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        make_parts(self, _KINDS)
        super().__post_init__(**kwargs)
        self.bridge_config = (self.bridge if self.bridge_config else bridge_settings("linear")).model_dump(mode="json")

    @property
    def bridge(self) -> Any:
        """The bridge's settings, parsed once."""
        return _parsed(json.dumps(self.bridge_config))

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of an image, from the one function that counts them."""
        height, width = self.map_size
        return self.bridge.visual_tokens((height, width))


@lru_cache(64)
def _parsed(bridge_config: str) -> Any:
    return bridge_settings(json.loads(bridge_config))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoConfig.register(SparsightConfig.model_type, SparsightConfig, exist_ok=True)
