"""Sources of conversations about pictures: all have a length, random access, and pictures by key."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from sparsight.config import ConversationData, SceneData
from sparsight.data.images import load_image
from sparsight.data.scenes import SceneConfig, ScenesDataset

IMAGE_TAG = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """One conversation. ``images``: keys of its pictures, in the order of the image parts of ``messages``."""

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Any, ...]


class Source(Protocol):
    """What training needs of data."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def picture(self, key: Any) -> Image.Image: ...

    def keys(self) -> Sequence[Hashable]:
        """Every picture's key, once."""
        ...


class SceneSource:
    """The embedded scenes as a source of ``length`` conversations about ``data.scenes`` pictures;
    a picture that comes again has other questions."""

    def __init__(
        self, data: SceneData, length: int, split: str = "train", image_size: int = 256, offset: int = 0
    ) -> None:
        self.config = scene_config(data, image_size)
        self.offset = offset  # conversations that earlier stages have had
        repeats = -(-(offset + length) // data.scenes)
        self.scenes = ScenesDataset(
            self.config, split, scenes=data.scenes, repeats=repeats, seed=data.seed, tasks=data.tasks, draw=False
        )
        self.length = length
        self.split = split
        self.pictures = data.scenes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        index += self.offset
        return Sample(f"scenes/{self.split}/{index}", self.scenes.messages(index), (index % self.pictures,))

    def picture(self, key: int) -> Image.Image:
        return self.scenes.image(key)

    def keys(self) -> Sequence[int]:
        return range(self.pictures)


def scene_config(data: SceneData, image_size: int = 256) -> SceneConfig:
    """The generator's settings from the recipe's."""
    values = data.model_dump(exclude={"kind", "scenes", "tasks", "seed"})
    return SceneConfig(**values, image_size=image_size)


class ConversationSource:
    """LLaVA JSON or ``messages`` + ``images``, from a .json list or .jsonl lines.

    Args:
        strict: a bad row or a missing picture is an error at once, and not only when it is asked for.

    Raises:
        ValueError: the file or a row is not as expected; the message names the sample, the field, what was found
            and what was expected.
    """

    def __init__(self, data: ConversationData, strict: bool = True) -> None:
        self.file = Path(data.path)
        self.folder = Path(data.images) if data.images else self.file.parent
        rows = _read_rows(self.file, strict)
        if not rows:
            raise ValueError(f"{self.file}: no samples in it")
        self.bad: dict[int, str] = {}  # row -> what is wrong with it
        self.samples = [self._sample_or_note(row, number, strict) for number, row in enumerate(rows)]
        if strict:
            self._find_pictures()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        row = index % len(self.samples)
        if row in self.bad:
            raise ValueError(self.bad[row])
        return self.samples[row]

    def picture(self, key: str) -> Image.Image:
        return load_image(self.folder / key)

    def keys(self) -> Sequence[str]:
        return list(dict.fromkeys(key for sample in self.samples for key in sample.images))

    def _find_pictures(self) -> None:
        """Tell before training, not hours into it, that a picture is not there."""
        first = {
            key: (number, sample.id) for number, sample in reversed([*enumerate(self.samples)]) for key in sample.images
        }
        missing = sorted((place, key) for key, place in first.items() if not (self.folder / key).is_file())
        if missing:
            (number, name), key = missing[0]
            raise ValueError(
                f"{self.file}, row {number} (id {name}), field 'images': {self.folder / key}: there is no such file"
                f" ({len(missing)} of {len(first)} pictures are missing)"
            )

    def _sample_or_note(self, row: Any, number: int, strict: bool) -> Sample:
        try:
            return self._sample(row, number)
        except ValueError as error:
            if strict:
                raise
            self.bad[number] = str(error)
            return Sample(str(number), [], ())

    def _sample(self, row: Any, number: int) -> Sample:
        where = f"{self.file}, row {number}"
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a mapping, found {type(row).__name__}")
        name = str(row.get("id", number))
        where = f"{where} (id {name})"
        images = _image_paths(row.get("images", row.get("image")), f"{where}, field 'images'")
        if "conversations" in row:
            field, speaker, text = "conversations", "from", "value"
        elif "messages" in row:
            field, speaker, text = "messages", "role", "content"
        else:
            raise ValueError(f"{where}: expected 'conversations' (LLaVA) or 'messages', found the fields {sorted(row)}")
        where, turns = f"{where}, field '{field}'", row[field]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(
                f"{where}: expected a list of turns, each with '{speaker}' and '{text}', found {turns!r:.80}"
            )
        messages = [_message(turn.get(speaker), turn.get(text), where) for turn in turns]
        _check(messages, images, where)
        return Sample(name, messages, tuple(images))


def _read_rows(file: Path, strict: bool) -> list[Any]:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if file.suffix == ".jsonl":
        # Not splitlines: it also cuts at characters such as U+2028, which JSON allows within a text.
        rows = [
            _read_line(file, number, line, strict) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a list of samples, found {type(rows).__name__}")
    return rows


def _read_line(file: Path, number: int, line: str, strict: bool) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        wrong = ValueError(f"{file}, line {number}: not valid JSON: {error}")
        if strict:
            raise wrong from None
        return wrong  # told when the row is asked for


def _image_paths(value: Any, where: str) -> list[str]:
    """Paths of a row's pictures; none may lead out of the image folder. Links in that folder are the user's own and
    are followed; a path comes from whoever wrote the data."""
    paths = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(paths, list):
        raise ValueError(f"{where}: expected a path or a list of paths, found {type(value).__name__}")
    for path in paths:
        if not isinstance(path, str):
            raise ValueError(f"{where}: expected paths, found {type(path).__name__}")
        if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise ValueError(f"{where}: expected a path inside the image folder, found '{path}'")
    return paths


def _message(role: Any, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where}: unknown speaker {role!r}; expected one of {sorted(_ROLES)}")
    role = _ROLES[role]
    if isinstance(content, str):
        content = [{"type": "text", "text": content.strip("\n")}]
    if not isinstance(content, list):
        raise ValueError(f"{where}: the {role}'s turn has no text, found {content!r}")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(text, str):
            parts += _split_at_images(text)
        else:
            raise ValueError(
                f"{where}: the {role}'s turn: expected parts of type 'image' or 'text', found {part!r:.80}"
            )
    if role == "assistant" and any(part["type"] == "image" for part in parts):
        raise ValueError(f"{where}: an answer of the assistant holds {IMAGE_TAG}; expected text")
    if role == "assistant" and not any(part["text"].strip() for part in parts):
        raise ValueError(f"{where}: an answer of the assistant is empty; expected text")
    return {"role": role, "content": parts}


def _split_at_images(text: str) -> list[dict[str, Any]]:
    if IMAGE_TAG not in text:
        return [{"type": "text", "text": text}] if text else []
    parts: list[dict[str, Any]] = []
    for place, piece in enumerate(text.split(IMAGE_TAG)):
        parts += [{"type": "image"}] if place else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
    return parts


def _check(messages: list[dict[str, Any]], images: list[str], where: str) -> None:
    asked = [message["role"] for message in messages if message["role"] != "system"]
    if not asked or asked[-1] != "assistant":
        raise ValueError(f"{where}: the last turn must be an answer of the assistant, found {asked or 'no turns'}")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places == 0 and images and "user" in asked:
        # As LLaVA does: a picture that no turn mentions stands before the first question.
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"} for _ in images]
    elif places != len(images):
        raise ValueError(f"{where}: the text has {places} {IMAGE_TAG}, but there are {len(images)} images: {images}")


def open_source(
    data: SceneData | ConversationData, length: int, image_size: int, offset: int = 0, strict: bool = True
) -> Source:
    """The training source of a stage: ``length`` conversations, behind the ``offset`` of earlier stages.
    Not ``strict``: a bad row raises ValueError when it is asked for."""
    if isinstance(data, SceneData):
        return SceneSource(data, length, image_size=image_size, offset=offset)
    return ConversationSource(data, strict)
