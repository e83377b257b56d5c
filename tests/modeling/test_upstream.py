"""What transformers' common tests ask of a vision-language model; and, where they can be had, these tests themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig

from sparsight.modeling import EfficientNetLiteConfig, SparsightForConditionalGeneration
from tiny import make_vlm

SUITE = Path(__file__).with_name("upstream_suite.py")
VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=8
)
FOLDER = os.environ.get("SPARSIGHT_TRANSFORMERS_TESTS")


@pytest.fixture(scope="module")
def model():
    return make_vlm()[0].eval()


def prompt(model, images=1):
    return torch.tensor([[7] + [model.config.image_token_id] * (images * model.config.num_image_tokens) + [8, 9]])


@torch.no_grad()
def test_F18_placeholders_without_images_are_words(model):
    """Other families take them so; assisted decoding and many of transformers' tests depend on it."""
    ids = prompt(model)
    as_words = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(model(input_ids=ids).logits, as_words)
    new = model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert new.shape == (1, ids.shape[1] + 2)


@torch.no_grad()
def test_F18_assisted_decoding_answers_as_greedy_search_does(model):
    ids = prompt(model)
    settings = {"pixel_values": torch.rand(1, 3, 64, 64), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, assistant_model=model, **settings), wanted)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@torch.no_grad()
def test_F18_features_of_images_come_with_the_encoders_own(model, kernel):
    model.set_attn_implementation(kernel)
    pixels = torch.rand(2, 3, 64, 64)
    for owner in (model, model.model):
        plain = owner.get_image_features(pixels)
        own = model.model.vision_tower(pixels, output_hidden_states=True)
        assert torch.equal(plain.last_hidden_state, own.last_hidden_state)
        assert plain.pooler_output.shape == (2, 8, 32) and plain.hidden_states is None
        every = owner.get_image_features(pixels, output_hidden_states=True, output_attentions=kernel == "eager")
        assert torch.equal(every.pooler_output, plain.pooler_output)
        assert all(map(torch.equal, every.hidden_states, own.hidden_states)) and len(every.hidden_states) == 5
        if kernel == "eager":
            assert [tuple(each.shape) for each in every.attentions] == [(2, 2, 65, 65)] * 4
        assert isinstance(owner.get_image_features(pixels, return_dict=False), tuple)


@pytest.mark.parametrize("vision", [EfficientNetLiteConfig(), VIT])
@torch.no_grad()
def test_F18_other_encoders_have_a_last_state_too(vision):
    model, _ = make_vlm("1:4", vision=vision, image_size=64)
    found = model.eval().get_image_features(torch.rand(2, 3, 64, 64), output_hidden_states=True)
    assert found.last_hidden_state.shape[0] == 2 and len(found.hidden_states) >= 2
    asked_by_configuration = model.config.vision_config
    asked_by_configuration.output_hidden_states = True
    assert model.get_image_features(torch.rand(1, 3, 64, 64)).hidden_states is not None


def test_F18_the_head_has_a_plan_for_tensor_parallelism(model):
    assert model._tp_plan["lm_head"] == "colwise_gather_output"
    assert any(name.startswith("model.language_model.layers") for name in model._tp_plan)  # its own is kept


@torch.no_grad()
def test_F18_a_pass_is_one_graph(model):
    """What ``_can_compile_fullgraph`` promises, of prompts with images and of decoding."""
    assert SparsightForConditionalGeneration._can_compile_fullgraph and model._can_compile_fullgraph
    torch._dynamo.reset()
    whole = torch.compile(model.forward, backend="eager", fullgraph=True)
    ids, pixels = prompt(model), torch.rand(1, 3, 64, 64)
    for inputs in ({"input_ids": ids, "pixel_values": pixels}, {"input_ids": ids[:, -1:]}):
        error = (whole(**inputs).logits - model(**inputs).logits).abs().max()
        assert error <= 1e-5, error


def failures(name):
    """What fails of transformers' suite for LLaVA or for us, and how many passed."""
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-k", name, "-rfs", "--tb=no", "-W", "ignore"]
    command += ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider", "--rootdir", str(SUITE.parent)]
    output = subprocess.run(command, capture_output=True, text=True, cwd=SUITE.parent).stdout
    found = re.findall(rf"^(?:SUB)?FAILED.*?{name}::(\w+)", output, re.MULTILINE)
    passed = re.search(r"(\d+) passed", output)
    assert passed, output[-3000:]
    return set(found), int(passed[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(FOLDER is None, reason="SPARSIGHT_TRANSFORMERS_TESTS names no folder: transformers' own `tests`")
def test_F18_whatever_llava_passes_we_pass():
    theirs, passed = failures("LlavaTest")
    ours, _ = failures("SparsightTest")
    assert passed > 100
    assert ours - theirs == set()
