"""The methods on models whose weights are packed, under LoRA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from families import batch_of, made
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.executed import figures

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
QUARTER = CompressorConfig(keep=0.25), SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")


def packing(kind: str) -> Any:
    import transformers

    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "quanto":
        return transformers.QuantoConfig(weights="int8")
    return transformers.BitsAndBytesConfig(load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8")


def installed(package: str, *kinds: str) -> list[Any]:
    absent = find_spec(package.partition(".")[0]) is None
    reason = f"{package} is not installed: pip install {package}"
    return [pytest.param(kind, marks=pytest.mark.skipif(absent, reason=reason)) for kind in kinds]


KINDS = [*installed("bitsandbytes", "nf4", "int8"), *installed("torchao", "torchao"), *installed("optimum", "quanto")]


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**LORA)).train()


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava, clip + llama", "qwen2_5_vl"])
def test_a_quantised_model_is_idle_bit_by_bit_and_costs_what_its_twin_does(name: str, kind: str, tmp_path: Any) -> None:
    """Executed FLOPs, those of a packed encoder and projector too, are the ones of the model before it was packed."""
    twin = made(name)
    twin.save_pretrained(tmp_path)
    options = {"quantization_config": packing(kind), "dtype": torch.float32, "attn_implementation": "eager"}
    model = adapted(AutoModelForImageTextToText.from_pretrained(tmp_path, **options))
    batch = batch_of(name, model, (1, 0, 2))
    plain = gradients(model, batch)
    assert len(plain) > 8
    handle = attach(model, CompressorConfig(keep=1.0), SkipperConfig(alpha=0.0))
    handle.step(0, 0.0)
    assert same(plain, gradients(model, batch))
    dense = figures(handle, handle.take_passes())
    handle.detach()
    assert same(plain, gradients(model, batch))
    found = []
    for each in (model, adapted(twin)):
        handle = attach(each, *QUARTER)
        handle.step(3, 0.5)
        gradients(each, batch)
        (done,) = handle.passes
        assert done.length < done.length_in and done.layers_run < 4
        found.append(figures(handle, handle.take_passes()))
        handle.detach()
    assert found[0] == found[1]
    assert found[0]["flops"] < dense["flops"] and found[0]["language_flops_ratio"] < 0.5
    assert same(plain, gradients(model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_were_trained_on_it_load_again(kind: str, tmp_path: Any) -> None:
    name = "llava, clip + llama"
    made(name).save_pretrained(tmp_path / "base")

    def base() -> Any:
        options = {"quantization_config": packing(kind), "dtype": torch.float32}
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "base", **options)

    model = adapted(base())
    batch = batch_of(name, model, (1, 0, 2))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.1)
    handle = attach(model, *QUARTER)
    for step in range(3):
        handle.step(step, step / 3)
        gradients(model, batch)
        optimizer.step()
    handle.detach()
    model.save_pretrained(tmp_path / "adapters")
    assert {file.name for file in (tmp_path / "adapters").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = PeftModel.from_pretrained(base(), tmp_path / "adapters")
    with torch.no_grad():  # in eval mode on a CPU with bf16, bitsandbytes wants widths that are multiples of 32
        expected = model(**batch).logits
        assert torch.equal(again.train()(**batch).logits, expected)
        with model.disable_adapter():
            assert not torch.allclose(model(**batch).logits, expected)
