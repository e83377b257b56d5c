"""Sources of conversations about pictures: all have a length, random access, and pictures by key."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from sparsight.config import ConversationData, Data, MixtureData, SceneData
from sparsight.data.images import load_image, picture_size
from sparsight.data.mixture import Quotas
from sparsight.data.scenes import SceneConfig, ScenesDataset
from sparsight.data.shards import PICTURES, File, Shard, open_shards, stem

IMAGE_TAG = "<image>"
_LIST_START = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(\][ \t\n\r]*\Z)?")
_ITEM_END = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|(\][ \t\n\r]*\Z))")
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

    def size(self, key: Any) -> tuple[int, int]:
        """A picture's sides, without decoding it."""
        ...

    def fingerprint(self, key: Any) -> str:
        """Equal for pictures that are the same, and for those alone."""
        ...

    def keys(self) -> Sequence[Hashable]:
        """Every picture's key, once."""
        ...


class SceneSource:
    """The embedded scenes as a source of ``length`` conversations about ``data.scenes`` pictures;
    a picture that comes again has other questions."""

    def __init__(self, data: SceneData, length: int, split: str = "train", image_size: int = 256) -> None:
        self.config = scene_config(data, image_size)
        repeats = max(1, -(-length // data.scenes))
        self.scenes = ScenesDataset(
            self.config, split, scenes=data.scenes, repeats=repeats, seed=data.seed, tasks=data.tasks, draw=False
        )
        self.length = length
        self.split = split
        self.pictures = data.scenes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"scenes/{self.split}/{index}", self.scenes.messages(index), (index % self.pictures,))

    def picture(self, key: int) -> Image.Image:
        return self.scenes.image(key)

    def size(self, key: int) -> tuple[int, int]:
        return self.config.image_size, self.config.image_size

    def fingerprint(self, key: int) -> str:
        return f"{self.config} {self.split} {self.scenes.seed} {key}"  # they are drawn from these alone

    def keys(self) -> Sequence[int]:
        return range(self.pictures)


def scene_config(data: SceneData, image_size: int = 256) -> SceneConfig:
    """The generator's settings from the recipe's."""
    values = data.model_dump(exclude={"kind", "scenes", "tasks", "seed"})
    return SceneConfig(**values, image_size=image_size)


class RowSource:
    """Rows with one conversation each, read when they are asked for.

    Raises:
        ValueError: a row is not as expected; the message names the file, the row, the field, what was found and what
            was expected.
    """

    def __init__(self, data: ConversationData) -> None:
        self.path = Path(data.path)
        own = self.path if self.path.is_dir() else self.path.parent
        self.folder = Path(data.images) if data.images else own

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, row: int) -> Sample:
        raise NotImplementedError

    def content(self, key: Any) -> tuple[bytes, str]:
        """A picture's file, and what messages call it."""
        path = self.folder / key
        try:
            return path.read_bytes(), str(path)
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no such file") from None

    def picture(self, key: Any) -> Image.Image:
        return load_image(*self.content(key))

    def size(self, key: Any) -> tuple[int, int]:
        return picture_size(self.folder / key) if isinstance(key, str) else picture_size(*self.content(key))

    def fingerprint(self, key: Any) -> str:
        return hashlib.sha256(self.content(key)[0]).hexdigest()

    def keys(self) -> Sequence[Hashable]:
        return list(dict.fromkeys(key for number in range(len(self)) for key in self[number].images))


class ConversationSource(RowSource):
    """LLaVA JSON or ``messages`` + ``images``, from a .json list or .jsonl lines.

    Args:
        strict: a bad row or a missing picture is an error at once, and not only when it is asked for.

    Raises:
        ValueError: the file or a row is not as expected, or a picture is not there.
    """

    def __init__(self, data: ConversationData, strict: bool = True) -> None:
        super().__init__(data)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: there is no such file")
        self.rows = (_Lines if self.path.suffix == ".jsonl" else _List)(self.path)
        if not self.rows:
            raise ValueError(f"{self.path}: no samples in it")
        if strict:
            self._find_pictures()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Sample:
        return _read_row(self.rows[number], str(number), f"{self.path}, row {number}")

    def _find_pictures(self) -> None:
        """Tell before training, not hours into it, that a picture is not there."""
        first: dict[str, tuple[int, str]] = {}
        for number in range(len(self)):
            sample = self[number]
            for key in sample.images:
                first.setdefault(key, (number, sample.id))
        missing = sorted((place, key) for key, place in first.items() if not (self.folder / key).is_file())
        if missing:
            (number, name), key = missing[0]
            raise ValueError(
                f"{self.path}, row {number} (id {name}), field 'images': {self.folder / key}: there is no such file"
                f" ({len(missing)} of {len(first)} pictures are missing)"
            )


class TableSource(RowSource):
    """Parquet files, or a Dataset saved on disk: columns as the fields of JSON; pictures are paths, bytes, or both.

    Raises:
        ValueError: the tables cannot be read, are empty, or lack a column; the package datasets is not installed.
    """

    def __init__(self, data: ConversationData) -> None:
        super().__init__(data)
        table = _open_table(data)
        columns = table.column_names
        if not {"conversations", "messages"} & set(columns):
            raise ValueError(
                f"{self.path}: expected a column 'conversations' (LLaVA) or 'messages', found the columns {columns}"
            )
        used = [name for name in columns if name in ("id", "conversations", "messages", "image", "images")]
        self.table = table.select_columns(used).with_format("arrow")  # as stored: pictures are not decoded

    def __len__(self) -> int:
        return len(self.table)

    def _row(self, number: int) -> dict[str, Any]:
        return {key: value for key, value in self.table[number].to_pylist()[0].items() if value is not None}

    def __getitem__(self, number: int) -> Sample:
        def find(value: Any, where: str) -> list[Any]:
            cells = enumerate(_as_list(value))
            return [(number, place) if _content(cell) else _image_paths(_path(cell), where)[0] for place, cell in cells]

        return _read_row(self._row(number), str(number), f"{self.path}, row {number}", find)

    def content(self, key: str | tuple[int, int]) -> tuple[bytes, str]:
        if isinstance(key, str):
            return super().content(key)
        number, place = key
        row = self._row(number)
        cell = _as_list(_image_field(row))[place]
        return _content(cell) or b"", f"{self.path}, row {number}, picture {place}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _content(cell: Any) -> bytes | None:
    """A picture's bytes, if the table itself holds them."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _path(cell: Any) -> Any:
    return [cell.get("path") if isinstance(cell, dict) else cell]


def _open_table(data: ConversationData) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data of kind '{data.kind}' need the package datasets, which is not installed: "
            "pip install 'sparsight[data]'"
        ) from None
    try:
        if data.kind == "parquet":
            files = [str(file) for file in _files(data.path, "*.parquet")]
            return datasets.load_dataset("parquet", data_files=files, split="train")
        table = datasets.load_from_disk(data.path)
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:  # also if it is empty
        raise ValueError(f"{data.path}: cannot be read as {data.kind}: {error.__cause__ or error}") from None
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(f"{data.path}: expected one Dataset, found the splits {sorted(table)}; give the folder of one")
    return table


def _files(path: str, pattern: str) -> list[Path]:
    """A file, those of a folder that fit ``pattern``, or those that fit ``path``; sorted."""
    found = sorted(Path(path).glob(pattern)) if Path(path).is_dir() else [Path(f) for f in sorted(glob.glob(path))]
    if not found:
        raise ValueError(
            f"{path}: found no files; expected a file, a folder of {pattern}, or a pattern such as a/{pattern}"
        )
    return found


class ShardSource(RowSource):
    """WebDataset tar shards: members with the same stem are one sample. Its .json is a row as in a .json file; without
    one, its .txt is a caption. Pictures are those that the row names, or in the order KEY.0.jpg, KEY.1.jpg.

    Raises:
        ValueError: a tar is damaged or its index cannot be written (`shards.open_shards`).
    """

    def __init__(self, data: ConversationData) -> None:
        super().__init__(data)
        self.shards = open_shards(_files(data.path, "*.tar"), Path(data.index_folder) if data.index_folder else None)
        self.ends = list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, number: int) -> Sample:
        part = bisect_right(self.ends, number)
        shard = self.shards[part]
        found = shard.sample(number - self.ends[part] + len(shard))
        members, name = dict(found), stem(found[0][0])
        where = f"{shard.file.path}, sample '{name}'"
        if len(members) < len(found):
            raise ValueError(f"{where}: expected members of different names, found {[member for member, _ in found]}")
        pictures = sorted((m for m in members if _kind(m) in PICTURES), key=_number_and_name)

        def find(value: Any, where: str) -> list[Any]:
            return [(part, members[picture]) for picture in _named(value, pictures, where)]

        return _read_row(_shard_row(shard, members, len(pictures), where), name, where, find)

    def content(self, key: tuple[int, int]) -> tuple[bytes, str]:
        part, member = key
        return self.shards[part].read(member), self.shards[part].where(member)


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _number_and_name(name: str) -> tuple[int, str]:
    number = re.search(r"\.(\d+)\.[^./]+$", name)
    return int(number[1]) if number else -1, name


def _shard_row(shard: Shard, members: dict[str, int], pictures: int, where: str) -> Any:
    """The sample's row: a .json with a conversation, or else the .txt; a .json beside it may hold other things."""
    captions = [place for name, place in members.items() if _kind(name) == ".txt"]
    row, found = None, []
    for name, place in members.items():
        if _kind(name) == ".json":
            row = _parse(shard.read(place), shard.where(place))
            if isinstance(row, dict) and not row.keys().isdisjoint(("conversations", "messages")):
                found.append(row)
    if len(found) > 1:
        raise ValueError(
            f"{where}: {len(found)} members .json hold conversations; what stands before the first dot of a name tells "
            "samples apart, and these have the same"
        )
    if found:
        return found[0]
    if not captions:
        return row
    if len(captions) > 1 or not pictures:
        raise ValueError(f"{where}: expected one .txt and pictures beside it, found {list(members)}")
    caption = _decode(shard.read(captions[0]), shard.where(captions[0]))
    turns = [("user", IMAGE_TAG * pictures), ("assistant", caption.strip())]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _named(value: Any, pictures: list[str], where: str) -> list[str]:
    """The members that an image field names; all in their order if there is no field, or it names none of them."""
    names = _image_names(value, where)
    known = {os.path.basename(picture): picture for picture in pictures} | {picture: picture for picture in pictures}
    found = [known.get(name) or known.get(os.path.basename(name)) for name in names]
    if value is None or (not any(found) and len(names) == len(pictures)):
        return pictures
    if not all(found):
        raise ValueError(f"{where}: expected members of the sample, which are {pictures}, found {names}")
    return [name for name in found if name]


class MixtureSource:
    """``length`` conversations of sources mixed by weight: sample i comes from a part as `Quotas` says, each part's own
    in order, again from its start when it ends.

    Raises:
        ValueError: a part cannot be opened, or the weights do not fit a table.
    """

    def __init__(self, data: MixtureData, length: int, image_size: int = 256, strict: bool = True) -> None:
        self.quotas = Quotas([part.weight for part in data.parts])
        self.length = length
        self.names = [part.name or str(number) for number, part in enumerate(data.parts)]
        counts = self.quotas.counts(length)
        self.parts = [
            open_source(part.data, max(1, count), image_size, strict)
            for part, count in zip(data.parts, counts, strict=True)
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        part, rank = self.quotas.place(index)
        sample = self.parts[part][rank % len(self.parts[part])]
        return Sample(f"{self.names[part]}/{sample.id}", sample.messages, tuple((part, key) for key in sample.images))

    def picture(self, key: tuple[int, Any]) -> Image.Image:
        return self.parts[key[0]].picture(key[1])

    def size(self, key: tuple[int, Any]) -> tuple[int, int]:
        return self.parts[key[0]].size(key[1])

    def fingerprint(self, key: tuple[int, Any]) -> str:
        return self.parts[key[0]].fingerprint(key[1])

    def keys(self) -> Sequence[Hashable]:
        return [(number, key) for number in range(len(self.parts)) for key in self.parts[number].keys()]  # noqa: SIM118


def _read_row(row: Any, name: str, where: str, find: Callable[[Any, str], Sequence[Any]] | None = None) -> Sample:
    """One conversation from its row.

    Args:
        name: the sample's id if the row has none.
        where: the row, for messages.
        find: keys of the pictures from the row's image field; paths inside the image folder if not given.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a mapping, found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}  # as a table writes what is not there
    name = str(row.get("id", name))
    where = f"{where} (id {name})"
    images = (find or _image_paths)(_image_field(row), f"{where}, field 'images'")
    if "conversations" in row:
        field, speaker, text = "conversations", "from", "value"
    elif "messages" in row:
        field, speaker, text = "messages", "role", "content"
    else:
        raise ValueError(f"{where}: expected 'conversations' (LLaVA) or 'messages', found the fields {sorted(row)}")
    where, turns = f"{where}, field '{field}'", row[field]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: expected a list of turns, each with '{speaker}' and '{text}', found {turns!r:.80}")
    messages = [_message(turn.get(speaker), turn.get(text), where) for turn in turns]
    _check(messages, images, where)
    return Sample(name, messages, tuple(images))


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors write a mark before the first character
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected text in UTF-8: {error}") from None


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(content, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


class _Rows:
    """Rows of a file, read when they are asked for; only their places are kept: number, offset and size in bytes.

    As objects they would be many times as large, and copied into every process that loads data: to read an object
    is to write its reference count.
    """

    unit = "row"

    def __init__(self, path: Path) -> None:
        self.file, self.places = File(path), array("q")

    def __len__(self) -> int:
        return len(self.places) // 3

    def __getitem__(self, row: int) -> Any:
        if row >= len(self):
            raise IndexError(row)
        number, offset, size = self.places[3 * row : 3 * row + 3]
        return _parse(self.file.read(offset, size), f"{self.file.path}, {self.unit} {number}")


class _Lines(_Rows):
    """Rows of a .jsonl file, by their lines. Blank lines are none."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        offset = 0
        with path.open("rb") as file:  # its lines end at newlines alone, not at U+2028 as those of text do
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.places.extend((number, offset, len(line)))
                offset += len(line)


class _List(_Rows):
    """Rows of a .json file that holds a list of them.

    Raises:
        ValueError: it holds no list, or no JSON.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        content = path.read_bytes()
        text = _decode(content, str(path))
        offset, passed = len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8), 0
        try:
            for number, (start, end) in enumerate(_items(text)):
                offset, size = offset + len(text[passed:start].encode()), len(text[start:end].encode())
                self.places.extend((number, offset, size))
                offset, passed = offset + size, end
        except (ValueError, RecursionError):
            rows = _parse(content, str(path))  # what is wrong is told of the file as a whole
            raise ValueError(f"{path}: expected a list of samples, found {type(rows).__name__}") from None


def _items(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each item of a JSON list, one parsed at a time. Raises ValueError if the text is none."""
    read, found = json.JSONDecoder().raw_decode, _LIST_START.match(text)
    if not found:
        raise ValueError("no list")
    while not found[1]:  # which is the end of the list
        start = found.end()
        end = read(text, start)[1]
        found = _ITEM_END.match(text, end)
        if not found:
            raise ValueError("neither another item nor the end")
        yield start, end


def _image_field(row: dict[str, Any]) -> Any:
    """``images``, or ``image`` where that is empty: tables have both columns."""
    return row.get("images") or row.get("image", row.get("images"))


def _image_names(value: Any, where: str) -> list[str]:
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list):
        raise ValueError(f"{where}: expected a path or a list of paths, found {type(value).__name__}")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: expected paths, found {type(name).__name__}")
    return names


def _image_paths(value: Any, where: str) -> list[str]:
    """Paths of a row's pictures; none may lead out of the image folder. Links in that folder are the user's own and
    are followed; a path comes from whoever wrote the data."""
    paths = _image_names(value, where)
    for path in paths:
        if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise ValueError(f"{where}: expected a path inside the image folder, found '{path}'")
    return paths


def _message(role: Any, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where}: unknown speaker {role!r}; expected one of {sorted(_ROLES)}")
    role = _ROLES[role]
    if isinstance(content, str):
        content = [{"type": "text", "text": content.replace("\r\n", "\n").strip("\n")}]
    if not isinstance(content, list):
        raise ValueError(f"{where}: the {role}'s turn has no text, found {content!r}")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(text, str):
            if half := re.search("[\ud800-\udfff]", text):
                raise ValueError(f"{where}: the {role}'s turn holds half of a character, {half[0]!a}: {text!a:.80}")
            parts += _split_at_images(text.replace("\r\n", "\n"))
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


def _check(messages: list[dict[str, Any]], images: Sequence[Any], where: str) -> None:
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


def open_source(data: Data, length: int, image_size: int, strict: bool = True) -> Source:
    """The training source of a run's first ``length`` conversations.

    Args:
        length: conversations that scenes or a mixture give; other sources have the length of their files.
        strict: what can be found wrong without reading pictures is an error at once, where that takes no long.
    """
    if isinstance(data, SceneData):
        return SceneSource(data, length, image_size=image_size)
    if isinstance(data, MixtureData):
        return MixtureSource(data, length, image_size, strict)
    if data.kind == "json":
        return ConversationSource(data, strict)
    return (ShardSource if data.kind == "shards" else TableSource)(data)
