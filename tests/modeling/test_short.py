"""Plain attention over short rows is the fused one, in numbers; longer rows, fp32, and inference keep the kernel."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsight.modeling import short
from sparsight.modeling.short import NAME, attention


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, attn_implementation="sdpa")
    return LlamaForCausalLM(config).train()


def gradients(model, padded):
    ids = torch.arange(24).view(2, 12) % 64
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
    labels = ids.where(mask.bool(), -100)
    if padded == "weighted":  # what is added to the scores, as `Collator` makes it
        later = torch.full((12, 12), -torch.inf).triu(1)
        mask = torch.where(mask.bool(), 0.1 * ids, -torch.inf)[:, None, None] + later
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.fixture
def plain_calls(monkeypatch):
    calls, repeat = [], short.repeat_kv

    def counted(x, groups):
        calls.append(x.shape[2])
        return repeat(x, groups)

    monkeypatch.setattr(short, "repeat_kv", counted)
    return calls


@pytest.mark.parametrize("padded", [False, True, "weighted"])
def test_gradients_equal_the_fused_ones(model, padded, plain_calls, monkeypatch):
    monkeypatch.setattr(short, "LONGEST", {torch.float32: 12})  # for exact numbers
    fused = gradients(model, padded)
    with attention(model.model):
        found = gradients(model, padded)
    assert plain_calls == [12] * 4  # keys and values of two layers
    assert model.config._attn_implementation == "sdpa"
    # Measured: largest difference 3e-8 of gradients up to 0.4.
    torch.testing.assert_close(found, fused, rtol=1e-5, atol=1e-6)


def test_long_rows_and_inference_keep_the_fused_kernel(model, plain_calls, monkeypatch):
    with attention(model.model):
        assert model.config._attn_implementation == NAME
        gradients(model, padded=False)  # fp32
        monkeypatch.setattr(short, "LONGEST", {torch.float32: 11})
        gradients(model, padded=False)
        monkeypatch.setattr(short, "LONGEST", {torch.float32: 12})
        model.eval().generate(torch.arange(5)[None], max_new_tokens=3)
    assert not plain_calls


@pytest.mark.parametrize("length, calls", [(640, 4), (641, 0)])
def test_in_bf16_short_rows_are_plain(model, plain_calls, length, calls):
    ids = torch.arange(length)[None] % 64
    with attention(model.model), torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert plain_calls == [length] * calls
