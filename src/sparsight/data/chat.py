"""From a conversation to token ids and labels. What is learnt comes from the chat template, never from a search."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One conversation: ids and labels of the same length; -100 is not learnt."""

    input_ids: list[int]
    labels: list[int]


def render(tokenizer: Any, messages: Sequence[dict], **kwargs: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans that the assistant says (stop token included)."""
    template = tokenizer.chat_template
    common = {"chat_template": template, **tokenizer.special_tokens_map, **kwargs}
    marked = bool(_MARKED.search(template))
    texts, spans = render_jinja_template([list(messages)], return_assistant_tokens_mask=marked, **common)
    if marked:
        return texts[0], [tuple(span) for span in spans[0]]
    return texts[0], _spans_by_prefix(texts[0], messages, common)


def _spans_by_prefix(text: str, messages: Sequence[dict], common: dict) -> list[tuple[int, int]]:
    """For templates without marks: what an assistant turn adds behind the generation prompt."""
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_jinja_template([list(messages[:place])], add_generation_prompt=True, **common)[0][0]
        after = render_jinja_template([list(messages[: place + 1])], **common)[0][0]
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            raise ValueError(
                "the chat template renders a turn differently once others follow, and it has no "
                "{% generation %} marks: what the assistant says cannot be told apart. "
                "Add the marks to tokenizer.chat_template"
            )
        spans.append((len(before), len(after.rstrip())))
    return spans


def encode_conversation(
    tokenizer: Any, messages: Sequence[dict], image_token: str = "<image>", tokens_per_image: int = 1
) -> Encoded:
    """Token ids with images expanded to ``tokens_per_image`` placeholders each, and labels.

    Raises:
        ValueError: nothing would be learnt, or the template cannot be read.
    """
    text, spans = render(tokenizer, messages)
    expanded, shift, cursor = [], [], 0
    for match in re.finditer(re.escape(image_token), text):
        expanded += [text[cursor : match.start()], image_token * tokens_per_image]
        shift.append(match.start())
        cursor = match.end()
    expanded.append(text[cursor:])
    growth = len(image_token) * (tokens_per_image - 1)
    moved = [tuple(at + growth * sum(place < at for place in shift) for at in span) for span in spans]
    coded = tokenizer("".join(expanded), add_special_tokens=False, return_offsets_mapping=True)
    labels = [-100] * len(coded["input_ids"])
    inside = iter(moved)
    span = next(inside, None)
    for index, (start, end) in enumerate(coded["offset_mapping"]):
        while span is not None and start >= span[1]:
            span = next(inside, None)
        # A token that begins before the answer (a space joined to its first word) is learnt too: it holds the answer.
        if span is not None and start < span[1] and end > max(start, span[0]):
            labels[index] = coded["input_ids"][index]
    if all(label == -100 for label in labels):
        raise ValueError("nothing to learn: the conversation has no answer of the assistant")
    return Encoded(list(coded["input_ids"]), labels)
