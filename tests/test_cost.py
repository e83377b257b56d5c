"""The closed-form cost against what torch counts on real models: forward and backward, within 2%.

Measured: equal to the last FLOP, but where the bridge alone is frozen (+1.9% at most: the closed form leaves out that
the first level's queries need no gradient then).
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.pytorch_utils import Conv1D

from sparsight.bridges import build_bridge
from sparsight.cost import LanguageShape, Trains, bridge_flops, language_flops
from sparsight.modeling.encoders import count_flops
from sparsight.settings.bridges import ChainOfSightConfig, LinearConfig, MlpConfig, PixelShuffleConfig, ResamplerConfig
from sparsight.settings.recipe import Lora, Stage
from sparsight.training.stages import add_lora, select_trainable
from tiny import clip_config, make_language, make_vlm

TOLERANCE = 0.02
BRIDGES = {
    "linear": LinearConfig(),
    "mlp": MlpConfig(),
    "pixel_shuffle": PixelShuffleConfig(factor=2),
    "resampler": ResamplerConfig(tokens=12, width=32, heads=2),
    "chain_of_sight": ChainOfSightConfig("1:4,2:2,4:1", width=32, heads=2),
}


def counted(run):
    """FLOPs that `run()` executes. The counter does not see into fused attention on CPU, so it is taken apart."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def assert_close(computed, measured):
    error = computed / measured - 1
    assert abs(error) <= TOLERANCE, f"computed {computed:.6g}, measured {measured:.6g}, error {error:+.2%}"


def stage_of(trains):
    rates = {p: 1e-3 for p in ("vision", "bridge", "language") if getattr(trains, p)}
    lora = Lora(rank=trains.lora_rank) if trains.lora_rank else None
    return Stage(name="s", bridge=LinearConfig(), learning_rate=rates, samples=1, lora=lora)


def prepared(model, trains):
    if trains.lora_rank:
        add_lora(model, stage_of(trains).lora, seed=0)
    if trains.vision or trains.bridge or trains.language:
        select_trainable(model, stage_of(trains))
    else:
        model.requires_grad_(False)
    return model.train()


def batch_of(model, images, texts=(30, 30), labelled=(3, 17)):
    """Right-padded rows: a row's image placeholders, then random text, its last tokens labelled."""
    each = model.config.num_image_tokens
    longest = max(count * each + text for count, text in zip(images, texts, strict=True))
    ids = torch.randint(6, 300, (len(images), longest), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (count, text, supervised) in enumerate(zip(images, texts, labelled, strict=True)):
        end = count * each + text
        ids[row, : count * each] = model.config.image_token_id
        labels[row, end - supervised : end] = ids[row, end - supervised : end]
        mask[row, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


LANGUAGE_STEPS = {
    "all train": Trains(vision=True, bridge=True, language=True),
    "frozen, gradient flows to the bridge": Trains(bridge=True, language=False),
    "frozen, gradient flows to the encoder": Trains(vision=True, bridge=False, language=False),
    "alone": Trains(bridge=False, language=True),
    "nothing trains": Trains(bridge=False, language=False),
    "lora and bridge": Trains(bridge=True, language=True, lora_rank=4),
    "lora alone": Trains(bridge=False, language=True, lora_rank=4),
}


@pytest.mark.parametrize("kv_heads", [4, 1], ids=["all heads", "grouped heads"])
@pytest.mark.parametrize("trains", LANGUAGE_STEPS.values(), ids=LANGUAGE_STEPS)
def test_language_flops(trains, kv_heads):
    language, tokenizer = make_language(hidden=64, heads=4)
    config = language.config
    config.num_key_value_heads = kv_heads
    model, _ = make_vlm(LinearConfig(), language=config, tokenizer=tokenizer, image_size=32)
    model = prepared(model, trains)
    model.set_attn_implementation("eager")
    # Visual tokens are given, so that nothing but the language model runs.
    visual = torch.randn(3, 16, 64, requires_grad=trains.bridge or trains.vision)
    batch = batch_of(model, images=(2, 1))
    batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=visual)}

    def run():
        loss = model(**batch, loss_only=True).loss
        if loss.requires_grad:
            loss.backward()

    shape = LanguageShape.from_config(config)
    assert shape.kv_heads == kv_heads
    parts = language_flops(shape, *batch["input_ids"].shape, labels=20, trains=trains)
    assert_close(sum(parts.values()), counted(run))


BRIDGE_STEPS = {
    "trains": Trains(bridge=True, language=False),
    "trains with the encoder": Trains(vision=True, bridge=True),
    "frozen, gradient flows to the encoder": Trains(vision=True, bridge=False),
    "frozen": Trains(bridge=False),
}


@pytest.mark.parametrize("map_size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("trains", BRIDGE_STEPS.values(), ids=BRIDGE_STEPS)
@pytest.mark.parametrize("settings", BRIDGES.values(), ids=BRIDGES)
def test_bridge_flops(settings, trains, map_size):
    widths = (24, 40)
    bridge = build_bridge(settings, widths, 48).requires_grad_(trains.bridge)
    levels = [torch.randn(3, *map_size, width, requires_grad=trains.vision) for width in widths]

    def run():
        out = bridge(levels)
        if out.requires_grad:
            out.sum().backward()

    assert_close(bridge_flops(settings, widths, 48, map_size, 3, trains), counted(run))


STEPS = {
    "all train": Trains(vision=True, bridge=True, language=True),
    "frozen encoder": Trains(bridge=True, language=True),
    "bridge alone": Trains(bridge=True, language=False),
    "frozen encoder, lora": Trains(bridge=True, language=True, lora_rank=4),
    "encoder alone": Trains(vision=True, bridge=False, language=False),
    "language alone": Trains(bridge=False, language=True),
}


@pytest.mark.parametrize("trains", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("settings", BRIDGES.values(), ids=BRIDGES)
def test_step_flops(settings, trains):
    model, _ = make_vlm(settings)
    model = prepared(model, trains)
    model.set_attn_implementation("eager")
    batch = batch_of(model, images=(2, 0)) | {"pixel_values": torch.randn(2, 3, 64, 64)}
    config = model.config
    shape, map_size = LanguageShape.from_config(config.text_config), tuple(config.map_size)
    parts = language_flops(shape, *batch["input_ids"].shape, 20, trains)
    parts["bridge"] = bridge_flops(settings, config.level_widths, shape.hidden, map_size, 2, trains)
    parts["encoder"] = 2 * count_flops(model.model.vision_tower, config.image_size, config.vision_levels)
    assert all(value > 0 for value in parts.values())
    assert_close(sum(parts.values()), counted(lambda: model(**batch, loss_only=True).loss.backward()))


def test_encoder_flops_leave_no_trace():
    torch.manual_seed(0)
    model, _ = make_vlm()
    encoder = model.model.vision_tower.train()
    encoder.set_attn_implementation("sdpa")
    both = count_flops(encoder, 64)
    assert encoder.training and encoder.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in encoder.parameters())
    forward = count_flops(encoder.requires_grad_(False), 64)
    assert forward < both < 3 * forward  # no gradient goes to the pixels
    assert count_flops(encoder, 128) > 4 * forward  # four times the patches, and attention on top
    config = clip_config()
    # Three of the four blocks: the last level is the output of the third.
    blocks = 3 * (4 * 32 * 32 + 2 * 32 * 64) * 2 * 65 + 3 * 4 * 65**2 * 32
    patches = 2 * 64 * config.hidden_size * 3 * 8 * 8
    assert forward == blocks + patches


FAMILIES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 96},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 96},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 24},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 24},
    "gemma3_text": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 24},
    "smollm3": {"num_key_value_heads": 2, "intermediate_size": 96, "pad_token_id": 0},
    "granite": {"num_key_value_heads": 2, "intermediate_size": 96},
    "cohere": {"num_key_value_heads": 2, "intermediate_size": 96, "pad_token_id": 0},
    "stablelm": {"num_key_value_heads": 2, "intermediate_size": 96},
    "olmo": {"num_key_value_heads": 2, "intermediate_size": 96},
    "olmo2": {"num_key_value_heads": 2, "intermediate_size": 96},
    "phi": {"intermediate_size": 96},
    "starcoder2": {"num_key_value_heads": 2, "intermediate_size": 96},
    "gpt_neox": {"intermediate_size": 96},
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_language_shape_of_each_family(family):
    """The linear maps of the shape have as many weights as those of the real layers."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    config = AutoConfig.for_model(family, **(sizes | FAMILIES[family]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = LanguageShape.from_config(config)
    maps = (torch.nn.Linear, Conv1D)
    real = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, maps))
    assert shape.layers * sum(a * b for a, b in shape.linear_maps()) == real
    assert (shape.vocabulary, shape.hidden) == tuple(model.get_output_embeddings().weight.shape)
