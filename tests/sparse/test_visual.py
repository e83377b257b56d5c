"""Visual tokens in batches of every shape: without an image, with labels, on several devices."""

import inspect
import warnings

import pytest
import torch
from families import IMAGE, batch_of, made, masked_reference
from test_attach import gradients, sizes_seen
from test_families import made as family_made
from test_families import script

from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.gather import Kept

LLAVA = "llava, clip + llama"


def as_the_processor_gives(batch, images):
    """SmolVLM's and Idefics3's pixels: (samples, most images of one, ...), images of zeros where there are fewer."""
    pixels = batch["pixel_values"]
    rows = torch.zeros(len(images), max(images), *pixels.shape[2:])
    at = iter(pixels[:, 0])
    for row, number in enumerate(images):
        for image in range(number):
            rows[row, image] = next(at)
    return batch | {"pixel_values": rows}


@pytest.mark.parametrize("method", ["uniform", "similarity"])
@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_F33_a_sample_without_an_image(name, method, monkeypatch):
    model = made(name).eval()
    images = (1, 0, 2)
    batch = as_the_processor_gives(batch_of(name, model, images), images)
    short, full, keep = masked_reference(model, batch, method, monkeypatch)
    assert (short - full)[keep].abs().max() <= 1e-5 * full[keep].abs().max()
    attach(model.train(), CompressorConfig(keep=0.5, method=method))
    seen = sizes_seen(monkeypatch)
    assert gradients(model, batch)[0].isfinite()
    assert seen == [{"image": [4, 4, 4]}]  # images, not samples


def test_F36_padding_goes_where_each_kind_of_layer_has_a_mask_of_its_own():
    model = family_made("gemma3")
    batch = {key: value for key, value in script.batch_of(model).items() if key != "labels"}
    longest = batch["input_ids"].shape[1]
    image = model.config.image_token_id
    text = batch["input_ids"][1] != image
    words = int((text & batch["attention_mask"][1].bool()).sum())
    for value in batch.values():  # the second sample loses its image
        if value.shape == (2, longest):
            value[1] = torch.cat([value[1][text], value.new_zeros(longest - int(text.sum()))])
    batch["attention_mask"][1] = (torch.arange(longest) < words).long()
    batch["pixel_values"] = batch["pixel_values"][:1]
    handle = attach(model, CompressorConfig(keep=0.5))
    model(**batch)
    (done,) = handle.take_passes()
    own = int(batch["attention_mask"][0].sum())
    assert done.length == own - (done.visual_in - done.visual_out) < longest
    # By position, the model's mask says the same.
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    pixels = batch.pop("pixel_values")
    model(ids, pixels, mask, **batch)
    assert handle.take_passes() == [done]


def decoded(model, batch, cached):
    """Logits of two more tokens, fed one at a time with a cache, or with all that came before."""
    batch = dict(batch)
    found, past = model(**batch, use_cache=cached), None
    for token in (7, 9):
        past = found.past_key_values
        rows = len(batch["input_ids"])
        more = torch.full((rows, 1), token)
        batch["input_ids"] = torch.cat([batch["input_ids"], more], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if cached:
            last = {"input_ids": more, "position_ids": batch["position_ids"][:, -1:]}
            found = model(**last, attention_mask=batch["attention_mask"], past_key_values=past)
        else:
            found = model(**batch, use_cache=False)
    return found.logits[:, -1]


@pytest.mark.parametrize("images, padded", [((1, 1), False), ((1, 2), True), ((1, 2), False)])
@torch.no_grad()
def test_F37_a_cache_gives_what_the_whole_gives_or_is_refused(images, padded):
    model = made(LLAVA).eval()
    batch = batch_of(LLAVA, model, images)
    batch.pop("labels")
    if padded:  # on the left
        for key in ("input_ids", "attention_mask"):
            batch[key] = torch.stack(
                [
                    row.roll(int((mask == 0).sum()))
                    for row, mask in zip(batch[key], batch["attention_mask"], strict=True)
                ]
            )
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    attach(model, CompressorConfig(keep=0.25), train_only=False)
    whole = decoded(model, batch, cached=False)
    if images == (1, 1):
        assert (decoded(model, batch, cached=True) - whole).abs().max() <= 1e-5 * whole.abs().max()
    else:
        with pytest.raises(ValueError, match="rows of one length without padding"):
            decoded(model, batch, cached=True)


@pytest.mark.parametrize("family", [LLAVA, "qwen2_5_vl"])
@torch.no_grad()
def test_F37_generate_with_a_cache_is_as_without(family):
    """The tokens of `generate` count on behind the cache as they do in the whole sequence."""
    model = made(family).eval()
    batch = batch_of(family, model, (1, 1))
    batch.pop("labels")
    handle = attach(model, CompressorConfig(keep=0.25), train_only=False)

    def generated(use_cache):
        told = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        return torch.stack(
            model.generate(**batch, max_new_tokens=4, use_cache=use_cache, suppress_tokens=[IMAGE], **told).logits
        )

    assert (generated(True) - generated(False)).abs().max() < 1e-4
    handle.detach()
    attach(model, CompressorConfig(keep=0.25, positions="renumbered"), train_only=False)
    generated(False)
    with pytest.raises(ValueError, match='use positions="original"; or use_cache=False'):
        generated(True)


@pytest.mark.parametrize("family", [LLAVA, "qwen2_5_vl"])
@torch.no_grad()
def test_F37_positions_behind_a_cache_must_be_given(family):
    model = made(family).eval()
    batch = batch_of(family, model, (1, 1))
    batch.pop("labels")
    attach(model, CompressorConfig(keep=0.25), train_only=False)
    first = model(**batch, use_cache=True)
    with pytest.raises(ValueError, match="pass position_ids, as generate"):
        model(input_ids=torch.full((2, 1), 7), past_key_values=first.past_key_values)


def test_F41_indices_follow_the_tensor_they_are_used_on():
    """On the meta device, as on a second card, an index of another device is an error."""
    kept = Kept.of(torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.bool))
    there = torch.empty(2, 4, 8, device="meta")
    few = kept.gather(there, 1)
    assert few.device.type == "meta" and few.shape == (2, 3, 8)
    back = kept.scatter(few)
    assert back.device.type == "meta" and back.shape == (2, 4, 8)


def test_F41_a_model_split_over_devices():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = made(LLAVA)
    head = model.lm_head.to("meta")
    add_hook_to_module(head, AlignDevicesHook(execution_device="meta"))
    batch = batch_of(LLAVA, model, (1, 2))
    batch.pop("labels")
    handle = attach(model, CompressorConfig(keep=0.5))
    logits = model(**batch).logits
    assert logits.device.type == "meta" and logits.shape[:2] == batch["input_ids"].shape
    (done,) = handle.take_passes()
    assert done.length < done.length_in


def all_labelled(model, images=(1, 2)):
    """As TRL labels conversations: whatever is no padding."""
    batch = batch_of(LLAVA, model, images)
    right = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": right}, batch | {"labels": right.masked_fill(right == IMAGE, -100)}


@pytest.mark.parametrize("form", ["keyword", "position"])
@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_F02_visual_tokens_carry_no_labels_in_training(form, keep):
    model = made(LLAVA)
    batch, right = all_labelled(model)
    given = batch["labels"].clone()
    handle = attach(model, CompressorConfig(keep=keep))
    wanted = gradients(model, right)
    args, kwargs = ((), batch) if form == "keyword" else (positional(model, batch), {})
    with pytest.warns(UserWarning, match=r"48 of the \d+ labels .* prompt / completion"):
        loss = model(*args, **kwargs).loss
    assert torch.equal(loss, wanted[0])
    assert torch.equal(batch["labels"], given)  # the user's own are left alone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)  # once is enough
        probe = handle.dense_probe()
    handle.detach()
    model.eval()
    assert probe["loss_dense"] == float(model(**right).loss.detach())
    assert float(model(**batch).loss.detach()) != probe["loss_dense"]


def positional(model, batch):
    names = list(inspect.signature(model.forward).parameters)
    names = names[: 1 + max(names.index(key) for key in batch)]
    defaults = {"vision_feature_layer": None, "vision_feature_select_strategy": None}
    return [batch.get(name, defaults.get(name)) for name in names]


def test_F02_eval_passes_are_left_alone():
    model = made(LLAVA).eval()
    batch, _ = all_labelled(model)
    plain = model(**batch).loss
    attach(model, CompressorConfig(keep=0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(**batch).loss, plain)


def test_F02_the_loss_is_a_mean_over_the_labels_that_are_left():
    """The Trainer has counted visual labels before: its count goes down in proportion."""
    model = made(LLAVA)
    batch, right = all_labelled(model, (1, 1))
    count = {key: (labels["labels"] != -100).sum() for key, labels in (("all", batch), ("left", right))}
    attach(model, CompressorConfig(keep=0.25))
    wanted = model(**right, num_items_in_batch=count["left"]).loss
    with pytest.warns(UserWarning, match="labels of this batch stood on visual tokens"):
        found = model(**batch, num_items_in_batch=count["all"]).loss
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_F02_shifted_labels_too():
    model = made(LLAVA)
    batch, right = all_labelled(model)

    def shifted(labels):
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)

    attach(model, CompressorConfig(keep=0.25))
    wanted = model(**right, shift_labels=shifted(right["labels"])).loss
    with pytest.warns(UserWarning, match="stood on visual tokens"):
        found = model(**batch, shift_labels=shifted(batch["labels"])).loss
    assert torch.equal(found, wanted)
