"""The composed model: equalities that must hold, with the measured error beside each tolerance."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from sparsight.compat import FOUND
from sparsight.errors import UserError
from sparsight.modeling import SparsightForConditionalGeneration
from tiny import ask, make_image, make_vlm

SIDE = 64


@pytest.fixture(scope="module")
def model():
    return make_vlm()[0]


@pytest.fixture
def fresh():
    """A model that the test may change."""
    return make_vlm()[0]


def sample(model, images, text=9, seed=0):
    """Ids of one sample, placeholders spread over the text, and its pixels."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(6, 300, (text,), generator=generator).split(max(1, text // (images + 1)))
    image = torch.full((model.config.num_image_tokens,), model.config.image_token_id)
    parts = []
    for place in range(max(images, len(words))):
        parts += [words[place]] if place < len(words) else []
        parts += [image] if place < images else []
    return torch.cat(parts), torch.randn(images, 3, SIDE, SIDE, generator=generator)


def stacked(samples, left=False):
    longest = max(len(ids) for ids, _ in samples)

    def pad(values, fill):
        gap = (longest - len(values), 0) if left else (0, longest - len(values))
        return F.pad(values, gap, value=fill)

    batch = {
        "input_ids": torch.stack([pad(ids, 0) for ids, _ in samples]),
        "attention_mask": torch.stack([pad(torch.ones_like(ids), 0) for ids, _ in samples]),
    }
    pixels = torch.cat([pixels for _, pixels in samples])
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def learning(model, images=(2, 0, 1), texts=(9, 14, 5)):
    """A batch with labels on half of the text."""
    batch = stacked([sample(model, n, t, seed) for seed, (n, t) in enumerate(zip(images, texts, strict=True))])
    ids = batch["input_ids"]
    learnt = (ids != model.config.image_token_id) & (ids % 2 == 0) & (batch["attention_mask"] == 1)
    return batch | {"labels": ids.masked_fill(~learnt, -100)}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(one, other):
    """The largest difference of any gradient, relative to the largest of that tensor."""
    assert one.keys() == other.keys()
    return max(((a - other[name]).abs().max() / (a.abs().max() + 1e-12)).item() for name, a in one.items())


# --- batches ---


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=4))
def test_a_batch_equals_its_samples_one_by_one(model, counts):
    samples = [sample(model, images, text, seed) for seed, (images, text) in enumerate(counts)]
    with torch.no_grad():
        together = model(**stacked(samples)).logits
        for row, (ids, pixels) in enumerate(samples):
            alone = model(input_ids=ids[None], pixel_values=pixels if len(pixels) else None).logits[0]
            error = (together[row, : len(ids)] - alone).abs()
            assert error.max() <= 1e-4, error.max()  # measured 2e-7 at most
            assert (together[row, : len(ids)] - alone).mean().abs() <= 1e-6


def test_each_image_reaches_its_own_place(model):
    """Images are in reading order: changing the second changes nothing before its placeholders."""
    ids, pixels = sample(model, 2, 9)
    changed = pixels.clone()
    changed[1] += 1.0
    with torch.no_grad():
        before, after = (model(input_ids=ids[None], pixel_values=p).logits[0] for p in (pixels, changed))
    second = int((ids == model.config.image_token_id).nonzero()[model.config.num_image_tokens])
    assert torch.equal(before[:second], after[:second])
    assert (before[second:] - after[second:]).abs().amax(-1).min() > 0


def test_visual_tokens_stand_in_for_the_placeholders(model):
    ids, pixels = sample(model, 2, 9)
    with torch.no_grad():
        visual = model.get_image_features(pixels).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == model.config.image_token_id] = visual.flatten(0, 1)
        out = model(input_ids=ids[None], pixel_values=pixels)
        plain = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state
        assert torch.equal(out.logits, model.lm_head(plain))
        assert torch.equal(out.image_hidden_states, visual)
        assert visual.shape == (2, 8, 32)


def test_embeddings_can_be_given_instead_of_ids(model):
    ids, pixels = sample(model, 2, 9)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids[None])
        one = model(inputs_embeds=embeds, pixel_values=pixels).logits
        assert torch.equal(one, model(input_ids=ids[None], pixel_values=pixels).logits)


@pytest.mark.parametrize(
    "images, found", [(1, "1 images of 8 visual tokens = 8"), (3, "3 images of 8 visual tokens = 24")]
)
def test_images_and_placeholders_that_differ(model, images, found):
    batch = stacked([sample(model, 2), sample(model, 0)])
    batch["pixel_values"] = torch.zeros(images, 3, SIDE, SIDE)
    found = rf"the batch has {images} images of 8 visual tokens = {images * 8}, but its samples hold \[16, 0\] .* = 16"
    with pytest.raises(ValueError, match=found):
        model(**batch)


def test_a_truncated_text_is_an_error(model):
    ids, pixels = sample(model, 1, 2)
    with pytest.raises(ValueError, match=r"hold \[5\] image placeholders = 5. Was the processor scaled .*or a text tr"):
        model(input_ids=ids[None, :6], pixel_values=pixels)


def test_wrong_calls(model):
    ids, pixels = sample(model, 1)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=pixels)
    with pytest.raises(ValueError, match="pixel_values or mm_encoder_outputs, not both"):
        model(input_ids=ids[None], pixel_values=pixels, mm_encoder_outputs={})
    with pytest.raises(ValueError, match="loss_only needs labels"):
        model(input_ids=ids[None], pixel_values=pixels, loss_only=True)
    wide = BaseModelOutputWithPooling(pooler_output=torch.zeros(1, 8, 64))
    with pytest.raises(ValueError, match="visual tokens are 64 wide, the language model 32"):
        model(input_ids=ids[None], mm_encoder_outputs={"image": wide})


def test_encoded_images_equal_pixels(model):
    batch = learning(model)
    pixels = batch.pop("pixel_values")
    with torch.no_grad():
        wanted = model(**batch, pixel_values=pixels)
        features = model.get_image_features(pixels)
        for given_ in (
            BaseModelOutputWithPooling(pooler_output=features.pooler_output),
            BaseModelOutputWithPooling(hidden_states=model.model.encode_images(pixels)),
        ):
            found = model(**batch, mm_encoder_outputs={"image": given_})
            assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)


# --- generation ---


@pytest.fixture(scope="module")
def talkative():
    """A model that does not stop early, and says different things."""
    model, _ = make_vlm()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def generated(model, batch, **options):
    return model.generate(**batch, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_generation_with_and_without_cache(talkative, images):
    batch = stacked([sample(talkative, images, 7)])
    cached = generated(talkative, batch, use_cache=True)
    assert torch.equal(cached, generated(talkative, batch, use_cache=False))
    length = batch["input_ids"].shape[1]
    assert cached.shape[1] == length + 10 and cached[0, length:].unique().numel() > 3


def test_generation_is_greedy_on_the_logits(talkative):
    ids, pixels = sample(talkative, 1, 7)
    for _ in range(10):
        with torch.no_grad():
            best = talkative(input_ids=ids[None], pixel_values=pixels).logits[0, -1].argmax()
        ids = torch.cat([ids, best[None]])
    assert torch.equal(generated(talkative, stacked([sample(talkative, 1, 7)]))[0], ids)


def test_left_padded_generation_equals_single(talkative):
    samples = [sample(talkative, images, text, seed) for seed, (images, text) in enumerate([(1, 3), (2, 9), (0, 5)])]
    batch = stacked(samples, left=True)
    together = generated(talkative, batch)[:, batch["input_ids"].shape[1] :]
    for row, one in enumerate(samples):
        alone = generated(talkative, stacked([one]))[0, len(one[0]) :]
        assert torch.equal(together[row], alone)


# --- losses ---


def test_the_loss_is_cross_entropy_of_the_next_token(model):
    batch = learning(model)
    with torch.no_grad():
        out = model(**batch)
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        for place in range(1, len(labels)):
            if labels[place] != -100:
                scores = out.logits[row, place - 1].double()
                total += (torch.logsumexp(scores, 0) - scores[labels[place]]).item()
                count += 1
    assert count > 5
    assert abs(out.loss.item() - total / count) <= 1e-5  # measured 3e-7


@pytest.mark.parametrize("items", [None, 50])
def test_loss_only_equals_the_loss(fresh, items):
    batch = learning(fresh) | ({} if items is None else {"num_items_in_batch": torch.tensor(items)})
    whole = fresh(**batch)
    whole.loss.backward()
    wanted = gradients(fresh)
    fresh.zero_grad()
    sparse = fresh(**batch, loss_only=True)
    sparse.loss.backward()
    assert sparse.logits is None
    assert abs(sparse.loss.item() - whole.loss.item()) <= 1e-5  # measured 0
    error = worst(wanted, gradients(fresh))
    assert error <= 1e-4, error  # measured 4e-7 at most


@pytest.mark.parametrize("loss_only", [False, True])
def test_two_halves_sum_to_the_whole(fresh, loss_only):
    """Gradient accumulation: each part is divided by the labels of all."""
    one, other = learning(fresh, (2, 0), (9, 14)), learning(fresh, (1, 1), (5, 30))
    counts = [int((half["labels"][:, 1:] != -100).sum()) for half in (one, other)]
    assert counts[0] != counts[1]
    losses = []
    for half in (one, other):
        loss = fresh(**half, num_items_in_batch=torch.tensor(sum(counts)), loss_only=loss_only).loss
        loss.backward()
        losses.append(loss.item())
    accumulated = gradients(fresh)
    fresh.zero_grad(set_to_none=True)
    separate = [fresh(**half).loss for half in (one, other)]
    whole = (separate[0] * counts[0] + separate[1] * counts[1]) / sum(counts)
    whole.backward()
    assert abs(sum(losses) - whole.item()) <= 1e-5  # measured 0
    error = worst(accumulated, gradients(fresh))
    assert error <= 1e-4, error  # measured 4e-7 at most


# --- training ---


def test_gradient_checkpointing_changes_nothing(fresh):
    batch = learning(fresh)
    fresh.train()
    for frozen in (False, True):
        fresh.model.language_model.requires_grad_(not frozen)
        fresh.zero_grad(set_to_none=True)
        fresh.gradient_checkpointing_disable()
        fresh(**batch).loss.backward()
        wanted = gradients(fresh)
        fresh.zero_grad(set_to_none=True)
        fresh.gradient_checkpointing_enable()
        assert fresh.is_gradient_checkpointing
        fresh(**batch).loss.backward()
        error = worst(wanted, gradients(fresh))
        assert any("projector" in name for name in wanted) and error <= 1e-5, error  # measured 0


def test_a_frozen_encoder_keeps_no_graph(fresh):
    fresh.model.vision_tower.requires_grad_(False)
    levels = fresh.model.encode_images(torch.randn(1, 3, SIDE, SIDE))
    assert not any(level.requires_grad for level in levels)
    assert fresh.model.bridge_features(levels).requires_grad
    fresh.model.vision_tower.requires_grad_(True)
    assert all(level.requires_grad for level in fresh.model.encode_images(torch.randn(1, 3, SIDE, SIDE)))


def test_lora_of_peft_trains_adapters_alone_and_merges_back(fresh):
    batch = learning(fresh)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with torch.no_grad():
        untouched = fresh(**batch).logits
    peft = get_peft_model(fresh, LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v|up)_proj"))
    assert torch.equal(peft(**batch).logits, untouched)  # B starts at zero
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert all("lora_" in name for name, p in peft.named_parameters() if p.requires_grad) and len(trained) == 12
    optimizer = torch.optim.SGD(trained, lr=1.0)
    first = None
    for _ in range(5):
        loss = peft(**batch).loss
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        adapted = peft.eval()(**batch)
        assert adapted.loss.item() < first - 0.01
        merged = peft.merge_and_unload()
        assert isinstance(merged, SparsightForConditionalGeneration)
        error = (merged(**batch).logits - adapted.logits).abs().max()
    assert error <= 1e-4, error  # measured 4e-7 at most
    after = merged.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {
        name for name in after if name.split(".")[-2] in ("q_proj", "v_proj", "up_proj") and "language" in name
    }


def test_gradients_reach_every_part(fresh):
    fresh(**learning(fresh)).loss.backward()
    grads = gradients(fresh)
    # The encoder's last block lies above the last feature level.
    unused = {n for n, _ in fresh.named_parameters()} - grads.keys()
    assert all("vision_tower" in n and ("layers.3." in n or "post_layernorm" in n) for n in unused)
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name and grad.abs().max() > 0 for name, grad in grads.items())


def test_embeddings_can_be_resized(fresh):
    ids, pixels = sample(fresh, 1)
    with torch.no_grad():
        before = fresh(input_ids=ids[None], pixel_values=pixels).logits
        size = before.shape[-1]
        fresh.resize_token_embeddings(size + 7, mean_resizing=False)
        after = fresh(input_ids=ids[None], pixel_values=pixels).logits
    assert after.shape[-1] == size + 7 and torch.equal(after[..., :size], before)
    loss = fresh(**learning(fresh)).loss
    assert loss.isfinite()


def test_the_bridge_starts_as_the_paper_says_when_initialised_by_transformers(fresh):
    again = SparsightForConditionalGeneration(fresh.config)
    queries = again.model.multi_modal_projector.scales["2"].queries
    assert queries.isfinite().all() and 0.01 < queries.std() < 0.03


def test_a_text_only_batch_trains_when_only_the_bridge_does(fresh):
    """R01's cause: without a path to the bridge there is no backward pass, and other ranks wait for its gradients."""
    model = fresh.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    ids = torch.tensor([[7, 8, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.model.multi_modal_projector.parameters()]
    assert gradients and all(g is not None and not g.any() for g in gradients)


def test_placeholders_without_any_image_are_an_error_in_training(fresh):
    ids = torch.tensor([[fresh.config.image_token_id, 8, 9]])
    with pytest.raises(ValueError, match=r"hold \[1\] image placeholders, but there are no images"):
        fresh.train()(input_ids=ids)


def test_F10_outputs_name_the_cache_as_transformers_does(model):
    """From 5.24 on that is `cache`; both names are taken, and go on from where the cache ends."""
    ids, pixels = sample(model, 1, 7)
    with torch.no_grad():
        whole = model(ids[None], pixel_values=pixels).logits[0, -1]
        start = model(ids[None, :-1], pixel_values=pixels, use_cache=True)
        theirs = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
        assert theirs == {field.name for field in dataclasses.fields(start)} - {"image_hidden_states"}
        (name,) = theirs & {"past_key_values", "cache"}
        for argument in ("past_key_values", "cache"):
            going_on = model(ids[None, -1:], **{argument: copy.deepcopy(start[name])})
            assert (going_on.logits[0, -1] - whole).abs().max() < 1e-4  # 4e-7 measured


@pytest.mark.skipif(FOUND >= (5, 18), reason="from 5.18 on, generate repeats visual tokens sample by sample")
def test_F11_several_sequences_of_a_sample_with_images_are_refused_before_5_18():
    """They would get each other's images."""
    model, processor = make_vlm()
    with pytest.raises(UserError, match="num_beams, num_return_sequences: 2 sequences .* need transformers>=5.18"):
        model.generate(**ask(processor, make_image(), "How many?"), num_beams=2, max_new_tokens=2)
