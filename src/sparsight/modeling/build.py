"""Compose a VLM from a vision encoder, a bridge and a causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    ViTImageProcessorPil,
)
from transformers.utils import cached_file

from sparsight import assets
from sparsight.bridges import build_bridge
from sparsight.cost.shapes import tell_if_cut
from sparsight.errors import UserError
from sparsight.modeling.chat_templates import _template
from sparsight.modeling.configuration import EfficientNetLiteConfig, SparsightConfig
from sparsight.modeling.efficientnet_lite import EfficientNetLiteModel
from sparsight.modeling.encoders import feature_levels, has_own_positions, takes_grids
from sparsight.modeling.folders import loading
from sparsight.modeling.processing import IMAGE_TOKEN, SparsightProcessor
from sparsight.modeling.vlm import SparsightForConditionalGeneration
from sparsight.settings.bridges import bridge_settings


def build(
    vision: str | PreTrainedConfig | nn.Module,
    language: str | PreTrainedConfig | nn.Module,
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
        UserError: the encoder has no spatial features, the language model no chat template, or it changes its
            logits after the output layer, or a layout does not fit the feature map, or the image processor cannot
            resize in that way, or a part is quantised, cannot be loaded, or has a damaged file.
    """
    encoder, image_processor, image_size = _vision(vision, image_processor, image_size)
    lm, tokenizer = _language(language, tokenizer, language_layers)
    settings = bridge_settings(bridge)
    levels = probe(encoder, image_size, vision_levels)
    map_size = (levels[0].shape[1], levels[0].shape[2])
    _add_image_token(lm, tokenizer)
    base, head = lm.base_model, lm.get_output_embeddings()
    text_config: Any = base.config
    vision_config: Any = encoder.config
    attention = {"vision_config": vision_config._attn_implementation, "text_config": text_config._attn_implementation}
    config = SparsightConfig(
        vision_config=vision_config,
        text_config=text_config,
        bridge_config=settings.model_dump(),
        vision_levels=None if vision_levels is None else list(vision_levels),
        level_widths=[level.shape[3] for level in levels],
        image_size=image_size,
        map_size=list(map_size),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        feature_positions=not has_own_positions(encoder),
        lm_head_bias=head.bias is not None,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = SparsightForConditionalGeneration(config)
    for part, kernel in attention.items():  # the new configuration has put its own default into its parts
        getattr(config, part)._attn_implementation = kernel
    model.model.vision_tower = encoder
    model.model.language_model = base
    model.lm_head = head
    model.model.multi_modal_projector = build_bridge(settings, config.level_widths, text_config.hidden_size)
    model.model.multi_modal_projector(levels)  # a layout that does not fit the map fails here, not in training
    _check_logits(lm, model)
    if getattr(lm, "generation_config", None) is not None:
        model.generation_config = lm.generation_config
    return model.eval(), _processor(image_processor, tokenizer, config.num_image_tokens, image_size, resize)


@torch.no_grad()
def probe(encoder: nn.Module, image_size: int, levels: Sequence[int] | None) -> list[torch.Tensor]:
    """Feature levels of two grey images: the truth about widths and map size, instead of a guess."""
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if isinstance(patch, int) and not takes_grids(encoder):  # which refuses such a size by itself
        tell_if_cut(type(encoder).__name__, image_size, patch, getattr(encoder.config, "image_size", None))
    parameter = next(encoder.parameters())
    pixels = torch.zeros(2, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    was_training = encoder.training
    features = feature_levels(encoder.eval(), pixels, levels)
    encoder.train(was_training)
    return [level.float() for level in features]


def set_image_size(image_processor: Any, side: int, resize: str | None = None) -> None:
    """Let an image processor give square images of ``side`` pixels, by its own resampling, rescaling, normalising.

    Args:
        resize: ``square`` stretches (the default). ``pad`` keeps the shape; the rest, below or at the right, is 0 once
            normalised: the encoder's mean colour. ``crop`` brings the shorter side to ``side`` and takes the middle.
            ``keep`` is for native-resolution encoders, which take nothing else: the image's shape, and its area at
            most that of the square.

    Raises:
        UserError: ``keep`` with an encoder of one size, or another mode with one of native resolution, or the image
            processor does not do what it is set to.
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
            raise UserError(f"resize: {resize}: {name} makes {made} of a image, expected {(1, 3, side, side)}")


def _vision(vision: Any, image_processor: Any, image_size: int | None) -> tuple[nn.Module, Any, int]:
    """The encoder, its image processor, and the side of the square image in pixels."""
    own, random = None, isinstance(vision, PreTrainedConfig)
    name = str(vision) if isinstance(vision, str | Path) else type(vision).__name__
    if vision == "efficientnet-lite0":
        path = assets.efficientnet_lite0_weights()
        if path is None:
            raise assets.missing("efficientnet-lite0")
        vision = EfficientNetLiteModel.from_published(path)
        own = _plain_processor(mean=127 / 255, std=128 / 255)
    elif isinstance(vision, str | Path):
        own = None if image_processor else _pil_processor(name)
        part = _vision_config(name)
        with loading("vision", name), _as_a_part(MODEL_MAPPING[type(part)]) as kind:
            vision = kind.from_pretrained(name, config=part)
    elif isinstance(vision, PreTrainedConfig):
        vision = AutoModel.from_config(getattr(vision, "vision_config", vision), trust_remote_code=False)
    if not isinstance(vision, nn.Module):
        raise UserError(f"vision: expected a name, a folder, a config or a module, found {type(vision).__name__}")
    encoder = getattr(vision, "vision_model", vision) if hasattr(vision, "text_model") else vision
    _refuse_quantised("vision", encoder)
    image_processor = image_processor or own
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


@contextmanager
def _as_a_part(kind: Any) -> Iterator[Any]:
    """Within, a class of models loads from a larger one's weights, such as CLIP's two towers, without a report of those
    that it has no place for; what it lacks is still told."""
    before = kind._keys_to_ignore_on_load_unexpected
    kind._keys_to_ignore_on_load_unexpected = [".*"]
    try:
        yield kind
    finally:
        kind._keys_to_ignore_on_load_unexpected = before


def _vision_config(name: str) -> Any:
    """The encoder's configuration, which may be a part of another's; no weights are read."""
    with loading("vision", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    part = getattr(config, "vision_config", config)
    if type(part) not in MODEL_MAPPING:
        raise UserError(f"vision '{name}': transformers has no encoder for a model of type '{part.model_type}'")
    _refuse_quantised("vision", config)
    return part


def _pil_processor(name: str) -> Any:
    """The image processor of a folder or of a hub's repository; None where there is no file of one.

    Raises:
        UserError: there is one, but it cannot be read, or transformers does not know it.
    """
    absent: dict[str, Any] = {f"_raise_exceptions_for_{why}": False for why in ("missing_entries", "connection_errors")}
    try:
        with loading("vision", name):
            return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except ValueError as error:
        for file in ("preprocessor_config.json", "processor_config.json"):
            with loading("vision", name):
                found = cached_file(name, file, **absent)
            if found is not None:
                raise UserError(f"{found} gives no image processor: {error}") from None
        return None


def own_image_size(vision: str) -> int:
    """Side in pixels of the images that an encoder was made for, from its configuration alone: what `build` takes.

    Raises:
        UserError: there is no such encoder.
    """
    if vision == "efficientnet-lite0":
        return EfficientNetLiteConfig().image_size
    return _native_size(_vision_config(vision), _pil_processor(vision))


def _refuse_quantised(part: str, given: Any) -> None:
    """Raises UserError for a configuration that is marked as quantised, or weights that are packed."""
    config = getattr(given, "config", given)
    marked = getattr(config, "quantization_config", None)
    method = dict(marked if isinstance(marked, dict) else getattr(marked, "__dict__", {})).get("quant_method", marked)
    how = getattr(method, "value", method)
    for name, weight in given.named_parameters() if isinstance(given, nn.Module) and how is None else ():
        if not weight.is_floating_point() or weight.element_size() < 2 or type(weight.data) is not torch.Tensor:
            how = f"{name} is {type(weight.data).__name__} of {weight.dtype}"
            break
    if how is not None:
        raise UserError(
            f"{part}: its weights are quantised ({how}), and a model composed of them could not be saved and loaded "
            "again. Give it in full precision, save the composed model, and load that with quantization_config=...: "
            "vision and bridge then stay as they are"
        )


def _plain_processor(mean: float, std: float) -> Any:
    return ViTImageProcessorPil(image_mean=[mean] * 3, image_std=[std] * 3, do_convert_rgb=True)


def _native_size(config: Any, image_processor: Any) -> int:
    size = getattr(config, "image_size", None) or dict(getattr(image_processor, "size", None) or {}).get("height")
    if isinstance(size, list | tuple):
        size = size[0]
    return int(size or 224)


def _language(language: Any, tokenizer: Any, layers: int | None) -> tuple[Any, Any]:
    if isinstance(language, str | Path):
        name = language_folder(str(language))
        extra = {} if layers is None else {"num_hidden_layers": layers}
        tokenizer, config = load_tokenizer(name, tokenizer)
        _refuse_quantised("language", config)
        with loading("language", name):
            language = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **extra)
    elif isinstance(language, PreTrainedConfig):
        if layers is not None:
            language.num_hidden_layers = layers
        language = AutoModelForCausalLM.from_config(language, trust_remote_code=False)
    elif layers is not None:
        raise UserError("language_layers goes with a name, a folder or a config, not with a ready module")
    if not hasattr(language, "get_output_embeddings") or language.get_output_embeddings() is None:
        raise UserError(f"language: expected a causal language model, found {type(language).__name__}")
    _refuse_quantised("language", language)
    width, hidden = language.get_input_embeddings().weight.shape[1], language.base_model.config.hidden_size
    if width != hidden:
        raise UserError(f"language: its embeddings are {width} wide and its hidden states {hidden}; they must be equal")
    if tokenizer is None:
        raise UserError("give tokenizer= too, when the language model is a config or a module")
    tokenizer.chat_template = _template(tokenizer)
    return language, tokenizer


def load_tokenizer(language: str, own: Any = None) -> tuple[Any, Any]:
    """A language model's tokenizer (or ``own``) and configuration, from a folder or a hub; no weights are read.

    Raises:
        UserError: they cannot be loaded.
    """
    name = language_folder(language)
    with loading("language", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return own or AutoTokenizer.from_pretrained(name, trust_remote_code=False), config


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
    level = probe(encoder, side, vision_levels)[0]
    tokenizer.chat_template = _template(tokenizer)
    _add_image_token(None, tokenizer)
    tokens = bridge_settings(bridge).visual_tokens((level.shape[1], level.shape[2]))
    return _processor(image_processor, tokenizer, tokens, side, resize)


def _processor(
    image_processor: Any, tokenizer: Any, tokens: int, image_size: int, resize: str | None
) -> SparsightProcessor:
    set_image_size(image_processor, image_size, resize)
    return SparsightProcessor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=tokens
    )


def language_folder(language: str) -> str:
    """Where a named language model lies.

    Raises:
        UserError: the embedded one is not installed.
    """
    if language != "smollm2-135m":
        return language
    folder = assets.smollm2_folder()
    if folder is None:
        raise assets.missing("smollm2-135m")
    return str(folder)


def _add_image_token(lm: Any, tokenizer: Any) -> None:
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if lm is not None and len(tokenizer) > lm.get_input_embeddings().weight.shape[0]:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)


@torch.no_grad()
def _check_logits(lm: Any, model: SparsightForConditionalGeneration) -> None:
    """A language model that scales or caps its logits behind the output layer would be composed wrongly."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    was_training = lm.training
    lm.eval()

    def widen(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        # Those of random weights are too small for a cap to show.
        return logits + torch.linspace(-100, 100, logits.shape[-1]).to(logits)

    hook = model.lm_head.register_forward_hook(widen)
    try:
        difference = (lm(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max().item()
    finally:
        hook.remove()
    lm.train(was_training)
    if difference > 1e-3:
        raise UserError(
            f"{type(lm).__name__} changes its logits behind the output layer (largest difference {difference:.3g}); "
            "such language models cannot be composed yet"
        )
