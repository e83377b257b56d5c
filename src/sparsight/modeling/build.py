"""Compose a VLM from a vision encoder, a bridge and a causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    ViTImageProcessorPil,
)
from transformers import __version__ as transformers_version

# Up to 5.17 the same name in the package itself wants torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file

from sparsight import assets
from sparsight.bridges import build_bridge
from sparsight.errors import UserError
from sparsight.modeling.chat_templates import multimodal_template
from sparsight.modeling.configuration import EfficientNetLiteConfig, SparsightConfig
from sparsight.modeling.efficientnet_lite import EfficientNetLiteModel
from sparsight.modeling.encoders import has_own_positions, probe
from sparsight.modeling.folders import loading
from sparsight.modeling.processing import IMAGE_TOKEN, SparsightProcessor
from sparsight.modeling.quantised import take_packing
from sparsight.modeling.vlm import SparsightForConditionalGeneration
from sparsight.settings.bridges import bridge_settings


def build(
    vision: str | Path | PreTrainedConfig | nn.Module,
    language: str | Path | PreTrainedConfig | nn.Module,
    bridge: Any = "cos-80",
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    image_size: int | None = None,
    vision_levels: Sequence[int] | None = None,
    language_layers: int | None = None,
    resize: str | None = None,
) -> tuple[SparsightForConditionalGeneration, SparsightProcessor]:
    """Compose a VLM.

    Modules that are given become its parts, and the language model gets embeddings for the tokens that it lacks.
    Tokenizer, image processor and configurations are copied: the caller's stay as they are.

    Args:
        vision: ``"efficientnet-lite0"``, a hub id, a local folder, a config (random weights), or a module.
        language: ``"smollm2-135m"``, a hub id, a local folder, a config (random weights), or a causal LM.
        bridge: settings such as ``ChainOfSightConfig("cos-32")``, a kind such as ``"mlp"``, or a layout.
        tokenizer: needed when ``language`` is a config or a module.
        image_processor: the encoder's own if it has one, else resize and normalise by 0.5.
        image_size: side of the square image in pixels; the encoder's own if not given.
        vision_levels: feature levels, lower first (see ``encoders.feature_levels``).
        language_layers: keep only the first layers of the language model.
        resize: ``square``, ``pad``, ``crop`` or ``keep`` (see `set_image_size`).

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        UserError: a part cannot be loaded, or is quantised (but for a language model that bitsandbytes has packed as
            it was loaded); the encoder has no spatial features; the language model has
            no chat template, or changes its logits after the output layer; the layout does not fit the feature map; or
            the image processor cannot resize in that way.
    """
    settings = bridge_settings(bridge)
    encoder, image_processor, side = _vision(vision, image_processor, image_size)
    lm, tokenizer = _language(language, tokenizer, language_layers)
    levels, _ = probe(encoder, side, vision_levels)
    widths = [level.shape[3] for level in levels]
    model = _assembled(
        encoder,
        lm,
        build_bridge(settings, widths, lm.base_model.config.hidden_size),
        bridge_config=settings.model_dump(mode="json"),
        vision_levels=None if vision_levels is None else list(vision_levels),
        level_widths=widths,
        image_size=side,
        map_size=list(levels[0].shape[1:3]),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model.model.multi_modal_projector(levels)  # a layout that does not fit the map fails here, not in training
    _check_logits(lm, model)
    return model.eval(), _processor(image_processor, tokenizer, model.config.num_image_tokens, side, resize)


def build_processor(
    vision: Any,
    tokenizer: Any,
    bridge: Any,
    *,
    image_size: int | None = None,
    vision_levels: Sequence[int] | None = None,
    resize: str | None = None,
) -> SparsightProcessor:
    """The processor that `build` would make, without a language model. Arguments and errors as there."""
    encoder, image_processor, side = _vision(vision, None, image_size)
    level = probe(encoder, side, vision_levels)[0][0]
    tokens = bridge_settings(bridge).visual_tokens((level.shape[1], level.shape[2]))
    return _processor(image_processor, _multimodal(tokenizer), tokens, side, resize)


def own_image_size(vision: str | Path) -> int:
    """Side in pixels of the images that an encoder was made for, from its configuration alone: `build`'s default."""
    if vision == "efficientnet-lite0":
        return EfficientNetLiteConfig().image_size
    return _native_size(_vision_config(str(vision)), _pil_processor(str(vision)))


def load_tokenizer(language: str | Path, own: Any = None) -> tuple[Any, Any]:
    """A language model's tokenizer (or ``own``) and configuration, from a folder or a hub; no weights are read."""
    name = language_folder(language)
    with loading("language", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return own or AutoTokenizer.from_pretrained(name, trust_remote_code=False), config


def language_folder(language: str | Path) -> str:
    """The folder or hub id of a language model. Raises ValueError if it is the embedded one, and not installed."""
    if language != "smollm2-135m":
        return str(language)
    if (folder := assets.smollm2_folder()) is None:
        raise assets.missing("smollm2-135m")
    return str(folder)


def set_image_size(image_processor: Any, side: int, resize: str | None = None) -> None:
    """Let an image processor give square images of ``side`` pixels, by its own resampling, rescaling, normalising.

    Args:
        resize: ``square`` stretches (the default). ``pad`` keeps the shape; the rest, below or at the right, is 0 once
            normalised: the encoder's mean colour. ``crop`` brings the shorter side to ``side`` and takes the middle.
            ``keep`` is for native-resolution encoders, which take nothing else: the image's shape, and its area at
            most that of the square.

    Raises:
        UserError: the encoder cannot take such images, or the image processor does not make them.
    """
    name, native = type(image_processor).__name__, hasattr(image_processor, "merge_size")
    resize = resize or ("keep" if native else "square")
    if native != (resize == "keep"):
        takes = "images of any shape: use keep" if native else "squares alone: use square, pad or crop"
        raise UserError(f"resize: {resize}: {name} gives its encoder {takes}")
    if native:
        image_processor.size = {"shortest_edge": min(side, 56) ** 2, "longest_edge": side**2}
        return
    square = {"height": side, "width": side}
    sizes = {"square": square, "pad": {"max_height": side, "max_width": side}, "crop": {"shortest_edge": side}}
    values = {"do_resize": True, "size": sizes[resize], "do_center_crop": resize == "crop", "do_pad": resize == "pad"}
    for key, value in (values | {"crop_size": square, "pad_size": square, "do_image_splitting": False}).items():
        if value or hasattr(image_processor, key):
            setattr(image_processor, key, value)
    made: Any
    for size in ((4 * side, side), (side, 4 * side)):  # some classes have a resizing of their own
        try:
            made = tuple(image_processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape)
        except Exception as error:
            made = error
        if made != (1, 3, side, side):
            raise UserError(f"resize: {resize}: {name} makes {made} of an image, expected {(1, 3, side, side)}")


def _vision(vision: Any, image_processor: Any, image_size: int | None) -> tuple[nn.Module, Any, int]:
    """The encoder, a copy of its image processor, and the side of the square image in pixels."""
    own, random = None, isinstance(vision, PreTrainedConfig)
    name = str(vision) if isinstance(vision, str | Path) else type(vision).__name__
    if vision == "efficientnet-lite0":
        if (path := assets.efficientnet_lite0_weights()) is None:
            raise assets.missing("efficientnet-lite0")
        vision = EfficientNetLiteModel.from_published(path)
        own = _plain_processor(mean=127 / 255, std=128 / 255)
    elif isinstance(vision, str | Path):
        config = _vision_config(name)
        own = None if image_processor else _pil_processor(name)
        vision = _load_tower(name, config)
    elif random:
        vision = AutoModel.from_config(_tower_config(name, vision), trust_remote_code=False)
    if not isinstance(vision, nn.Module):
        raise UserError(f"vision: expected a name, a folder, a config or a module, found {type(vision).__name__}")
    encoder = getattr(vision, "vision_model", vision) if hasattr(vision, "text_model") else vision
    _refuse_quantised("vision", encoder)
    image_processor = deepcopy(image_processor or own)
    side = image_size or _native_size(encoder.config, image_processor)
    if image_processor is None:
        image_processor = _plain_processor(mean=0.5, std=0.5)
        if not random:
            warnings.warn(
                f"vision {name} comes without an image processor (preprocessor_config.json): images are resized to "
                f"{side} px and normalised with mean 0.5, std 0.5. If it was trained otherwise, give image_processor=",
                stacklevel=3,
            )
    return encoder, image_processor, side


def _vision_config(name: str) -> Any:
    """The encoder's configuration, which may be a part of another's; no weights are read."""
    with loading("vision", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    part = _tower_config(name, config)
    _refuse_quantised("vision", config)
    return part


def _tower_config(name: str, config: Any) -> Any:
    part = deepcopy(getattr(config, "vision_config", config))
    if part.model_type.startswith("siglip"):
        part.vision_use_head = False  # SigLIP's pooled token, which nothing reads
    if type(part) not in MODEL_MAPPING:  # Qwen's and others stand there from 5.18 on
        have = f"transformers {transformers_version} has no encoder"
        raise UserError(f"vision '{name}': {have} for a model of type '{part.model_type}'; a newer one may")
    return part


def _load_tower(name: str, config: Any) -> nn.Module:
    """An encoder from its own weights, or from a larger model's such as CLIP's two towers: without a report of those
    that it has no place for; what it lacks is still told."""
    kind = MODEL_MAPPING[type(config)]
    before, kind._keys_to_ignore_on_load_unexpected = kind._keys_to_ignore_on_load_unexpected, [".*"]
    try:
        with loading("vision", name):
            return kind.from_pretrained(name, config=config)
    finally:
        kind._keys_to_ignore_on_load_unexpected = before


def _pil_processor(name: str) -> Any:
    """The image processor of a folder or of a hub's repository; None where there is no file of one."""
    try:
        with loading("vision", name):
            return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except UserError as error:
        absent = {f"_raise_exceptions_for_{why}": False for why in ("missing_entries", "connection_errors")}
        for file in ("preprocessor_config.json", "processor_config.json"):
            if (found := cached_file(name, file, **absent)) is not None:
                raise UserError(f"{found} gives no image processor: {error}") from None
        return None


def _plain_processor(mean: float, std: float) -> Any:
    return ViTImageProcessorPil(image_mean=[mean] * 3, image_std=[std] * 3, do_convert_rgb=True)


def _native_size(config: Any, image_processor: Any) -> int:
    size = getattr(config, "image_size", None) or dict(getattr(image_processor, "size", None) or {}).get("height")
    return int((size[0] if isinstance(size, list | tuple) else size) or 224)


def _language(language: Any, tokenizer: Any, layers: int | None) -> tuple[Any, Any]:
    """The causal language model, and a copy of its tokenizer that knows images."""
    if isinstance(language, str | Path):
        name, extra = language_folder(language), {} if layers is None else {"num_hidden_layers": layers}
        tokenizer, config = load_tokenizer(name, tokenizer)
        _refuse_quantised("language", config)
        with loading("language", name):
            language = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **extra)
    elif isinstance(language, PreTrainedConfig):
        config = deepcopy(language)
        config.num_hidden_layers = layers or config.num_hidden_layers
        language = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    elif layers is not None:
        raise UserError("language_layers goes with a name, a folder or a config, not with a ready module")
    if not hasattr(language, "get_output_embeddings") or language.get_output_embeddings() is None:
        raise UserError(f"language: expected a causal language model, found {type(language).__name__}")
    _refuse_quantised("language", language)
    (rows, width), hidden = language.get_input_embeddings().weight.shape, language.base_model.config.hidden_size
    if width != hidden:
        raise UserError(f"language: its embeddings are {width} wide and its hidden states {hidden}; they must be equal")
    if tokenizer is None:
        raise UserError("give tokenizer= too, when the language model is a config or a module")
    tokenizer = _multimodal(tokenizer)
    if len(tokenizer) > rows:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return language, tokenizer


def _multimodal(tokenizer: Any) -> Any:
    """A copy of a tokenizer with a chat template that takes images, a placeholder for them, and padding."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, so nothing says what a question and an "
            "answer look like. Set tokenizer.chat_template and give tokenizer="
        )
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = multimodal_template(tokenizer.chat_template)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _refuse_quantised(part: str, given: Any) -> None:
    """Raises UserError for a configuration that is marked as quantised, or weights that are packed: all but those of
    a language model that transformers has loaded by bitsandbytes."""
    if part == "language" and getattr(given, "quantization_method", None) == "bitsandbytes":
        return
    how = getattr(getattr(given, "config", given), "quantization_config", None)
    if how is not None:
        how = (how if isinstance(how, dict) else vars(how)).get("quant_method", how)
    for name, weight in given.named_parameters() if isinstance(given, nn.Module) and how is None else ():
        if not weight.is_floating_point() or weight.element_size() < 2 or type(weight.data) is not torch.Tensor:
            how = f"{name} is {type(weight.data).__name__} of {weight.dtype}"
            break
    if how is not None:
        raise UserError(
            f"{part}: its weights are quantised ({how}), and a model composed of them could not be saved and loaded "
            "again. Give it in full precision, save the composed model, and load that with quantization_config=...: "
            "vision and bridge then stay as they are. A language model may be given as a module that transformers has "
            "loaded with a BitsAndBytesConfig"
        )


def _assembled(encoder: Any, lm: Any, bridge: nn.Module, **values: Any) -> SparsightForConditionalGeneration:
    """The model of these parts; ``values`` go to its configuration."""
    text, head = lm.base_model.config, lm.get_output_embeddings()
    kernels = [(part, part._attn_implementation) for part in (encoder.config, text)]
    config = SparsightConfig(
        vision_config=encoder.config,
        text_config=text,
        feature_positions=not has_own_positions(encoder),
        lm_head_bias=head.bias is not None,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        **values,
    )
    with torch.device("meta"):
        model = SparsightForConditionalGeneration(config)
    for part, kernel in kernels:  # the new configuration has put its own default into its parts
        part._attn_implementation = kernel
    model.model.vision_tower, model.model.multi_modal_projector = encoder, bridge
    model.model.language_model, model.lm_head = lm.base_model, head
    take_packing(model, lm)
    model.generation_config = getattr(lm, "generation_config", None) or model.generation_config
    return model


def _processor(
    image_processor: Any, tokenizer: Any, tokens: int, image_size: int, resize: str | None
) -> SparsightProcessor:
    set_image_size(image_processor, image_size, resize)
    return SparsightProcessor(image_processor, tokenizer, num_image_tokens=tokens)


@torch.no_grad()
def _check_logits(lm: Any, model: SparsightForConditionalGeneration) -> None:
    """A language model that scales or caps its logits behind the output layer would be composed wrongly."""
    ids, was_training = torch.tensor([[1, 2, 3]], device=model.device), lm.training
    # Those of random weights are too small for a cap to show.
    widen = model.lm_head.register_forward_hook(
        lambda _, __, logits: logits + torch.linspace(-100, 100, logits.shape[-1]).to(logits)
    )
    alone, composed = (each.eval()(input_ids=ids).logits for each in (lm, model))
    widen.remove()
    lm.train(was_training)
    if (difference := (alone - composed).abs().max().item()) > 1e-3:
        raise UserError(
            f"{type(lm).__name__} changes its logits behind the output layer (largest difference {difference:.3g}); "
            "such language models cannot be composed yet"
        )
