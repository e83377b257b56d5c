import json

import pytest
import torch
from transformers import AutoProcessor

from sparsight.compat import FOUND
from sparsight.data.chat import render
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import Sample
from sparsight.modeling import SparsightProcessor
from tiny import ListSource, conversation, make_image, make_vlm


@pytest.fixture(scope="module")
def processor():
    return make_vlm()[1]


def with_images(messages, images):
    """Messages with the images themselves in their image parts."""
    images = iter(images)
    for message in messages:
        if not isinstance(message["content"], str):
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = next(images)
    return messages


def test_placeholders_are_expanded(processor):
    text = "<image> one <image><image> three"
    batch = processor(text=text, images=[make_image(i) for i in range(3)], return_tensors="pt")
    ids = batch["input_ids"][0]
    placeholders = ids == processor.image_token_id
    assert placeholders.sum() == 3 * processor.num_image_tokens == 24
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    kept = processor.tokenizer.decode(ids[~placeholders])
    assert kept == " one  three"
    assert placeholders[:8].all() and placeholders[-8 - 3 :].any()


def test_batches_are_padded(processor):
    texts = ["<image> a", "no image at all", "<image><image> two"]
    images = [[make_image(0)], [], [make_image(1), make_image(2)]]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    counts = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [8, 0, 16]
    assert batch["pixel_values"].shape[0] == 3
    lengths = [len(processor(text=t, images=i or None)["input_ids"][0]) for t, i in zip(texts, images, strict=True)]
    assert batch["attention_mask"].sum(1).tolist() == lengths


def test_text_alone(processor):
    batch = processor(text="no image", return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "no image"


def test_counts_for_serving(processor):
    """What vLLM and others ask for without an image at hand."""
    counts = processor._get_num_multimodal_tokens(image_sizes=[(80, 80), (10, 300)])
    assert (counts["num_image_tokens"], counts["num_image_patches"]) == ([8, 8], [1, 1])
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


def test_token_types(processor):
    batch = processor(text="<image> one", images=make_image(), return_mm_token_type_ids=True, return_tensors="pt")
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_token_id)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_mask_covers_the_answer_and_its_stop_token(processor, images):
    if images and FOUND < (5, 18):
        pytest.skip("before 5.18, transformers' own mask is empty where there are images")
    talk = conversation("How many apples?", "There are 12.", images)
    talk += [{"role": "user", "content": "And dogs?"}, {"role": "assistant", "content": "A small dog."}]
    batch = processor.apply_chat_template(
        with_images(talk, [make_image(i) for i in range(images)]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    said = processor.tokenizer.decode(ids[mask == 1])
    assert said == "There are 12.<|end|>A small dog.<|end|>"
    unsaid = processor.tokenizer.decode(ids[mask == 0])
    marks = "".join("<image>" * 8 + "\n" for _ in range(images))
    assert unsaid == f"<|user|>{marks}How many apples?<|assistant|><|user|>And dogs?<|assistant|>"
    assert ("pixel_values" in batch) == (images > 0)
    assert mask.numel() == ids.numel()


def test_the_prompt_is_the_start_of_the_conversation(processor):
    """What is generated from is what was learnt from."""
    whole, prompt = (
        processor.apply_chat_template(
            with_images(conversation("How many?", answer), [make_image()]),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=answer is None,
        )["input_ids"][0]
        for answer in ("12.", None)
    )
    assert whole[: len(prompt)] == prompt
    assert processor.tokenizer.decode(whole[len(prompt) :]) == "12.<|end|>"


def test_the_number_of_tokens_is_saved(processor, tmp_path):
    processor.num_image_tokens = 8
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert (saved["num_image_tokens"], saved["processor_class"]) == (8, "SparsightProcessor")
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, SparsightProcessor)
    assert (loaded.num_image_tokens, loaded.image_token_id) == (8, processor.image_token_id)
    assert loaded.chat_template == processor.chat_template
    one, other = (p(text="<image> a", images=make_image(), return_tensors="pt") for p in (processor, loaded))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.skipif(FOUND < (5, 21), reason="before 5.21, transformers does not compare them; the model refuses them")
def test_images_and_placeholders_that_differ(processor):
    with pytest.raises(ValueError, match="total 0 <image> tokens and 1 images"):
        processor(text="no placeholder", images=[make_image()])
    with pytest.raises(ValueError, match="total 2 <image> tokens and 1 images"):
        processor(text="<image><image>", images=[make_image()])


def test_a_image_takes_one_token_at_least(processor):
    with pytest.raises(ValueError, match="num_image_tokens: expected 1 or more, found 0"):
        SparsightProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=0)


SHOUT = "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}LOUD{% endfor %}"


@pytest.mark.parametrize("owner", ["processor", "tokenizer"])
def test_F42_one_template_whichever_it_is_set_on(owner, tmp_path):
    _, processor = make_vlm()
    (processor if owner == "processor" else processor.tokenizer).chat_template = SHOUT
    assert processor.chat_template == processor.tokenizer.chat_template == SHOUT
    asked = processor.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked == render(processor.tokenizer, [{"role": "user", "content": "hi"}])[0] == "<|user|>LOUD"
    processor.save_pretrained(tmp_path)
    loaded = SparsightProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == loaded.tokenizer.chat_template == SHOUT


def test_F42_a_template_given_to_the_processor_alone_is_the_tokenizers():
    _, processor = make_vlm()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = None
    made = SparsightProcessor(processor.image_processor, tokenizer, chat_template=SHOUT)
    assert made.tokenizer.chat_template == SHOUT
    tokenizer.chat_template = SHOUT
    assert SparsightProcessor(processor.image_processor, tokenizer).chat_template == SHOUT


def test_F42_of_two_templates_the_one_given_is_the_tokenizers_too(tmp_path):
    _, processor = make_vlm()
    processor.tokenizer.chat_template = "mine {{ messages }}"
    processor.save_pretrained(tmp_path)
    loaded = SparsightProcessor.from_pretrained(tmp_path, chat_template=SHOUT)
    made = SparsightProcessor(processor.image_processor, processor.tokenizer, chat_template=SHOUT)
    for each in (loaded, made):
        assert each.chat_template == each.tokenizer.chat_template == SHOUT


def test_F42_training_encodes_by_the_template_set_on_the_processor():
    _, processor = make_vlm()
    processor.chat_template = processor.chat_template.replace(
        "{%- generation -%}", "{{- 'Well: ' -}}{%- generation -%}"
    )
    sample = Sample("0", conversation(), (0,))
    found = TrainingSet(ListSource(sample), processor, 1)[0]
    assert "<|assistant|>Well: 12 apples." in processor.tokenizer.decode(found["input_ids"])


def test_videos_are_refused_and_not_left_out(tiny_vlm) -> None:
    _, processor = tiny_vlm()
    turns = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]}]
    for each in (turns, [turns]):
        with pytest.raises(ValueError, match="takes a video as its frames: give them as images"):
            processor.apply_chat_template(each, tokenize=False)
    with pytest.raises(ValueError, match="takes a video as its frames"):
        processor(text="What?", videos=[[]])
