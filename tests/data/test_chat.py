"""From conversations to labels: what is learnt is exactly what the assistant says, for every template (R10, R12)."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from sparsight import assets
from sparsight.data.chat import encode_conversation, render
from sparsight.modeling import SparsightProcessor
from sparsight.modeling.build import CHATML, FLATTEN, multimodal_template
from tiny import picture

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|user|>' + message['role'] + '<|system|>\\n\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|user|>assistant<|system|>\\n\\n' }}
{%- endif %}"""

VICUNA = """{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""

# The same, but its prompt ends with a space, which a tokenizer joins to the answer's first word.
VICUNA_SPACE = VICUNA.replace("'ASSISTANT:'", "'ASSISTANT: '")

MISTRAL = """{{- bos_token }}{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' ' + message['content'] + eos_token }}
{%- else -%}{{ '[INST] ' + message['content'] + ' [/INST]' }}{%- endif -%}
{%- endfor -%}"""

# Drops the reasoning of earlier turns, as Qwen3 and others do.
FORGETS = """{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{{- message['content'] if loop.last else message['content'].split('</think>')[-1] -}}{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

STOPS = {"scratch": "<|end|>", "llama-3": "<|end|>", "vicuna": "</s>", "vicuna-space": "</s>", "mistral": "</s>"}
STOPS |= {"chatml": "<|im_end|>"}
needs_smollm2 = pytest.mark.skipif(assets.smollm2_folder() is None, reason="`make assets` fetches SmolLM2")


def user(*parts: str | None) -> dict[str, Any]:
    """A question; None stands for a picture."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
CONVERSATIONS = {
    "one turn": [user(None, "How many apples?"), says("There are 12.")],
    "three turns": [
        user(None, "A?"),
        says("12 apples."),
        user("And?"),
        says("A dog  stands there."),
        user("?"),
        says("47"),
    ],
    "with a system turn": [SYSTEM, user(None, "How many?"), says("12")],
    "no picture": [user("How many apples?"), says("There are 12.")],
    "pictures in two turns": [user(None, "A?", None), says("12 apples."), user("And", None, "?"), says("A dog.")],
    "answer that is in the question": [user(None, "Say: a dog. a dog."), says("a dog.")],
    "several lines and signs": [
        user(None, "?"),
        says("1. A dog\n2. <b>A</b> café 猫\n\n  end"),
        user("?"),
        says('"no"'),
    ],
}


@pytest.fixture(scope="session")
def tokenizers(tiny_language) -> dict[str, Any]:
    """A tokenizer for each template. All but ChatML's are the tiny one, with eos </s> where the template needs it."""
    found = {}
    for name, template in {
        "scratch": None,
        "llama-3": LLAMA3,
        "vicuna": VICUNA,
        "vicuna-space": VICUNA_SPACE,
        "mistral": MISTRAL,
        "forgets": FORGETS,
    }.items():
        _, tokenizer = tiny_language()
        if STOPS.get(name) == "</s>":
            tokenizer.add_special_tokens({"eos_token": "</s>", "bos_token": "<s>"})
        if name == "llama-3":
            tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
        if template is not None:
            tokenizer.chat_template = multimodal_template(template)
        found[name] = tokenizer
    if folder := assets.smollm2_folder():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = multimodal_template(tokenizer.chat_template)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
        found["chatml"] = tokenizer
    return found


TEMPLATES = ["scratch", pytest.param("chatml", marks=needs_smollm2), "llama-3", "vicuna", "vicuna-space", "mistral"]


def learnt(labels: list[int], tokenizer: Any) -> list[str]:
    """The text of each unbroken run of labels."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_labels_are_what_the_assistant_says_and_its_stop_token(
    tokenizers: dict[str, Any], template: str, case: str, tokens: int
) -> None:
    tokenizer, messages = tokenizers[template], CONVERSATIONS[case]
    if template == "mistral" and messages[0]["role"] == "system":
        pytest.skip("this template knows no system turn")
    encoded = encode_conversation(tokenizer, messages, "<image>", tokens)
    expected = [m["content"][0]["text"] + STOPS[template] for m in messages if m["role"] == "assistant"]
    # Where an answer begins with a space, the space is part of its first token.
    assert [text.removeprefix(" ") for text in learnt(encoded.labels, tokenizer)] == expected
    assert all(label in (-100, id) for label, id in zip(encoded.labels, encoded.input_ids, strict=True))
    image = tokenizer.convert_tokens_to_ids("<image>")
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    assert encoded.input_ids.count(image) == pictures * tokens
    assert image not in encoded.labels


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_the_processor(tokenizers: dict[str, Any], tiny_vlm, template: str, case: str) -> None:
    """What is trained on is what `apply_chat_template` gives at inference."""
    tokenizer, messages = tokenizers[template], CONVERSATIONS[case]
    image_processor = tiny_vlm()[1].image_processor
    processor = SparsightProcessor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=5
    )
    shown = [
        {
            **message,
            "content": [
                part | {"image": picture()} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in messages
    ]
    inputs = processor.apply_chat_template(shown, tokenize=True, return_dict=True)
    assert encode_conversation(tokenizer, messages, "<image>", 5).input_ids == inputs["input_ids"][0]


@needs_smollm2
def test_smollm2s_own_template_is_kept_but_for_its_marks(tokenizers: dict[str, Any]) -> None:
    """The marks, and pictures, are ours: the text is what the model was trained on."""
    own = AutoTokenizer.from_pretrained(assets.smollm2_folder())
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "3"},
    ]
    assert tokenizers["chatml"].chat_template == FLATTEN + CHATML
    assert render(tokenizers["chatml"], plain)[0] == own.apply_chat_template(plain, tokenize=False)


def test_the_space_before_an_answer_does_not_lose_its_first_word(tokenizers: dict[str, Any]) -> None:
    """'ASSISTANT: ' + '12': the prompt's last space and the answer may share a token."""
    tokenizer = tokenizers["vicuna-space"]
    encoded = encode_conversation(tokenizer, [user("Is there a dog?"), says("dog")])
    assert "dog" in learnt(encoded.labels, tokenizer)[0]


@pytest.mark.parametrize("template", ["scratch", "llama-3", "vicuna"])
def test_nothing_to_learn_is_an_error(tokenizers: dict[str, Any], template: str) -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_conversation(tokenizers[template], [user(None, "How many?")])


def test_a_template_that_rewrites_earlier_turns_is_an_error(tokenizers: dict[str, Any]) -> None:
    thinks = [user("A?"), says("<think>hm</think>12"), user("B?"), says("13")]
    with pytest.raises(ValueError, match="generation %}"):
        encode_conversation(tokenizers["forgets"], thinks)
    assert encode_conversation(tokenizers["forgets"], thinks[2:]).labels  # one turn: nothing to rewrite
