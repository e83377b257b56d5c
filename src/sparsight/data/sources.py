"""Sources of conversations about pictures: all have a length, random access, and pictures by key."""

from __future__ import annotations

import json
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

    Raises:
        ValueError: the file or a row is not as expected; the message names the sample, the field, what was found
            and what was expected.
    """

    def __init__(self, data: ConversationData) -> None:
        self.file = Path(data.path)
        self.folder = Path(data.images) if data.images else self.file.parent
        rows = _read_rows(self.file)
        if not rows:
            raise ValueError(f"{self.file}: no samples in it")
        self.samples = [self._sample(row, number) for number, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index % len(self.samples)]

    def picture(self, key: str) -> Image.Image:
        return load_image(self.folder / key)

    def keys(self) -> Sequence[str]:
        return list(dict.fromkeys(key for sample in self.samples for key in sample.images))

    def _sample(self, row: Any, number: int) -> Sample:
        where = f"{self.file}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a mapping, found {type(row).__name__}")
        name = str(row.get("id", number))
        where = f"{where} (id {name})"
        images = row.get("images", row.get("image", []))
        images = [images] if isinstance(images, str) else list(images or [])
        wrong = [image for image in images if not isinstance(image, str)]
        if wrong:
            raise ValueError(f"{where}, field 'images': expected paths, found {type(wrong[0]).__name__}")
        if "conversations" in row:
            turns = [(turn.get("from"), turn.get("value")) for turn in row["conversations"]]
            field = "conversations"
        elif "messages" in row:
            turns = [(turn.get("role"), turn.get("content")) for turn in row["messages"]]
            field = "messages"
        else:
            raise ValueError(f"{where}: expected 'conversations' (LLaVA) or 'messages', found the fields {sorted(row)}")
        messages = [_message(role, content, f"{where}, field '{field}'") for role, content in turns]
        _check(messages, images, where)
        return Sample(name, messages, tuple(images))


def _read_rows(file: Path) -> list[Any]:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a list of samples, found {type(rows).__name__}")
    return rows


def _message(role: Any, content: Any, where: str) -> dict[str, Any]:
    if role not in _ROLES:
        raise ValueError(f"{where}: unknown speaker {role!r}; expected one of {sorted(_ROLES)}")
    role = _ROLES[role]
    if isinstance(content, list):
        parts = [dict(part) for part in content]
    elif isinstance(content, str):
        parts = []
        for place, text in enumerate(content.split(IMAGE_TAG)):
            if place:
                parts.append({"type": "image"})
            if text.strip("\n"):
                parts.append({"type": "text", "text": text.strip("\n")})
    else:
        raise ValueError(f"{where}: the {role}'s turn has no text, found {content!r}")
    if role == "assistant" and not any(part.get("text", "").strip() for part in parts):
        raise ValueError(f"{where}: an answer of the assistant is empty")
    return {"role": role, "content": parts}


def _check(messages: list[dict[str, Any]], images: list[str], where: str) -> None:
    asked = [message["role"] for message in messages if message["role"] != "system"]
    if not asked or asked[-1] != "assistant":
        raise ValueError(f"{where}: the last turn must be an answer of the assistant, found {asked or 'no turns'}")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places == 0 and images:  # as LLaVA does: a picture that no turn mentions stands before the first question
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"}] * len(images)
    elif places != len(images):
        raise ValueError(f"{where}: the text has {places} {IMAGE_TAG}, but there are {len(images)} images: {images}")


def open_source(data: SceneData | ConversationData, length: int, image_size: int, offset: int = 0) -> Source:
    """The training source of a stage: ``length`` conversations, behind the ``offset`` of earlier stages."""
    if isinstance(data, SceneData):
        return SceneSource(data, length, image_size=image_size, offset=offset)
    return ConversationSource(data)
