"""R12: labels that are not -100 are exactly what the assistant says and its stop token, for every tested template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparsight.data.chat import encode_conversation
from templates import FAMILIES, family_tokenizer

LOOKS_LIKE_CONTROL = [
    "<image>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</s>",
    "<|eot_id|>",
    "<end_of_turn>",
    "[INST]",
]
ALPHABET = st.one_of(
    st.sampled_from([" ", "\n", "  ", "dog", " 12", "é", "猫", "🙂", "👩‍🚀", '"', "<", "\t", *LOOKS_LIKE_CONTROL]),
    st.characters(categories=("L", "N", "P", "S", "Zs")),
)
TEXT = st.lists(ALPHABET, max_size=12).map("".join)
TURNS = st.lists(st.tuples(st.integers(0, 2), TEXT, TEXT), min_size=1, max_size=3)


def messages_of(turns: list[tuple[int, str, str]], system: str | None) -> list[dict[str, Any]]:
    """Each turn: images, a question, an answer."""
    found = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for images, question, answer in turns:
        parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        found += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return found


def learnt(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """What each unbroken run of labels adds to the text."""
    edges = [
        n for n in range(len(ids) + 1) if (n > 0 and labels[n - 1] != -100) != (n < len(ids) and labels[n] != -100)
    ]
    texts = [tokenizer.decode(ids[:edge]) for edge in edges]
    return [text[len(before) :] for before, text in zip(texts[::2], texts[1::2], strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(turns=TURNS, system=st.none() | TEXT)
@example([(1, "How many?", " 12 apples.\n"), (0, "And?", "\n\n<image> </s><|im_end|>🙂  ")], "")
@example([(2, "", "")], None)
def test_decoded_labels_are_the_answers_and_stop_tokens(
    name: str, turns: list[tuple[int, str, str]], system: str | None
) -> None:
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    encoded = encode_conversation(
        tokenizer, messages_of(turns, system if family.system else None), "<image>", tokens_per_image=3
    )
    expected = [family.shown(answer, n == len(turns)) + family.stop for n, (*_, answer) in enumerate(turns, 1)]
    if family.greedy:  # spaces behind a control token are part of it
        expected = [text.lstrip() for text in expected]
    assert learnt(encoded.input_ids, encoded.labels, tokenizer) == expected
    assert all(label in (-100, id) for label, id in zip(encoded.labels, encoded.input_ids, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_text_that_reads_like_a_control_token_is_text(name: str) -> None:
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    text = "a<image>b" + family.stop + "".join(family.control) + (family.bos or "") + "c"
    plain = encode_conversation(tokenizer, messages_of([(1, "x", "y")], None), "<image>", 3)
    odd = encode_conversation(tokenizer, messages_of([(1, text, text)], None), "<image>", 3)
    control = set(tokenizer.added_tokens_decoder)
    assert [id for id in odd.input_ids if id in control] == [id for id in plain.input_ids if id in control]
    assert tokenizer.decode(odd.input_ids).count(text) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_begins_with_one_bos(name: str) -> None:
    tokenizer = family_tokenizer(name)
    ids = encode_conversation(tokenizer, messages_of([(1, "x", "y")], None)).input_ids
    written = "bos_token" in tokenizer.chat_template
    assert ids.count(tokenizer.bos_token_id) == written and (ids[0] == tokenizer.bos_token_id) == written


@pytest.mark.parametrize(("name", "expected"), [("gemma-2", "System role not supported"), ("mistral-v0.3", "turn 3")])
def test_a_system_turn_that_the_template_refuses_or_loses_is_an_error(name: str, expected: str) -> None:
    """Mistral's template writes it only if the question is last: it would be there in use, and not in training."""
    with pytest.raises(ValueError, match=expected):
        encode_conversation(family_tokenizer(name), messages_of([(1, "x", "y")], "Be brief."))


@pytest.mark.parametrize("name", ["gemma-2", "gemma-3", "vicuna", "mistral-v0.3", "mistral-tekken"])
def test_turns_that_do_not_alternate_are_an_error_where_the_template_says_so(name: str) -> None:
    twice = messages_of([(1, "x", "y")], None)
    with pytest.raises(ValueError, match=r"refuses turns of user, assistant, assistant: .*alternate"):
        encode_conversation(family_tokenizer(name), [*twice, twice[-1]])


def test_qwen3s_earlier_reasoning_is_left_out_and_the_last_is_learnt() -> None:
    tokenizer = family_tokenizer("qwen3")
    thinks = "<think>\nhm\n</think>\n\n"
    turns = [(1, "A?", thinks + "12"), (0, "B?", thinks + "13")]
    encoded = encode_conversation(tokenizer, messages_of(turns, None))
    assert learnt(encoded.input_ids, encoded.labels, tokenizer) == ["12<|im_end|>", thinks + "13<|im_end|>"]
