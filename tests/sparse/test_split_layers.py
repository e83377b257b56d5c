"""Skippers with ``tokens: visual``: in a skipped layer visual tokens pass by, and text goes through it alone."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, TEXT, batch_of, made
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from sparsight.errors import UserError
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import NoEffectWarning, attach
from sparsight.sparse.gather import Beside, Kept
from sparsight.training.trainer import LARGEST, _Recorder

HALF = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant", tokens="visual")
OFF = (False, True, True, False)
LLAVA = "llava, clip + llama"


def gradients(model, *batches):
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    sum(losses).backward()
    return torch.stack(losses).detach(), {
        key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None
    }


def assert_alike(found, expected, atol=1e-5):
    assert torch.allclose(found[0], expected[0], atol=atol)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][key], atol=atol, rtol=1e-4, msg=key)


def hiding(visual_BT, plain, hidden, *args, **kwargs):
    """A layer over all positions in which none but itself sees a visual token, and these come out as they went in."""
    mask, length = kwargs["attention_mask"], hidden.shape[1]
    if mask is None or mask.ndim == 2:
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        mask = seen if mask is None else seen & mask[:, None, None].bool()
    hidden_keys = visual_BT[:, None, None] & ~torch.eye(length, dtype=torch.bool)
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = mask.expand(len(hidden), -1, -1, -1).masked_fill(hidden_keys, blocked)
    found = plain(hidden, *args, **(kwargs | {"attention_mask": mask}))
    out, *rest = found if isinstance(found, tuple) else (found,)
    out = torch.where(visual_BT[..., None], hidden, out)
    return (out, *rest) if isinstance(found, tuple) else out


@pytest.mark.parametrize("name", FAMILIES)
def test_text_goes_through_a_layer_that_visual_tokens_pass_by(name):
    model = made(name)
    batch = batch_of(name, model, (1, 0, 2) if name != "paligemma" else (1, 1))
    handle = attach(model, skipper=HALF)
    handle.set_skipped(OFF[: handle.parts.layers])
    found = gradients(model, batch)
    (done,) = handle.passes
    visual_BT = torch.isin(batch["input_ids"], torch.tensor(handle.parts.visual_token_ids))
    assert done.layers_run == handle.parts.layers - sum(handle.skipped)
    assert done.beside == (~visual_BT & batch["attention_mask"].bool()).sum(1).max() < done.length
    layers, off = handle.layers, handle.skipped
    handle.detach()
    dense = gradients(model, batch)
    for layer in (layer for layer, skipped in zip(layers, off, strict=True) if skipped):
        layer.forward = partial(hiding, visual_BT, layer.forward)
    assert_alike(found, gradients(model, batch))
    assert not torch.allclose(found[0], dense[0], atol=1e-5)


def test_all_layers_on_are_the_plain_model_bit_by_bit():
    model = made(LLAVA)
    batch = batch_of(LLAVA, model, (1, 0, 2))
    plain = gradients(model, batch)
    attach(model, skipper=HALF.model_copy(update={"alpha": 0.0})).step(0, 0.0)
    found = gradients(model, batch)
    assert torch.equal(plain[0], found[0]) and all(torch.equal(plain[1][key], found[1][key]) for key in plain[1])


def test_text_alone_goes_through_all_layers():
    model = made(LLAVA)
    batch = batch_of(LLAVA, model, (0, 0))
    plain = gradients(model, batch)
    handle = attach(model, skipper=HALF)
    handle.set_skipped(OFF)
    found = gradients(model, batch)
    assert torch.equal(plain[0], found[0]) and handle.passes[0].layers_run == 4


@pytest.mark.parametrize("attached_first", [False, True])
@pytest.mark.parametrize("name", [LLAVA, "qwen2_5_vl", "sparsight"])
def test_recomputation_splits_each_pass_as_it_was(name, attached_first):
    """Of two passes before one backward pass, the first would be split as the second, or not at all."""
    found = []
    for recompute in (False, True):
        model = made(name)
        batches = [batch_of(name, model, images, seed) for seed, images in enumerate([(1, 2), (2, 1)])]
        if recompute and not attached_first:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = attach(model, CompressorConfig(keep=0.5), HALF)
        handle.step(0, 0.0)
        handle.set_skipped(OFF[: handle.parts.layers])
        if recompute and attached_first:  # around ours
            for layer in handle.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        found.append(gradients(model, *(batch | {"use_cache": False} for batch in batches)))
    assert_alike(*found, atol=1e-6)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_accumulation_is_the_large_batch(keep):
    """Rows of unequal length, with padding, with none and with two images."""
    found = []
    for parts in ([slice(0, 3)], [slice(row, row + 1) for row in range(3)]):
        model = made(LLAVA)
        attach(model, CompressorConfig(keep=keep), HALF).set_skipped(OFF)
        batch = batch_of(LLAVA, model, (1, 0, 2))
        total, images = (batch["labels"] != -100).sum(), [slice(0, 1), slice(1, 1), slice(1, 3)]
        for part in parts:
            some = {key: value[part] for key, value in batch.items()}
            pixels = slice(images[part.start].start, images[part.stop - 1].stop)
            some["pixel_values"] = batch["pixel_values"][pixels] if pixels.start < pixels.stop else None
            model(**some, num_items_in_batch=total).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], atol=1e-5, rtol=1e-4, msg=key)


def test_what_a_compressor_left_of_them_passes_by():
    model = made(LLAVA)
    batch = batch_of(LLAVA, model, (1, 0, 2))
    handle, seen = attach(model, CompressorConfig(keep=0.5), HALF), []
    handle.set_skipped(OFF)
    handle.layers[1].register_forward_hook(lambda _, args, out: seen.append((args[0] != out).any(-1)))
    model(**batch)
    text_BT = ~torch.isin(batch["input_ids"], torch.tensor(handle.parts.visual_token_ids))
    text_B = (text_BT & batch["attention_mask"].bool()).sum(1)
    (done,), (changed_BK,) = handle.passes, seen
    assert changed_BK.sum(1).tolist() == text_B.tolist() and done.beside == text_B.max() < done.length


def test_every_layer_is_trained_in_every_step():
    model = made(LLAVA)
    handle = attach(model, skipper=HALF)
    handle.set_skipped(OFF)
    _, found = gradients(model, batch_of(LLAVA, model))
    handle.clear_gradients()
    groups = [{"layer": number} for number in range(4)]  # as an optimizer has them that leaves layers alone
    trainer, state = SimpleNamespace(handle=handle), SimpleNamespace(global_step=max(LARGEST) + 1)
    _Recorder.on_step_begin(
        SimpleNamespace(trainer=trainer), None, state, optimizer=SimpleNamespace(param_groups=groups)
    )
    assert not any(group["skipped"] for group in groups)
    for number in range(4):
        inside = [p for key, p in model.named_parameters() if f"{handle.parts.decoder}.layers.{number}." in key]
        assert inside and all(p.grad is not None and p.grad.any() for p in inside)


def test_packed_samples_are_refused_where_flash_would_mix_them():
    model = made(LLAVA)
    handle = attach(model, skipper=HALF)
    handle.set_skipped(OFF)
    batch = batch_of(LLAVA, model, (1,))
    batch["position_ids"] = torch.cat([torch.arange(8), torch.arange(batch["input_ids"].shape[1] - 8)])[None]
    del batch["attention_mask"]
    handle._forwards.decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="packed samples under flash_attention_2, and a skipper with tokens 'visual'"):
        model(**batch)


def test_no_effect_is_told():
    model = made(LLAVA)
    handle = attach(model, skipper=HALF)
    handle.set_skipped(OFF)
    batch = batch_of(LLAVA, model, (0,))
    for _ in range(49):
        model(**batch)
    with pytest.warns(NoEffectWarning, match="the skipper's tokens had no effect in 50 passes: no input_ids"):
        model(**batch)
    with pytest.raises(UserError, match="no vision tower"):
        attach(LlamaForCausalLM(LlamaConfig(**TEXT)), skipper=HALF)


@pytest.mark.parametrize("shape", [(2, 4, 1, 5), (5, 8), (5, 5)])
def test_arguments_that_cannot_be_cut_are_refused(shape):
    """A bias of attention by heads, say; what has no axis of positions goes through as it is."""
    text_BT = torch.tensor([[True, False, True, True, False], [True, True, True, False, False]])
    beside = Beside(Kept.of(text_BT), text_BT)
    given = {"scale": torch.ones(3, 4), "cos": torch.arange(5.0)[None], "at": torch.arange(30).view(3, 2, 5)}

    def layer(x_BKD, bias=None, **seen):
        assert x_BKD.tolist() == [[[0], [2], [3]], [[5], [6], [7]]] and seen["scale"] is given["scale"]
        assert seen["cos"].tolist() == [[0, 2, 3], [0, 1, 2]] and seen["at"][1].tolist() == [[10, 12, 13], [15, 16, 17]]
        return -x_BKD

    x_BTD = torch.arange(10).view(2, 5, 1)
    assert beside.through(layer, x_BTD, **given)[..., 0].tolist() == [[0, 1, -2, -3, 4], [-5, -6, -7, 8, 9]]
    with pytest.raises(UserError, match=re.escape(f"a layer is given {shape}, which cannot be cut to its text")):
        beside.through(layer, x_BTD, bias=torch.zeros(shape), **given)


def test_whole_layers_alone_are_weighed():
    with pytest.raises(ValueError, match="inverse_density weighs whole layers: expected tokens 'all', found 'visual'"):
        SkipperConfig(alpha=0.2, tokens="visual", inverse_density=True)
