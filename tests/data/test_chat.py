"""Conversations as the processor and real tokenizers see them; labels for every template are in `test_r12_masks.py`."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from sparsight import assets
from sparsight.data.chat import encode_conversation, render, stop_tokens
from sparsight.modeling import SparsightProcessor
from sparsight.modeling.chat_templates import CHATML, FLATTEN, multimodal_template
from templates import FAMILIES, FOLDER, family_tokenizer
from tiny import make_image, make_language


def user(*parts: str | None) -> dict[str, Any]:
    """A question; None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
CONVERSATIONS = {
    "three turns": [user(None, "A?"), says("12 apples."), user("And?"), says("A dog  stands."), user("?"), says("47")],
    "with a system turn": [SYSTEM, user(None, "How many?"), says("12")],
    "no image": [user("How many apples?"), says("There are 12.")],
    "images in two turns": [user(None, "A?", None), says("12 apples."), user("And", None, "?"), says("A dog.")],
    "several lines and signs": [
        user(None, "?"),
        says("1. A dog\n2. <b>A</b> café 猫\n\n  end"),
        user("?"),
        says('"n"'),
    ],
}


def learnt(labels: list[int], tokenizer: Any) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", [*FAMILIES, "scratch"])
def test_ids_are_those_of_the_processor(tiny_vlm, name: str, case: str) -> None:
    """What is trained on is what `apply_chat_template` gives at inference."""
    messages = CONVERSATIONS[case]
    if messages[0] is SYSTEM and name in FAMILIES and not FAMILIES[name].system:
        pytest.skip("this template takes no system turn")
    tokenizer = make_language()[1] if name == "scratch" else family_tokenizer(name)
    processor = SparsightProcessor(
        tiny_vlm()[1].image_processor, tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=5
    )
    shown = [
        message | {"content": [part | {"image": make_image()} if part["type"] == "image" else part for part in parts]}
        for message, parts in ((message, message["content"]) for message in messages)
    ]
    inputs = processor.apply_chat_template(shown, tokenize=True, return_dict=True)
    assert encode_conversation(tokenizer, messages, "<image>", 5).input_ids == inputs["input_ids"][0]


@pytest.mark.skipif(assets.smollm2_folder() is None, reason="`make assets` fetches SmolLM2")
def test_the_real_smollm2() -> None:
    """The marks, and images, are ours: the text is what the model was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2_folder())
    own = tokenizer.chat_template
    assert own == (FOLDER / "smollm2.jinja").read_text(encoding="utf-8")
    plain = [{"role": message["role"], "content": role} for role in "ab" for message in (SYSTEM, user(), says(""))]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    messages = [SYSTEM, *CONVERSATIONS["several lines and signs"]]
    marked = FLATTEN + CHATML
    assert multimodal_template(own) == marked
    for template in (marked, FLATTEN + own):
        tokenizer.chat_template = template
        assert render(tokenizer, plain)[0] == text
        labels = encode_conversation(tokenizer, messages).labels
        assert learnt(labels, tokenizer) == '1. A dog\n2. <b>A</b> café 猫\n\n  end<|im_end|>"n"<|im_end|>'


def test_the_scratch_tokenizer_learns_answers_and_stop_tokens() -> None:
    tokenizer = make_language()[1]
    labels = encode_conversation(tokenizer, CONVERSATIONS["images in two turns"], "<image>", 5).labels
    assert learnt(labels, tokenizer) == "12 apples.<|end|>A dog.<|end|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_only_plain_chatml_is_replaced(name: str) -> None:
    """Phi-4's and Qwen3's share its tokens, but not its form."""
    replaced = family_tokenizer(name).chat_template == FLATTEN + CHATML
    assert replaced == (name in ("smollm2", "qwen2", "qwen2.5"))


@pytest.mark.parametrize("name", ["vicuna", "qwen2.5"])
def test_a_space_before_the_answer_does_not_lose_its_first_word(name: str) -> None:
    """'ASSISTANT: ' + 'dog': the prompt's last space and the answer may share a token."""
    tokenizer = family_tokenizer(name)
    own = tokenizer.chat_template
    vicuna = (FOLDER / "vicuna.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = FLATTEN + vicuna.replace("'ASSISTANT:'", "'ASSISTANT: '")
    labels = encode_conversation(tokenizer, [user("Is there a dog?"), says("dog")]).labels
    tokenizer.chat_template = own
    assert learnt(labels, tokenizer).strip() == "dog" + tokenizer.eos_token


def test_an_answer_ends_where_training_taught_it_to() -> None:
    """Base models come with a tokenizer whose end of text is not the end of a turn."""
    _, tokenizer = make_language()
    own = tokenizer.eos_token_id
    assert stop_tokens(tokenizer) == [own]
    tokenizer.eos_token = "<|system|>"
    assert stop_tokens(tokenizer) == sorted([own, tokenizer.eos_token_id])
    assert stop_tokens(tokenizer, 3) == stop_tokens(tokenizer, [3]) == sorted({own, tokenizer.eos_token_id, 3})
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert stop_tokens(tokenizer, None) == [tokenizer.eos_token_id]
