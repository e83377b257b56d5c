"""From a conversation to token ids and labels. What is learnt comes from the chat template, never from a search."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from sparsight.errors import UserError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Noncharacters, which no text holds: one stands for an answer, the other parts what only looks like a control token.
_PROBE, _CUT = "\ufdd0", "\ufdd1"


class TooLong(UserError):
    """A sample with more tokens than the limit, where the recipe says to drop such."""


@dataclass(frozen=True)
class Encoded:
    """One conversation: ids and labels of the same length; -100 is not learnt."""

    input_ids: list[int]
    labels: list[int]


@lru_cache(maxsize=8)
def _controls(tokenizer: Any, size: int) -> tuple[re.Pattern[str], frozenset[int]]:
    """What finds the text of a control token, and their ids. ``size`` is the tokenizer's: a grown one is read anew."""
    tokens = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    longest_first = sorted(tokens.values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), frozenset(tokens)


def render(tokenizer: Any, messages: Sequence[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans that the assistant says (stop token included).

    Raises:
        UserError: the template refuses the conversation, or does not show what the assistant says.
    """
    # Those that the tokenizer has not are empty, where they would be undefined: templates add to them.
    known = {"bos_token": "", "eos_token": ""} | tokenizer.special_tokens_map
    common = {"chat_template": tokenizer.chat_template, **known}

    def draw(messages: Sequence[dict], **options: Any) -> tuple[str, list]:
        try:
            texts, spans = render_jinja_template([list(messages)], **common, **options)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses turns of {roles or 'nobody'}: {error}. Change the turns, or "
                "tokenizer.chat_template"
            ) from None
        return texts[0], spans[0] if spans else []

    if _MARKED.search(tokenizer.chat_template):
        text, spans = draw(messages, return_assistant_tokens_mask=True)
        return text, [tuple(span) for span in spans]
    text, _ = draw(messages)
    return text, _spans(text, messages, draw, _controls(tokenizer, len(tokenizer))[0])


def _spans(
    text: str, messages: Sequence[dict], draw: Callable[..., tuple[str, list]], controls: re.Pattern[str]
) -> list[tuple[int, int]]:
    """For templates without marks: what stands behind the generation prompt, up to the stop token behind the answer."""
    spans, tail = [], None
    for place in reversed([place for place, message in enumerate(messages) if message["role"] == "assistant"]):
        before = draw(messages[:place], add_generation_prompt=True)[0]
        probed = [*messages[:place], _with_probe(messages[place]), *messages[place + 1 :]]
        _, shown, after = draw(probed)[0].rpartition(_PROBE)
        if tail is None:  # what stands behind an answer that is the last
            tail = after if place + 1 == len(messages) else draw(probed[: place + 1])[0].rpartition(_PROBE)[2]
        end = len(text) - len(after)
        if not (shown and text.startswith(before) and text.endswith(after) and len(before) <= end):
            raise UserError(
                f"what the assistant says in turn {place + 1} cannot be told apart: the chat template renders what "
                "stands around it in another way without it. Add {% generation %} marks to tokenizer.chat_template, "
                "or leave out what it treats so (a system turn, most often)"
            )
        # Only the stop token: behind it may stand what ends the turn, or the whole conversation.
        control = controls.search(tail)
        stop = tail[: control.end()] if control else tail.rstrip()
        spans.append((len(before), end + len(stop) * after.startswith(stop)))
    return spans[::-1]


def _with_probe(message: dict) -> dict:
    as_text = isinstance(message["content"], str)
    return message | {"content": _PROBE if as_text else [{"type": "text", "text": _PROBE}]}


def stop_tokens(tokenizer: Any, known: int | Sequence[int] | None = None) -> list[int]:
    """Ids at which an answer ends: ``known`` ones (of a generation config), the tokenizer's own, and what its chat
    template puts behind an answer. It is that one which is learnt, and tokenizers may have another."""
    found = {tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or ())} - {None}
    turns = [{"role": role, "content": [{"type": "text", "text": "?"}]} for role in ("user", "assistant")]
    try:
        *_, last = (label for label in encode_conversation(tokenizer, turns).labels if label != -100)
    except ValueError:  # the template wants other turns
        return sorted(found)
    return sorted(found | ({last} & _controls(tokenizer, len(tokenizer))[1]))


def _as_text(message: dict, controls: re.Pattern[str]) -> dict:
    """The message with what looks like a control token cut behind its first character, so that it is none."""

    def cut(text: str) -> str:
        return controls.sub(lambda found: found[0][0] + _CUT + found[0][1:], text)

    content = message["content"]
    if isinstance(content, str):
        return message | {"content": cut(content)}
    return message | {"content": [part | {"text": cut(part["text"])} if "text" in part else part for part in content]}


def _tokenize(tokenizer: Any, text: str) -> list[tuple[int, int, int]]:
    """(id, first character, end) of each token of a text with cuts."""
    tokens, start = [], 0
    for number, piece in enumerate(text.split(_CUT)):
        lead = "\n" if number else ""  # else SentencePiece puts a space before the piece
        coded = tokenizer(lead + piece, add_special_tokens=False, return_offsets_mapping=True)
        for id, (begin, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
            if not lead or end > len(lead):
                tokens.append((id, start + begin - len(lead), start + end - len(lead)))
        start += len(piece) + len(_CUT)
    return tokens


def encode_conversation(
    tokenizer: Any, messages: Sequence[dict], image_token: str = "<image>", tokens_per_image: int = 1
) -> Encoded:
    """Token ids with images expanded to ``tokens_per_image`` placeholders each, and labels.

    Text that reads like a control token or a placeholder, such as ``<|im_end|>`` or ``<image>``, stays plain text.

    Raises:
        UserError: nothing would be learnt, the template cannot be read, or it does not show every image.
    """
    pattern, control_ids = _controls(tokenizer, len(tokenizer))
    text, spans = render(tokenizer, [_as_text(message, pattern) for message in messages])
    image_id, shown = tokenizer.convert_tokens_to_ids(image_token), 0
    ids: list[int] = []
    labels: list[int] = []
    inside = iter(spans)
    span = next(inside, None)
    for id, begin, end in _tokenize(tokenizer, text):
        if id == image_id:
            ids += [id] * tokens_per_image
            labels += [-100] * tokens_per_image
            shown += 1
            continue
        while span is not None and begin >= span[1]:
            span = next(inside, None)
        # A token that begins before the answer (a space joined to its first word) is learnt too: it holds the answer.
        # Not so a control token, which may take the spaces behind it.
        learnt = span is not None and end > span[0] and (begin >= span[0] or id not in control_ids)
        ids.append(id)
        labels.append(id if learnt else -100)
    images = sum(
        part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"]
    )
    if shown != images:
        raise UserError(f"the conversation has {images} images, but the chat template writes {shown} {image_token}")
    if all(label == -100 for label in labels):
        raise UserError("nothing to learn: the conversation has no answer of the assistant")
    return Encoded(ids, labels)
