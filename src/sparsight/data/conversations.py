"""From a row, in any of the common forms, to one conversation: turns of parts, and the keys of its images.

A video becomes its frames here, one image after the other: whatever comes behind knows images alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from sparsight.data.cells import CELL_KEYS, read_cell
from sparsight.data.videos import frames_of
from sparsight.errors import UserError

IMAGE_TAG = "<image>"
EXAMPLE = (
    '{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
    '{"from": "gpt", "value": "A dog."}]}'
)
# Fields that a conversation stands in: one of the lists, or else both of a pair.
_LISTS, _PAIRS = ("conversations", "messages"), (("query", "response"), ("instruction", "output"))
_MEDIA, _NOT_TRAINED = ("image", "images", "video", "videos"), ("audio", "audios", "tools")
FIELDS = frozenset({*_LISTS, *sum(_PAIRS, ()), "input", "history", "system", "id", *_MEDIA, *_NOT_TRAINED})
# Fields that say where a row is from: training does without them, and nobody expects otherwise.
_ORIGIN = (
    "source data_source dataset dataset_name origin category subcategory task task_type type split subset license "
    "model language lang metadata meta url image_id question_id conversation_id sample_id idx index uid uuid hash "
    "width height image_width image_height image_size created_at timestamp score quality"
)
METADATA = frozenset(_ORIGIN.split())
_SPEAKERS = ("user", "assistant")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_IMAGE_PARTS, _TEXT_PARTS = ("image", "image_url", "input_image"), ("text", "input_text", "output_text")
_VIDEO_PARTS = ("video", "video_url", "input_video")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]")  # tables write all columns in every row


@dataclass(frozen=True)
class Sample:
    """One conversation. ``images``: of its image parts, in their order, keys of a source, or paths, bytes and frames as
    the row names them; ``unused``: fields of its row that training does not use and that are no metadata."""

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Any, ...]
    unused: tuple[str, ...] = ()


def has_conversation(fields: Any) -> bool:
    """Whether a row, or a table's columns, have the fields of one of the forms."""
    names = set(fields)
    return not names.isdisjoint(_LISTS) or any(names.issuperset(pair) for pair in _PAIRS)


def unused_fields(path: Any, counts: dict[str, int], rows: int) -> str:
    """A warning's text about fields that training does not use."""
    named = sorted(counts.items(), key=lambda each: -each[1])
    listed = ", ".join(f"'{name}' ({count:,} of {rows:,} rows)" for name, count in named)
    return f"{path}: fields of rows that training does not use: {listed}"


def read_row(row: Any, name: str, where: str, members: list[str] | None = None, frames: int = 8) -> Sample:
    """One conversation from its row, with its images as paths, bytes and frames of videos.

    Args:
        name: the sample's id if the row has none.
        where: the row, for messages.
        members: the only images that it may name; these if it names none. Then it has no videos.
        frames: of a video.

    Raises:
        UserError: the row is in none of the forms, or not whole.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a mapping, found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    name = str(row.get("id", name))
    where = f"{where} (id {name})"
    for field in _NOT_TRAINED:
        if row.get(field) not in _EMPTY:
            raise UserError(f"{where}, field '{field}': audio and tools are not trained on here; leave it out")
    fields, turns = _turns(row, where)
    stated = [content for role, content, _ in turns if role == "system"]
    if (system := row.get("system")) not in _EMPTY and stated != [system]:
        if stated:
            raise UserError(
                f"{where}, field 'system': {system!r:.80}, but there is a system turn too, {stated[0]!r:.80}"
            )
        turns.insert(0, ("system", system, "system"))
    messages = [_message(role, content, f"{where}, field '{field}'") for role, content, field in turns]
    at = f"{where}, field '{fields[0]}'"
    videos = _named(row, messages, "video", where, at)
    images = _named(row, messages, "image", where, at)
    if members is not None:
        if videos:
            raise UserError(f"{where}: videos in shards are not read; write rows of .json beside video files")
        images = _members(images, members, f"{where}, field '{_field(row, 'image')}'")
    _check(messages, {"image": images or [], "video": videos or []}, at)
    shown = _as_images(messages, images or [], [frames_of(video, frames) for video in videos or []])
    used = METADATA.union(fields, ("id", "system"), _MEDIA)
    unused = tuple(key for key, value in row.items() if key not in used and value not in _EMPTY)
    return Sample(name, messages, shown, unused)


def _turns(row: dict[str, Any], where: str) -> tuple[tuple[str, ...], list[tuple[Any, Any, str]]]:
    """The fields that the conversation stands in; role, content and field of each turn."""
    for field in _LISTS:
        found = row.get(field)
        if isinstance(found, list) and all(isinstance(turn, dict) for turn in found):
            said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in found]
            return (field,), [(role, content, field) for role, content in said]
        if found is not None:
            raise UserError(
                f"{where}, field '{field}': expected a list of turns, each with 'from' and 'value' or 'role' and "
                f"'content', found {found!r:.80}"
            )
    for question, answer in _PAIRS:
        if question in row and answer in row:
            more, history = row.get("input") if question == "instruction" else None, row.get("history", [])
            if more and not isinstance(more, str):
                raise UserError(f"{where}, field 'input': expected text, found {more!r:.80}")
            asked = f"{row[question]}\n{more}" if more and isinstance(row[question], str) else row[question]
            if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
                at = f"{where}, field 'history'"
                raise UserError(f"{at}: expected a list of [question, answer], found {history!r:.80}")
            turns = [(role, text, "history") for pair in history for role, text in zip(_SPEAKERS, pair, strict=True)]
            turns += [("user", asked, question), ("assistant", row[answer], answer)]
            return (question, answer, "history", *(("input",) if question == "instruction" else ())), turns
    raise UserError(
        f"{where}: expected 'conversations' (LLaVA) or 'messages', found the fields {sorted(row)}. "
        f"A row looks like {EXAMPLE}"
    )


def _field(row: dict[str, Any], kind: str) -> str:
    return f"{kind}s" if row.get(f"{kind}s") not in _EMPTY or kind not in row else kind


def _named(row: dict[str, Any], messages: list[dict[str, Any]], kind: str, where: str, turns: str) -> list[Any] | None:
    """The images, or the videos, that a row names, in a field or each in its part of a turn; None: none."""
    field, read = _field(row, kind), read_cell if kind == "image" else _video
    value, at = row.get(field), f"{where}, field '{field}'"
    listed = field != "video"  # a list there is one of frames
    cells: list[Any] = [read(each, at) for each in (value if isinstance(value, list) and listed else [value])]
    named = [cell for cell in cells if cell is not None]
    parts = [part for message in messages for part in message["content"]]
    images = row.get("image"), row.get("images"), *(part["type"] == "video" or None for part in parts)
    if kind == "video" and named and all(each in _EMPTY for each in images):
        for part in parts:  # LLaVA-Video writes <image> for its videos
            part |= {"type": "video"} if part == {"type": "image"} else {}
    own = [part.pop(kind, None) for part in parts if part["type"] == kind]
    if not any(own):
        return None if value is None else named
    mine = [read(cell, turns) for cell in own]
    if None in mine or named not in ([], mine):
        raise UserError(
            f"{turns}: {len(own)} <{kind}> and {kind} parts, {len(mine) - mine.count(None)} of them with one of "
            f"their own; {at}: {named!s:.200}; expected all {kind}s in one of the two"
        )
    return mine


def _video(cell: Any, where: str) -> str | bytes | tuple[str | bytes, ...] | None:
    """A video's path or bytes, or those of its frames."""
    if not isinstance(cell, list) or not cell:
        return read_cell(cell or None, where)
    frames = [read_cell(each, where) for each in cell]
    if None in frames:
        raise UserError(f"{where}: expected a video, or a list of its frames, found {cell!s:.200}")
    return tuple(frame for frame in frames if frame is not None)


def _as_images(messages: list[dict[str, Any]], images: list[Any], videos: list[list[Any]]) -> tuple[Any, ...]:
    """All images and frames in the order of their parts; a part that is a video becomes one part for each frame."""
    shown: list[Any] = []
    found = {"image": iter([[image] for image in images]), "video": iter(videos)}
    for message in messages:
        parts, message["content"] = message["content"], []
        for part in parts:
            if part["type"] == "text":
                message["content"].append(part)
            else:
                seen = next(found[part["type"]])
                message["content"] += [{"type": "image"} for _ in seen]
                shown += seen
    return tuple(shown)


def _members(named: list[Any] | None, members: list[str], where: str) -> list[str]:
    """The members that a row names; all in their order if it names none of them, or no images."""
    known = {os.path.basename(image): image for image in members} | {image: image for image in members}
    names = [name.replace("\\", "/") if isinstance(name, str) else f"{len(name)} bytes" for name in named or []]
    found = [known.get(name) or known.get(os.path.basename(name)) for name in names]
    if named is None or (not any(found) and len(names) == len(members)):
        return members
    if not all(found):
        raise UserError(f"{where}: expected members of the sample, which are {members}, found {names}")
    return [name for name in found if name]


def _message(role: Any, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{where}: unknown speaker {role!r}; expected one of {sorted(_ROLES)}")
    role, where = _ROLES[role], f"{where}: the {_ROLES[role]}'s turn"
    if isinstance(content, str):
        content = [{"type": "text", "text": content.replace("\r\n", "\n").strip("\n")}]
    if not isinstance(content, list):
        raise UserError(f"{where}: {_expected_text(content)}")
    parts = [piece for part in content for piece in _part(part, role, where)]
    if role == "assistant":
        if media := [part["type"] for part in parts if part["type"] != "text"]:
            raise UserError(f"{where} holds <{media[0]}>; expected text")
        if not any(part["text"].strip() for part in parts):
            raise UserError(f"{where} is empty; expected text")
    return {"role": role, "content": parts}


def _part(part: Any, role: str, where: str) -> list[dict[str, Any]]:
    """A part of a turn as parts of text, images and videos; under its type is what the part says of its own image."""
    values = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    image = {key: values[key] for key in CELL_KEYS if values.get(key) not in _EMPTY}
    video = next((values[key] for key in _VIDEO_PARTS if values.get(key) not in _EMPTY), None)
    guess = "text" if "text" in values else "video" if video else "image" if image else None
    text, kind = values.get("text"), values.get("type", guess)
    if re.search("audio", f"{kind} {' '.join(values)}"):
        raise UserError(f"{where}: audio is not trained on here; expected parts of type 'image', 'video' or 'text'")
    if kind in _VIDEO_PARTS:
        return [{"type": "video", "video": video or image or None}]
    if kind in _IMAGE_PARTS and not video:
        return [{"type": "image", "image": image or None}]
    if kind not in _TEXT_PARTS or text is None or video or (image and "type" not in values):
        raise UserError(f"{where}: expected parts of type 'image', 'video' or 'text', found {part!r:.80}")
    if not isinstance(text, str):
        raise UserError(f"{where}: {_expected_text(text)}")
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where} holds half of a character, {half[0]!a}: {text!a:.80}")
    if role == "user" and "<audio>" in text and "</audio>" not in text:  # else it is HTML
        raise UserError(f"{where} holds <audio>: audio is not trained on here; leave the row out")
    tags = "<(image|video)>" if role == "user" and "</video>" not in text else "<(image)>"
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces := re.split(tags, text.replace("\r\n", "\n"))):
        if number % 2:
            parts.append({"type": piece})
        elif piece := piece.strip("\n") if len(pieces) > 1 else piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _expected_text(found: Any) -> str:
    number = isinstance(found, int | float)
    return f"expected text, found {found!r:.80}" + (f'; write it as text, "{found}"' if number else "")


def _check(messages: list[dict[str, Any]], media: dict[str, list[Any]], where: str) -> None:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[-1:] != ["assistant"]:
        raise UserError(f"{where}: the last turn must be an answer of the assistant, found {roles or 'no turns'}")
    for kind, found in media.items():
        shown = sum(part["type"] == kind for message in messages for part in message["content"])
        if shown == 0 and found and "user" in roles:
            # As LLaVA does: an image that no turn mentions stands before the first question.
            first = next(message for message in messages if message["role"] == "user")
            first["content"][:0] = [{"type": kind} for _ in found]
        elif shown != len(found):
            raise UserError(
                f"{where}: the text has {shown} <{kind}>, but there are {len(found)} {kind}s: {found!s:.200}"
            )
