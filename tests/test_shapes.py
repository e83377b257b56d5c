"""Closed-form parameters and encoder FLOPs against real modules of the same configurations."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from sparsight.bridges import build_bridge
from sparsight.cost.flops import language_flops
from sparsight.cost.shapes import (
    KNOWN,
    LanguageShape,
    LiteShape,
    Trains,
    bridge_parameters,
    encoder_shape,
    language_shape,
)
from sparsight.devices.flops import flop_counter
from sparsight.modeling.configuration import EfficientNetLiteConfig
from sparsight.modeling.efficientnet_lite import EfficientNetLiteModel
from sparsight.modeling.encoders import count_flops, feature_levels
from sparsight.settings.bridges import (
    ChainOfSightConfig,
    LinearConfig,
    MlpConfig,
    PixelShuffleConfig,
    ResamplerConfig,
    bridge_settings,
)
from sparsight.settings.recipe import ScratchLanguage
from tiny import make_vlm

SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128, "pad_token_id": 0}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite")
FAMILIES += ("olmo2", "phi", "starcoder2", "gpt_neox", "stablelm")
TINY = 0.06  # share of norms and biases, which are not counted, in models as small as here


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(config, auto):
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("name", [name for name in KNOWN["vision"] if name != "efficientnet-lite0"])
def test_encoder_parameters(name):
    values = dict(KNOWN["vision"][name], vision_use_head=False)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    assert encoder_shape(name).parameters == pytest.approx(parameters(on_meta(config, AutoModel)), rel=3e-3)


def test_lite_parameters():
    for blocks in ((10, 15), (2, 10), (4,)):
        model = EfficientNetLiteModel(EfficientNetLiteConfig(out_blocks=blocks))
        assert LiteShape(blocks).parameters == parameters(model)


@pytest.mark.parametrize("name", KNOWN["language"])
def test_language_parameters(name):
    values = dict(KNOWN["language"][name])
    model = on_meta(AutoConfig.for_model(values.pop("model_type"), **values), AutoModelForCausalLM)
    assert language_shape(name).parameters == pytest.approx(parameters(model), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_parameters_of_each_family(family):
    config = AutoConfig.for_model(family, **TEXT)
    real = parameters(on_meta(config, AutoModelForCausalLM))
    assert LanguageShape.from_config(config).parameters == pytest.approx(real, rel=TINY)


def test_published_totals():
    """As their authors give them, but for norms and biases."""
    published = {"vicuna-7b": 6_738_415_616, "qwen2.5-7b": 7_615_616_512, "smollm2-135m": 134_515_008}
    assert {name: language_shape(name).parameters for name in published} == pytest.approx(published, rel=3e-4)
    assert language_shape("vicuna-7b").lora_parameters(64) == 159_907_840


BRIDGES = [
    LinearConfig(),
    MlpConfig(),
    PixelShuffleConfig(factor=3),
    ResamplerConfig(tokens=5, width=32, heads=2, depth=2),
]
BRIDGES += [
    ChainOfSightConfig("1:4,2:2,4:1", width=48, heads=2),
    ChainOfSightConfig("1:2,3:2", width=16, heads=2, shared_queries=True),
]


@pytest.mark.parametrize("settings", BRIDGES, ids=lambda settings: settings.kind)
def test_bridge_parameters(settings):
    assert bridge_parameters(settings, (24, 40), 56) == parameters(build_bridge(settings, (24, 40), 56))


def test_paper_bridge_parameters():
    """Chain-of-Sight's bridges of 80 and of 1296 tokens: 54.7 M and 81.1 M."""
    counts = [bridge_parameters(ChainOfSightConfig(name), (1024, 1024), 4096) / 1e6 for name in ("cos-80", "cos-1296")]
    assert [round(count, 1) for count in counts] == [54.7, 81.1]


def test_parameters_of_a_whole_model():
    model, processor = make_vlm()
    shape = language_shape(
        ScratchLanguage(hidden=32, layers=2, heads=2, intermediate=64, vocabulary=len(processor.tokenizer))
    )
    assert shape == LanguageShape.from_config(model.config.text_config)
    encoder = encoder_of(model.config.vision_config)
    bridge = bridge_parameters(bridge_settings(model.config.bridge_config), model.config.level_widths, shape.hidden)
    assert shape.parameters + encoder.parameters + bridge == pytest.approx(parameters(model), rel=TINY)
    assert tuple(model.config.map_size) == encoder.map_size(64)
    assert list(model.config.level_widths) == encoder.level_widths(None)


def encoder_of(config):
    with tempfile.TemporaryDirectory() as where:
        (Path(where) / "config.json").write_text(json.dumps(config.to_dict()))
        return encoder_shape(where)


VITS = {
    "clip": ("clip_vision_model", {"patch_size": 8, "image_size": 32}),
    "siglip": ("siglip_vision_model", {"patch_size": 8, "image_size": 32, "vision_use_head": False}),
    "dinov2": ("dinov2", {"patch_size": 8, "image_size": 32, "mlp_ratio": 2}),
    "dinov2 giant": ("dinov2", {"patch_size": 8, "image_size": 32, "mlp_ratio": 4, "use_swiglu_ffn": True}),
    "vit": ("vit", {"patch_size": 8, "image_size": 32}),
}


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("name", VITS)
def test_encoder_flops(name, trains):
    kind, values = VITS[name]
    config = AutoConfig.for_model(
        kind, **({k: v for k, v in SMALL.items() if kind != "dinov2" or "inter" not in k} | values)
    )
    model = AutoModel.from_config(config).requires_grad_(trains)
    shape = encoder_of(config)
    assert shape.parameters == pytest.approx(parameters(model), rel=TINY)
    for side, levels in ((32, None), (64, [1, 2])):
        computed, measured = shape.flops(side, levels, Trains(vision=trains)), count_flops(model, side, levels)
        assert abs(computed / measured - 1) < 0.01, (computed, measured)


def test_lite_flops():
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).requires_grad_(False)
    shape = encoder_shape("efficientnet-lite0")
    for side in (64, 100, 256):
        assert shape.flops(side, None, Trains()) == count_flops(model, side)
        levels = feature_levels(model.eval(), torch.zeros(1, 3, side, side))
        assert shape.map_size(side) == tuple(levels[0].shape[1:3])
        assert shape.level_widths(None) == [level.shape[3] for level in levels]


def test_unknown_names_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="language 'gpt-5': its sizes are not known.*vicuna-7b"):
        language_shape("gpt-5")
    (tmp_path / "config.json").write_text('{"model_type": "convnext"}')
    with pytest.raises(ValueError, match="an encoder of type 'convnext' has no closed form"):
        encoder_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"lacks \['num_hidden_layers', .*found \['hidden_size'"):
        language_shape(str(tmp_path))


def test_a_folder_is_read_as_its_model_is(tmp_path):
    config = AutoConfig.for_model("qwen2", **TEXT, num_key_value_heads=2, intermediate_size=96)
    config.save_pretrained(tmp_path)
    assert language_shape(str(tmp_path)) == LanguageShape.from_config(config)
    assert language_shape(str(tmp_path), layers=1).layers == 1
    parts = language_flops(language_shape(str(tmp_path)), 2, 10, 3, Trains())
    assert set(parts) == {"language_projections", "language_attention", "language_mlp", "vocabulary"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "qwen2"])
def test_experts_are_counted_as_torch_does(family: str) -> None:
    """A token pays for the experts that it goes through, memory for all of them; the router's FLOPs are left out."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    some = sizes | {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48}
    config: Any = {
        "mixtral": lambda: MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2),
        "qwen3": lambda: Qwen3MoeConfig(**some, head_dim=16),
        "qwen2": lambda: Qwen2MoeConfig(**some, shared_expert_intermediate_size=80),
    }[family]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")  # torch's counter does not see into grouped products
    shape = LanguageShape.from_config(config)
    assert shape.parameters == pytest.approx(parameters(model), rel=TINY)
    with flop_counter(model) as counter, torch.no_grad():
        model(input_ids=torch.ones(2, 40, dtype=torch.long), use_cache=False)
    ours = sum(language_flops(shape, 2, 40, 80, Trains(False, False, False)).values())
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
