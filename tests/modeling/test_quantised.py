"""What a quantizer leaves alone in a composed model, and parts that are quantised already."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from sparsight.modeling.build import build
from tiny import BRIDGE, clip_config, make_image, make_language, make_vlm
from tiny import ask as prompt

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (125 MB): pip install bitsandbytes"
)
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed: pip install torchao")


def four_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def eight_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS = [
    pytest.param(four_bits, marks=needs_bitsandbytes),
    pytest.param(eight_bits, marks=needs_bitsandbytes),
    pytest.param(torchao_int8, marks=needs_torchao),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "vlm"
    model, processor = make_vlm(language=make_language(hidden=64)[0])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("given", [None, ["lm_head"]])
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel])
def test_F32_quantizers_leave_bridge_and_vision_alone(saved, auto, given):
    model = auto.from_pretrained(saved[0])
    # As every quantizer of transformers asks it.
    kept = HfQuantizer.get_modules_to_not_convert(model, given, model._keep_in_fp32_modules)
    packed = {name for name in linears(model) if should_convert_module(name, kept)}
    assert packed == {name for name in linears(model) if "language_model." in name}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_F32_a_dtype_is_that_of_all_parts(saved, dtype):
    model = AutoModelForImageTextToText.from_pretrained(saved[0], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("config", QUANTIZERS)
def test_F32_a_saved_model_loads_quantised(saved, config, tmp_path):
    folder, model, processor = saved
    inputs = prompt(processor, make_image(), "How many apples?")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config(), dtype=torch.float32)
        found = loaded(**inputs).logits.float()
    names = [name for name in linears(model) if "language_model." not in name]
    before, after = model.state_dict(), loaded.state_dict()
    assert len(names) > 10 and all(torch.equal(after[f"{n}.weight"], before[f"{n}.weight"]) for n in names)
    layer = "model.language_model.layers.0.mlp.up_proj.weight"
    weight = loaded.get_parameter(layer)
    assert weight.dtype in (torch.uint8, torch.int8) or type(weight.data) is not torch.Tensor
    assert found.isfinite().all()
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9
    loaded.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits.float(), found, atol=1e-2)


# --- parts that are quantised already ---

REFUSED = "quantised.*saved and loaded.*full precision.*quantization_config"


@pytest.fixture(scope="module")
def language_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    language, tokenizer = make_language(hidden=64)
    language.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.mark.parametrize("config", QUANTIZERS[:2])
def test_F38_a_language_model_of_bitsandbytes_composes_saves_and_loads(language_folder, config, tmp_path):
    folder, tokenizer = language_folder
    language = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32)
    model, processor = build(clip_config(), language, BRIDGE, tokenizer=tokenizer)
    inputs = prompt(processor, make_image(), "How many apples?")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds == {name: type(module) for name, module in again.named_modules()}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("config", QUANTIZERS[2:])
def test_F38_another_quantised_language_model_is_refused(language_folder, config):
    folder, tokenizer = language_folder
    language = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())
    with pytest.raises(ValueError, match="language: .*" + REFUSED):
        build(clip_config(), language, BRIDGE, tokenizer=tokenizer)


def test_F38_a_folder_is_refused_by_its_config_before_weights_are_read(language_folder, tmp_path):
    folder, tokenizer = language_folder
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="language: .*quantised .bitsandbytes.*saved and loaded"):
        build(clip_config(), str(tmp_path), BRIDGE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("part", ["vision", "language"])
def test_F38_weights_of_8_bits_are_refused_whoever_made_them(part, dtype):
    model, _ = make_vlm()
    parts = {"vision": model.model.vision_tower, "language": make_language()[0]}
    layer = next(module for module in parts[part].modules() if isinstance(module, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=part + ": .*" + REFUSED):
        build(parts["vision"], parts["language"], BRIDGE, tokenizer=make_language()[1])


def test_F38_packed_tensors_are_refused_without_a_flag():
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    language, tokenizer = make_language(hidden=64)
    quantize_(language, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="language: .*" + REFUSED):
        build(clip_config(), language, BRIDGE, tokenizer=tokenizer)
