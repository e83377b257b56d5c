"""Batches: padding, any number of images a sample (R14), and features from a cache in place of pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    Qwen2VLImageProcessorPil,
)

from sparsight.data.cache import build_cache, image_rows
from sparsight.data.collate import Collator, TrainingSet
from sparsight.data.sources import ConversationSource
from sparsight.settings.data import ConversationData
from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from tiny import make_image

IMAGES = ([], ["0.png"], ["1.png", "2.png"], ["0.png", "1.png", "2.png"])
ANSWERS = ("12 apples.", "A small dog stands there.", "47", "A house, two trees and a boat.")


@pytest.fixture
def source(tmp_path: Path) -> ConversationSource:
    for number in range(3):
        make_image(number).save(tmp_path / f"{number}.png")
    rows = [
        {
            "id": f"s{number}",
            "images": names,
            "messages": [
                {"role": "user", "content": "<image>" * len(names) + "How many apples?"},
                {"role": "assistant", "content": answer},
            ],
        }
        for number, (names, answer) in enumerate(zip(IMAGES, ANSWERS, strict=True))
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return ConversationSource(ConversationData(path=str(tmp_path / "data.json")))


def cached(tmp_path: Path, model: Any, processor: Any, source: ConversationSource) -> Any:
    def encode(part: Any) -> Any:
        images = [source.image(key) for key in part]
        return model.model.encode_images(**processor.pixels(images))

    return build_cache(tmp_path / "cache", image_rows(source.fingerprints())[0], encode)


def test_rows_are_padded_at_the_right_and_padding_is_not_learnt(tiny_vlm, source: ConversationSource) -> None:
    model, processor = tiny_vlm()
    data = TrainingSet(source, processor, 4)
    items = [data[index] for index in range(4)]
    pad = processor.tokenizer.pad_token_id
    batch = Collator(pad)(items)
    lengths = [len(item["input_ids"]) for item in items]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (4, max(lengths))
    assert len(set(lengths)) > 1
    for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
        assert batch["input_ids"][row].tolist() == item["input_ids"] + [pad] * (max(lengths) - length)
        assert batch["labels"][row].tolist() == item["labels"] + [-100] * (max(lengths) - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (max(lengths) - length)


def test_none_to_three_images_in_one_batch(tiny_vlm, source: ConversationSource) -> None:
    """The batch's loss is the mean over all labels, as each sample has it alone: no image goes astray."""
    model, processor = tiny_vlm()
    data, collate = TrainingSet(source, processor, 4), Collator(processor.tokenizer.pad_token_id)
    items = [data[index] for index in range(4)]
    batch = collate(items)
    assert len(batch["pixel_values"]) == 3 and batch["image_index"].tolist() == [0, 1, 2, 0, 1, 2]
    image = processor.image_token_id
    assert [(row == image).sum().item() for row in batch["input_ids"]] == [0, 8, 16, 24]
    alone = [model(**collate([item]), loss_only=True).loss for item in items]
    labels = torch.tensor([sum(label != -100 for label in item["labels"]) for item in items])
    with torch.no_grad():
        together = model(**batch, loss_only=True).loss
    mean = (torch.stack(alone).detach() * labels).sum() / labels.sum()
    assert abs(together - mean) < 1e-5  # measured: 0 to 5e-7
    turned = collate(items[::-1])
    with torch.no_grad():
        assert abs(model(**turned, loss_only=True).loss - together) < 1e-5


@pytest.mark.parametrize("how", ["pixels", "native resolution", "cached features", "packing", "compressor"])
def test_an_image_is_encoded_once_however_many_ask_about_it(
    tiny_vlm, source: ConversationSource, tmp_path: Path, how: str
) -> None:
    """Loss and gradients are those of encoding it for each; encoder and bridge see it once, and so count it."""
    options: dict[str, Any] = {"vision_levels": [1]}
    if how == "native resolution":
        own = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2)
        options |= {"vision": CONFIGS["qwen2_5_vl"]().vision_config, "image_processor": own, "image_size": 64}
        make_image(1, 80).crop((0, 0, 80, 40)).save(tmp_path / "1.png")
    model, processor = tiny_vlm(**options)
    cache = cached(tmp_path, model, processor, source) if how == "cached features" else None
    collate, seen, found = Collator(processor.tokenizer.pad_token_id, how == "packing"), list[int](), []
    items = [TrainingSet(source, processor, 4, cache)[index] for index in (3, 1, 2, 0)]  # 0 1 2, 0, 1 2, none
    model.train().model.multi_modal_projector.register_forward_hook(lambda _, __, out: seen.append(len(out)))
    for each in (items, [item | {"images": ()} for item in items]):
        batch = collate(each)
        info = batch.pop("info")
        model.zero_grad(set_to_none=True)
        handle = attach(model, CompressorConfig(keep=0.5)) if how == "compressor" else None
        loss = model(**batch, loss_only=True, use_cache=False).loss
        loss.backward()
        if handle is not None:
            handle.detach()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        given = batch["mm_encoder_outputs"]["image"].hidden_states[0] if cache else batch["pixel_values"]
        assert info["images"] == seen[-1]
        assert info["images"] == (len(batch["image_grid_thw"]) if how == "native resolution" else len(given))
    assert seen == [3, 6]
    (once, grads), (each_time, wanted) = found
    assert abs(once - each_time) < 1e-6 and grads.keys() == wanted.keys()
    error = {name: (grads[name] - grad).abs().max() / (1e-3 + grad.abs().max()) for name, grad in wanted.items()}
    assert max(error.values()) <= 1e-5  # measured 1e-6


@pytest.mark.parametrize("pack_length", [None, 200], ids=["rows of the longest", "one row"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(
    tiny_vlm, source: ConversationSource, attention: str, pack_length: int | None
) -> None:
    """No attention across samples, and no first token that the sample before it is taught to say."""
    model, processor = tiny_vlm()
    model.model.language_model.set_attn_implementation(attention)
    pad = processor.tokenizer.pad_token_id
    items = [TrainingSet(source, processor, 4)[index] for index in (2, 0, 3, 1)]
    found = []
    for collate in (Collator(pad), Collator(pad, True, pack_length)):
        batch = collate(items)
        batch.pop("info")
        model.zero_grad(set_to_none=True)
        loss = model(**batch, loss_only=True, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((batch["input_ids"], loss.item(), gradients))
    (padded, loss, wanted), (packed, packed_loss, gradients) = found
    assert packed.shape[0] == (3 if pack_length is None else 1) and packed.numel() < padded.numel()
    assert packed_loss == pytest.approx(loss, abs=2e-6)  # measured: 0 to 2e-7
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert wanted.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() < 1e-5 * largest, name


def test_text_alone_makes_a_batch_without_images(tiny_vlm, source: ConversationSource) -> None:
    model, processor = tiny_vlm()
    batch = Collator(0)([TrainingSet(source, processor, 4)[0]])
    assert batch.keys() == {"info", "input_ids", "labels", "attention_mask", "supervised_index"}
    assert torch.isfinite(model(**batch, loss_only=True).loss)


def test_batches_of_cached_features_can_be_pinned(
    tmp_path: Path, tiny_vlm, source: ConversationSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the DataLoader does where there is a GPU: torch takes mappings apart, and outputs of transformers refuse."""
    model, processor = tiny_vlm()
    cache = cached(tmp_path, model, processor, source)
    batch = Collator(processor.tokenizer.pad_token_id)(
        [TrainingSet(source, processor, 4, cache)[index] for index in range(4)]
    )
    taken: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: taken.append(self.data_ptr()) or self.clone())
    pinned = pin_memory(batch)
    levels = batch["mm_encoder_outputs"]["image"].hidden_states
    assert {level.data_ptr() for level in levels} <= set(taken)
    with torch.no_grad():
        losses = [model(**{k: v for k, v in each.items() if k != "info"}).loss for each in (batch, pinned)]
    assert torch.equal(*losses)


def test_cached_features_give_the_loss_of_pixels(tmp_path: Path, tiny_vlm, source: ConversationSource) -> None:
    model, processor = tiny_vlm()
    collate = Collator(processor.tokenizer.pad_token_id)
    cache = cached(tmp_path, model, processor, source)
    drawn = collate([TrainingSet(source, processor, 4)[index] for index in range(4)])
    read = collate([TrainingSet(source, processor, 4, cache)[index] for index in range(4)])
    assert "pixel_values" not in read and torch.equal(read["input_ids"], drawn["input_ids"])
    with torch.no_grad():
        levels = model.model.encode_images(drawn["pixel_values"])
        losses = [model(**batch, loss_only=True).loss.item() for batch in (drawn, read)]
    for found, right in zip(read["mm_encoder_outputs"]["image"].hidden_states, levels, strict=True):
        assert torch.equal(found, right.to(torch.bfloat16))
    assert losses[0] != losses[1]  # features in bf16, all else in fp32
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # measured: 4e-6


def test_items_come_round_again_and_nothing_is_decoded_for_a_cache(
    tmp_path: Path, tiny_vlm, source: ConversationSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_vlm()
    cache = cached(tmp_path, model, processor, source)
    monkeypatch.setattr(ConversationSource, "image", lambda *_: pytest.fail("decoded"))
    data = TrainingSet(source, processor, 9, cache, offset=7)
    assert len(data) == 9
    assert [data[index]["id"] for index in range(9)] == ["s3", *["s0", "s1", "s2", "s3"] * 2]


def test_a_image_that_goes_bad_is_reported_with_the_sample(
    tmp_path: Path, tiny_vlm, source: ConversationSource
) -> None:
    data = TrainingSet(source, tiny_vlm()[1], 4)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"sample 's2'.*2\.png.*no such file"):
        data[2]
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"sample 's3'.*2\.png.*cannot be read"):
        data[3]
    assert data[1]["pixels"]["pixel_values"].shape == (1, 3, 64, 64)


def test_what_is_kept_of_a_row_is_what_was_read(
    tiny_vlm, source: ConversationSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, read = tiny_vlm()[1], []
    one = ConversationSource.__getitem__
    monkeypatch.setattr(ConversationSource, "__getitem__", lambda self, row: read.append(row) or one(self, row))
    data = TrainingSet(source, processor, 4)
    first, again = ([data.encode(row, text_alone=True) for row in range(4)] for _ in range(2))
    assert first == again and read == [0, 1, 2, 3]
    for item in again:
        assert [type(item[key]) for key in ("id", "input_ids", "labels")] == [str, list, list]
        assert {type(number) for number in item["input_ids"] + item["labels"]} == {int}
    monkeypatch.setattr("sparsight.data.collate.KEPT", 8 * len(first[0]["input_ids"]) + 1000)
    data = TrainingSet(source, processor, 4)  # with room for the first row alone
    assert [data.encode(row, text_alone=True) for row in (0, 1, 0, 1)] == first[:2] * 2
    assert read[4:] == [0, 1, 1]


def test_places_of_the_tokens_to_come() -> None:
    """Visual tokens (9) spread over the span of the last layout; text behind an image stands behind the whole span."""
    items = [
        {"id": "a", "input_ids": [1, 9, 9, 2, 9, 9, 3], "labels": [-100] * 6 + [3]},
        {"id": "b", "input_ids": [1, 2], "labels": [-100, 2]},
    ]
    batch = Collator(0, image_token_id=9, positions=([1, 7], 10))(items)
    assert batch["position_ids"].tolist() == [[0, 2, 8, 11, 13, 19, 22], [0, 1, 0, 1, 2, 3, 4]]
    assert batch["attention_mask"].sum(1).tolist() == [7, 2]
    assert "position_ids" not in Collator(0, image_token_id=9)(items)


def test_places_of_its_own_layout_change_nothing(tiny_vlm, source: ConversationSource) -> None:
    model, processor = tiny_vlm()
    tokens = processor.num_image_tokens
    data = TrainingSet(source, processor, 4)
    items = [data[number] for number in range(4)]
    losses = []
    for places in (None, (list(range(tokens)), tokens)):
        collate = Collator(processor.tokenizer.pad_token_id, False, None, processor.image_token_id, places)
        batch = {key: value for key, value in collate(items).items() if key != "info"}
        losses.append(model(**batch, loss_only=True, use_cache=False).loss)
    assert torch.equal(*losses)


def test_weights_of_one_change_nothing(tiny_vlm, source: ConversationSource) -> None:
    model, processor = tiny_vlm()
    data, tokens = TrainingSet(source, processor, 4), processor.num_image_tokens
    losses = []
    for weights in (None, [1.0] * tokens):
        collate = Collator(processor.tokenizer.pad_token_id, False, None, processor.image_token_id, None, weights)
        batch = collate([data[number] for number in range(4)])
        del batch["info"]
        losses.append(model(**batch, loss_only=True, use_cache=False).loss)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_a_weight_is_that_many_copies_of_a_token() -> None:
    """Of a first layer, behind which tokens know nothing yet of their copies: text gets the same from 2 tokens of
    weights 3 and 1 as from 4, three of them alike and at one place."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=16
    )
    model = LlamaForCausalLM(config).eval()
    embeds = model.get_input_embeddings()(torch.tensor([[1, 5, 6, 2, 3]]))
    items = [{"id": "a", "input_ids": [1, 9, 9, 2, 3], "labels": [-100] * 4 + [3]}]
    batch = Collator(0, image_token_id=9, positions=([0, 3], 4), weights=[3.0, 1.0])(items)
    assert batch["attention_mask"].shape == (1, 1, 5, 5)
    places = batch["position_ids"]
    few = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=places).logits[:, 3:]
    rows = [0, 1, 1, 1, 2, 3, 4]
    many = model(inputs_embeds=embeds[:, rows], position_ids=places[:, rows]).logits[:, 5:]
    torch.testing.assert_close(few, many)
    unweighted = model(inputs_embeds=embeds, position_ids=places).logits[:, 3:]
    assert (few - unweighted).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_packed_samples_longer_than_the_window_are_as_padded_ones(family: str) -> None:
    """Sliding windows, in all layers or in some, hold within a sample by itself, too."""
    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, attn_implementation="sdpa", pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    kinds = {"mistral": (MistralConfig, MistralModel), "gemma3": (Gemma3TextConfig, Gemma3TextModel)}
    config, made = kinds[family]
    model = made(config(**sizes)).eval()
    lengths = (20, 5, 13)
    ids = torch.randint(1, 64, (1, sum(lengths)))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state[0]
        alone = [model(input_ids=part, use_cache=False).last_hidden_state[0] for part in ids.split(lengths, 1)]
    assert (packed - torch.cat(alone)).abs().max() < 1e-5
