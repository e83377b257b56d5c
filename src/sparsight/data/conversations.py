"""From a row, in whichever of the common forms, to one conversation.

`_turns` and `_part` bring all forms to one: turns of (role, parts), each image part with its own image or without. What
stands behind them knows that form alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsight.data.cells import CELL_KEYS, is_empty, read_cell
from sparsight.errors import UserError

IMAGE_TAG = "<image>"
EXAMPLE = (
    '{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
    '{"from": "gpt", "value": "A dog."}]}'
)
# Fields that a conversation stands in: one of the lists, or else both of a pair.
_LISTS = ("conversations", "messages")
_FLAT = (("query", "response"), ("instruction", "output"))
_NOT_TRAINED = ("video", "videos", "audio", "audios", "tools")
FIELDS = frozenset(
    {*_LISTS, *sum(_FLAT, ()), "input", "history", "system", "id", "image", "images", *_NOT_TRAINED},
)
# What says where a row is from. Training does without it, and nobody expects otherwise.
METADATA = frozenset(
    {
        "source", "data_source", "dataset", "dataset_name", "origin", "category", "subcategory", "task", "task_type",
        "type", "split", "subset", "license", "model", "language", "lang", "metadata", "meta", "url", "image_id",
        "question_id", "conversation_id", "sample_id", "idx", "index", "uid", "uuid", "hash", "width", "height",
        "image_width", "image_height", "image_size", "created_at", "timestamp", "score", "quality",
    }
)  # fmt: skip
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PARTS = {"image": "image", "image_url": "image", "input_image": "image"} | dict.fromkeys(
    ("text", "input_text", "output_text"), "text"
)
_OTHER_MEDIA = re.compile(r"<(video|audio)>")
Find = Callable[[list[str | bytes] | None, str], Sequence[Any]]


@dataclass(frozen=True)
class Sample:
    """One conversation. ``images``: keys of its images, in the order of the image parts of ``messages``; ``unused``:
    fields of its row that training does not use, and that are no metadata."""

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Any, ...]
    unused: tuple[str, ...] = ()


def has_conversation(fields: Any) -> bool:
    """Whether a row, or a table's columns, have the fields of one of the forms."""
    names = set(fields)
    return not names.isdisjoint(_LISTS) or any(names.issuperset(pair) for pair in _FLAT)


def read_row(row: Any, name: str, where: str, find: Find) -> Sample:
    """One conversation from its row.

    Args:
        name: the sample's id if the row has none.
        where: the row, for messages.
        find: keys of the images from what the row says of them, which are paths and bytes; None if it says nothing.

    Raises:
        UserError: the row is in none of the forms, or not whole.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a mapping, found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}  # as a table writes what is not there
    name = str(row.get("id", name))
    where = f"{where} (id {name})"
    for field in _NOT_TRAINED:
        if not is_empty(row.get(field)) and row[field] != "[]":
            raise UserError(f"{where}, field '{field}': video, audio and tools are not trained on here; leave it out")
    used, turns = _turns(row, where)
    messages = [_message(*turn) for turn in turns]
    own = [part.pop("image", None) for message in messages for part in message["content"] if part["type"] == "image"]
    field = next((field for field in ("images", "image") if not is_empty(row.get(field))), "images")
    told, at = _told(row, field, own, used[0], where)
    images = find(told, at)
    _check(messages, images, f"{where}, field '{used[0]}'")
    known = METADATA.union(used, ("id", "system", field))
    unused = tuple(key for key, value in row.items() if key not in known and not is_empty(value) and value != "[]")
    return Sample(name, messages, tuple(images), unused)


def _turns(row: dict[str, Any], where: str) -> tuple[tuple[str, ...], list[tuple[Any, Any, str]]]:
    """The fields that the conversation stands in, and of each turn role, content, and the place for messages."""
    used: tuple[str, ...]
    if field := next((field for field in _LISTS if field in row), None):
        at, found = f"{where}, field '{field}'", row[field]
        if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
            speaker, text = ("from", "value") if field == "conversations" else ("role", "content")
            raise UserError(f"{at}: expected a list of turns, each with '{speaker}' and '{text}', found {found!r:.80}")
        turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content")), at) for turn in found]
        used = (field,)
    elif pair := next((pair for pair in _FLAT if row.keys() >= set(pair)), None):
        used = (*pair, "history") if pair[0] == "query" else (*pair, "input", "history")
        turns = [*_history(row, where), *_pair(row, pair, where)]
    else:
        raise UserError(
            f"{where}: expected 'conversations' (LLaVA) or 'messages', found the fields {sorted(row)}. "
            f"A row looks like {EXAMPLE}"
        )
    system = row.get("system")
    if not is_empty(system):
        stated = [content for role, content, _ in turns if role == "system"]
        if stated and stated != [system]:
            raise UserError(
                f"{where}, field 'system': {system!r:.80}, and there is a system turn too, {stated[0]!r:.80}; expected "
                "one of them"
            )
        turns[:0] = [] if stated else [("system", system, f"{where}, field 'system'")]
    return used, turns


def _history(row: dict[str, Any], where: str) -> Iterator[tuple[str, Any, str]]:
    at = f"{where}, field 'history'"
    pairs = row.get("history", [])
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{at}: expected a list of [question, answer], found {pair!r:.80}")
        yield from (("user", pair[0], at), ("assistant", pair[1], at))


def _pair(row: dict[str, Any], pair: tuple[str, str], where: str) -> Iterator[tuple[str, Any, str]]:
    question, answer = pair
    asked, more = row[question], row.get("input") if question == "instruction" else None
    for field, text in ((question, asked), ("input", more or "")):
        if not isinstance(text, str):
            raise UserError(f"{where}, field '{field}': {_expected_text(text)}")
    yield "user", f"{asked}\n{more}" if more else asked, f"{where}, field '{question}'"
    yield "assistant", row[answer], f"{where}, field '{answer}'"


def _expected_text(found: Any) -> str:
    number = isinstance(found, int | float)
    return f"expected text, found {found!r:.80}" + (f'; write it as text, "{found}"' if number else "")


def _told(
    row: dict[str, Any], field: str, own: list[Any], turns: str, where: str
) -> tuple[list[str | bytes] | None, str]:
    """What the row says of its images, in its parts or in a field of its own (None: nothing), and where it says so."""
    at = f"{where}, field '{field if field in row else 'image'}'"
    value = row.get(field, row.get("image"))
    cells = value if isinstance(value, list) else [value]
    told = [image for image in (read_cell(cell, at) for cell in cells) if image is not None]
    if all(cell is None for cell in own):
        return (None if value is None else told), at
    at = f"{where}, field '{turns}'"
    mine = [image for image in (read_cell(cell, at) for cell in own) if image is not None]
    if len(mine) < len(own):
        raise UserError(
            f"{at}: the turns have {len(own)} {IMAGE_TAG} and image parts, and {len(mine)} of them have an image of "
            "their own; expected all or none"
        )
    if told and told != mine:
        raise UserError(f"{at}: image parts with images of their own, and field '{field}' has others: {told!r:.200}")
    return mine, at


def _message(role: Any, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{where}: unknown speaker {role!r}; expected one of {sorted(_ROLES)}")
    role = _ROLES[role]
    if isinstance(content, str):
        content = [{"type": "text", "text": content.replace("\r\n", "\n").strip("\n")}]
    if not isinstance(content, list):
        raise UserError(f"{where}: the {role}'s turn has no text: {_expected_text(content)}")
    parts = [piece for part in content for piece in _part(part, role, where)]
    if role == "assistant" and any(part["type"] == "image" for part in parts):
        raise UserError(f"{where}: an answer of the assistant holds {IMAGE_TAG}; expected text")
    if role == "assistant" and not any(part["text"].strip() for part in parts):
        raise UserError(f"{where}: an answer of the assistant is empty; expected text")
    return {"role": role, "content": parts}


def _part(part: Any, role: str, where: str) -> list[dict[str, Any]]:
    """One part of a turn as parts of text and images; an image's own one is under "image", as it is written."""
    at = f"{where}: the {role}'s turn"
    values = {k: v for k, v in part.items() if not is_empty(v) or v == ""} if isinstance(part, dict) else {}
    images = {key: values[key] for key in CELL_KEYS if values.get(key, "") != ""}
    named = [key for key in ("text", "video", "audio") if key in values] + ["image"] * bool(images)
    kind = values.get("type", named[0] if len(named) == 1 else None)
    if isinstance(kind, str) and re.search("video|audio", kind):
        raise UserError(f"{at}: {kind} is not trained on here; expected parts of type 'image' or 'text'")
    kind, text = _PARTS.get(kind) if isinstance(kind, str) else None, values.get("text")
    if kind == "image":
        return [{"type": "image", "image": images or None}]
    if kind != "text" or text is None:
        raise UserError(f"{at}: expected parts of type 'image' or 'text', found {part!r:.80}")
    if not isinstance(text, str):
        raise UserError(f"{at}: {_expected_text(text)}")
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{at} holds half of a character, {half[0]!a}: {text!a:.80}")
    tag = _OTHER_MEDIA.search(text) if role == "user" else None
    if tag and f"</{tag[1]}>" not in text:  # else it is HTML
        raise UserError(f"{at} holds {tag[0]}: {tag[1]} is not trained on here; leave the row out")
    return _split_at_images(text.replace("\r\n", "\n"))


def _split_at_images(text: str) -> list[dict[str, Any]]:
    if IMAGE_TAG not in text:
        return [{"type": "text", "text": text}] if text else []
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
    return parts


def _check(messages: list[dict[str, Any]], images: Sequence[Any], where: str) -> None:
    asked = [message["role"] for message in messages if message["role"] != "system"]
    if not asked or asked[-1] != "assistant":
        raise UserError(f"{where}: the last turn must be an answer of the assistant, found {asked or 'no turns'}")
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if shown == 0 and images and "user" in asked:
        # As LLaVA does: an image that no turn mentions stands before the first question.
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"} for _ in images]
    elif shown != len(images):
        raise UserError(
            f"{where}: the text has {shown} {IMAGE_TAG}, but there are {len(images)} images: {images!s:.200}"
        )


def unused_fields(path: Any, counts: dict[str, int], rows: int) -> str:
    """What a warning says of fields that training does not use."""
    named = sorted(counts.items(), key=lambda each: -each[1])
    listed = ", ".join(f"'{name}' ({count:,} of {rows:,} rows)" for name, count in named)
    return f"{path}: fields of rows that training does not use: {listed}"
