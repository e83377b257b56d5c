"""From a conversation to token ids and labels. The chat template says what is supervised; no text is searched for."""

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


@dataclass(frozen=True)
class Encoded:
    """One conversation: ids and labels of the same length; -100 is not supervised."""

    input_ids: list[int]
    labels: list[int]


@lru_cache(maxsize=8)
def _controls(tokenizer: Any, size: int) -> tuple[re.Pattern[str], frozenset[int]]:
    """A pattern of the texts of control tokens, and their ids. ``size``: of the tokenizer; a grown one is read anew."""
    tokens = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    longest_first = sorted(tokens.values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), frozenset(tokens)


def render(tokenizer: Any, messages: Sequence[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans of the assistant's answers (stop token included).

    Raises:
        UserError: the template refuses the conversation, or does not show what the assistant says.
    """
    # Special tokens that the tokenizer lacks are empty, where they would be undefined: templates add to them.
    known = {"bos_token": "", "eos_token": ""} | tokenizer.special_tokens_map

    def draw(messages: Sequence[dict], **options: Any) -> tuple[str, list]:
        try:
            texts, spans = render_jinja_template(
                [list(messages)], chat_template=tokenizer.chat_template, **known, **options
            )
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
    return draw(messages)[0], _spans(messages, draw, _controls(tokenizer, len(tokenizer))[0])


def _spans(
    messages: Sequence[dict], draw: Callable[..., tuple[str, list]], controls: re.Pattern[str]
) -> list[tuple[int, int]]:
    """For templates without marks: from the end of the generation prompt to the stop token behind the answer."""
    text, spans, tail = draw(messages)[0], [], None
    for turn in reversed([turn for turn, message in enumerate(messages) if message["role"] == "assistant"]):
        before = draw(messages[:turn], add_generation_prompt=True)[0]
        as_text = isinstance(messages[turn]["content"], str)
        probe = messages[turn] | {"content": _PROBE if as_text else [{"type": "text", "text": _PROBE}]}
        probed = [*messages[:turn], probe, *messages[turn + 1 :]]
        _, shown, after = draw(probed)[0].rpartition(_PROBE)
        if tail is None:  # the text behind an answer that is the last turn
            tail = after if turn + 1 == len(messages) else draw(probed[: turn + 1])[0].rpartition(_PROBE)[2]
        end = len(text) - len(after)
        if not (shown and text.startswith(before) and text.endswith(after) and len(before) <= end):
            raise UserError(
                f"the assistant's answer in turn {turn + 1} cannot be told apart. Without it, the template renders "
                "the text around it in another way. Add {% generation %} marks to tokenizer.chat_template, or leave "
                "out the turn that it treats so (a system turn, most often)"
            )
        # Only the stop token: behind it may stand the end of the turn, or of the whole conversation.
        control = controls.search(tail)
        stop = tail[: control.end()] if control else tail.rstrip()
        spans.append((len(before), end + len(stop) * after.startswith(stop)))
    return spans[::-1]


def stop_tokens(tokenizer: Any, known: int | Sequence[int] | None = None) -> list[int]:
    """Ids at which an answer ends: ``known`` ones (of a generation config), the tokenizer's own, and the token that its
    chat template puts behind an answer, which is the supervised one."""
    found = {tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or ())} - {None}
    turns = [{"role": role, "content": [{"type": "text", "text": "?"}]} for role in ("user", "assistant")]
    try:
        *_, last = (label for label in encode_conversation(tokenizer, turns).labels if label != -100)
    except ValueError:  # the template wants other turns
        return sorted(found)
    return sorted(found | ({last} & _controls(tokenizer, len(tokenizer))[1]))


def _as_text(message: dict, controls: re.Pattern[str]) -> dict:
    """The message, where text that looks like a control token is cut behind its first character, so that it is none."""

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
        UserError: nothing is supervised, the template cannot be read, or it does not show every image.
    """
    pattern, control_ids = _controls(tokenizer, len(tokenizer))
    text, spans = render(tokenizer, [_as_text(message, pattern) for message in messages])
    image_id, shown = tokenizer.convert_tokens_to_ids(image_token), 0
    ids: list[int] = []
    labels: list[int] = []
    ahead = spans[::-1]
    for id, begin, end in _tokenize(tokenizer, text):
        if id == image_id:
            ids += [id] * tokens_per_image
            labels += [-100] * tokens_per_image
            shown += 1
            continue
        while ahead and begin >= ahead[-1][1]:
            ahead.pop()
        # A token that begins before the answer (a space joined to its first word) is supervised too: it holds the
        # answer. A control token is not: it may take the spaces behind it.
        supervised = ahead and end > ahead[-1][0] and (begin >= ahead[-1][0] or id not in control_ids)
        ids.append(id)
        labels.append(id if supervised else -100)
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    images = sum(part["type"] == "image" for part in parts)
    if shown != images:
        raise UserError(f"the conversation has {images} images, but the chat template writes {shown} {image_token}")
    if all(label == -100 for label in labels):
        raise UserError("nothing is supervised: the conversation has no answer of the assistant")
    return Encoded(ids, labels)
