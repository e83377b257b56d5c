"""Every image-text family of transformers works, is refused with a reason, or was not tried with a reason."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import __version__
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparsight.compat import returns_tuple
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach

SCRIPT = Path(__file__).parents[2] / "scripts" / "try_families.py"
spec = importlib.util.spec_from_file_location("try_families", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def made(name):
    """A tiny model of a family, if this transformers has it."""
    if name not in script.CONFIG_MAPPING:
        pytest.skip(f"transformers {__version__} has no {name}")
    return script.made(name)


WORKS = """
aria aya_vision blip-2 cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl
deepseek_vl_hybrid dots3_note ernie4_5_vl_moe exaone4_5 gemma3 glm46v glm4v glm4v_moe glm_ocr glmga got_ocr2
granite4_vision granite_docling hunyuan_vl hyperclovax_vision_v2 idefics2 idefics3 inkling2 instructblip internvl
janus kimi_k25 lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video llava_onevision minicpm_ocr
minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 molmo2 muse_glimmer muse_spark nemotron_h_omni ovis2 paddleocr_vl
paligemma pp_chart2table qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe
qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp shieldgemma2 smolvlm step3p7 unlimited_ocr video_llama_3
video_llava vipllava
"""
COMPRESSOR_ONLY = ["gemma4", "glm5_next", "mistral_large4"]


@pytest.mark.slow
def test_no_family_crashes_and_what_worked_still_does():
    names = list(script.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found = {outcome.name: outcome for outcome in script.outcomes()}
    assert [*found] == names
    assert [outcome for outcome in found.values() if outcome.status == "crashed"] == []
    assert all(outcome.detail for outcome in found.values())
    known = {name: "works" for name in WORKS.split()} | {name: "compressor only" for name in COMPRESSOR_ONLY}
    known = {name: status for name, status in known.items() if name in names}  # older versions have fewer families
    assert {name: found[name] for name, status in known.items() if found[name].status != status} == {}


def test_a_broken_promise_is_a_crash(monkeypatch):
    """The script tells what is wrong, and does not take it for a refusal."""
    monkeypatch.setattr(script, "check_sparse", lambda *_: torch.zeros(2) + torch.zeros(3))
    (outcome,) = script.outcomes(["llava"])
    assert outcome.status == "crashed" and "RuntimeError" in outcome.detail


def test_the_page_counts_what_was_found():
    found = [script.Outcome("a", "works", "x|y"), script.Outcome("b", "refused", "z")]
    told = script.page(found)
    assert f"each of the 2 image-text families of transformers {__version__}" in told
    assert "1 works, 1 refused." in told and "| a | works | x\\|y |" in told


def test_the_form_of_what_layers_return_is_read_from_their_source():
    """What skipped ones return in their stead: a bare tensor for a tuple would lose all samples but the first."""
    for layer, expected in ((FalconDecoderLayer, True), (FalconH1DecoderLayer, True), (LlamaDecoderLayer, False)):
        assert returns_tuple(layer.__new__(layer)) is expected


@pytest.mark.parametrize("name", ["gemma4", "mistral_large4"])
def test_layers_that_hand_more_on_are_not_skipped(name):
    """Keys, values or choices of one layer are used by later ones: the compressor works, the skipper is refused."""
    model = made(name)
    with pytest.raises(ValueError, match="none can be skipped: attach the compressor alone"):
        attach(model, skipper=SkipperConfig(alpha=0.5))
    attach(model, CompressorConfig(keep=0.5))


def test_the_loss_that_balances_experts_is_refused_with_dropped_tokens():
    model = made("qwen3_vl_moe")
    model.config.text_config.router_aux_loss_coef = 0.001  # 5.0 to 5.2 have none
    batch = script.batch_of(model)
    plain = model(**batch, output_router_logits=True).aux_loss
    handle = attach(model, CompressorConfig(keep=1.0))
    assert torch.equal(model(**batch, output_router_logits=True).aux_loss, plain)
    handle.detach()
    attach(model, CompressorConfig(keep=0.5))
    with pytest.raises(ValueError, match="Qwen3VLMoeForConditionalGeneration was asked for router_logits"):
        model(**batch, output_router_logits=True)


def test_features_of_deeper_layers_go_with_their_tokens():
    """granite4_vision: what is added in a deeper layer is that of the kept positions, as if the others were hidden."""
    model = made("granite4_vision")
    batch = script.batch_of(model)
    decoder, seen = model.get_decoder(), []
    plain = decoder.forward
    decoder.forward = lambda *args, **kwargs: (seen.append(kwargs), plain(*args, **kwargs))[1]
    script.gradients(model, batch)
    attach(model, CompressorConfig(keep=0.5))
    script.gradients(model, batch)
    full, short = seen
    kept = short["vision_mask"][..., 0].sum()
    for layer, features in short["deepstack_features"].items():
        before = full["deepstack_features"][layer]
        assert len(features) == kept < len(before)
        assert all((before == row).all(1).any() for row in features)  # each is one of those, not a blend
