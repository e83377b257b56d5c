"""R10: labels come from the chat template, never from a search for the answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.data.chat import Encoded, encode_conversation
from sparsight.modeling.chat_templates import CHATML, FLATTEN
from templates import FAMILIES, FOLDER, family_tokenizer
from tiny import conversation

WORDS = st.sampled_from(["", "dog", " dog", "a dog ", "a dog a dog\n", "猫🙂", "<|im_end|>", "assistant\n"])


def encoded(template: str, messages: list[dict[str, Any]]) -> Encoded:
    """With the small tokenizer of SmolLM2's kind."""
    tokenizer = family_tokenizer("smollm2")
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        return encode_conversation(tokenizer, messages, "<image>", 4)
    finally:
        tokenizer.chat_template = own


@settings(max_examples=60)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), asked_last=st.booleans())
def test_marks_and_renderings_agree(turns: list[tuple[str, str]], asked_last: bool) -> None:
    """Two ways to the labels: {% generation %} marks, and what an answer adds to the template without marks."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "dog"}]
    messages += [message for question, answer in turns for message in conversation(question, answer)]
    messages += conversation("And?", None) if asked_last else []
    plain = FLATTEN + (FOLDER / "smollm2.jinja").read_text(encoding="utf-8")
    assert encoded(FLATTEN + CHATML, messages) == encoded(plain, messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_the_question_quotes_is_learnt_once_and_in_its_place(name: str) -> None:
    tokenizer = family_tokenizer(name)
    found = encode_conversation(tokenizer, conversation("Say: a dog. a dog.", "a dog."))
    places = [place for place, label in enumerate(found.labels) if label != -100]
    assert places == list(range(places[0], places[-1] + 1))
    asked = encode_conversation(tokenizer, conversation("Say: a dog. a dog.", "x")).labels
    assert places[0] == next(place for place, label in enumerate(asked) if label != -100)


def test_a_template_that_leaves_out_a_image_is_an_error() -> None:
    plain = (FOLDER / "smollm2.jinja").read_text(encoding="utf-8")
    deaf = FLATTEN + plain.replace("message['content']", "message['content'].replace('<image>', '')")
    with pytest.raises(ValueError, match=r"the conversation has 2 images, but the chat template writes 0 <image>"):
        encoded(deaf, conversation(images=2))


def test_a_template_that_renders_what_was_asked_in_another_way_is_an_error() -> None:
    shouts = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match=r"turn 2 cannot be told apart.*generation %"):
        encoded(FLATTEN + shouts, conversation("how many?"))
    with pytest.raises(ValueError, match="turn 2 cannot be told apart"):
        encoded(FLATTEN + "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", conversation())
