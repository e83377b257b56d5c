"""Sources of conversations about images: all have a length, random access, and images by key."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from sparsight.data.cells import find_file, no_such_file
from sparsight.data.conversations import (
    FIELDS,
    IMAGE_TAG,
    METADATA,
    Find,
    Sample,
    has_conversation,
    read_row,
    unused_fields,
)
from sparsight.data.images import load_image, size_of_image
from sparsight.data.mixture import Quotas
from sparsight.data.rows import decode, open_rows, parse
from sparsight.data.shards import IMAGES, Shard, open_shards, stem
from sparsight.errors import UserError
from sparsight.scenes.questions import ScenesDataset
from sparsight.scenes.world import SceneConfig
from sparsight.settings.data import ConversationData, Data, MixtureData, SceneData


class Source(Protocol):
    """What training needs of data."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def image(self, key: Any) -> Image.Image: ...

    def size(self, key: Any) -> tuple[int, int]:
        """A image's sides, without decoding it."""
        ...

    def fingerprint(self, key: Any) -> str:
        """Equal for images that are the same, and for those alone."""
        ...

    def keys(self) -> Sequence[Hashable]:
        """Every image's key, once."""
        ...


class SceneSource:
    """The embedded scenes as a source of ``length`` conversations about ``data.scenes`` images;
    a image that comes again has other questions."""

    def __init__(self, data: SceneData, length: int, split: str = "train", image_size: int = 256) -> None:
        self.config = scene_config(data, image_size)
        self.scenes = ScenesDataset(self.config, split, data.scenes, seed=data.seed, tasks=data.tasks)
        self.length = length
        self.split = split
        self.images = data.scenes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"scenes/{self.split}/{index}", self.scenes.messages(index), (index % self.images,))

    def image(self, key: int) -> Image.Image:
        return self.scenes.image(key)

    def size(self, key: int) -> tuple[int, int]:
        return self.config.image_size, self.config.image_size

    def fingerprint(self, key: int) -> str:
        return f"{self.config} {self.split} {self.scenes.seed} {key}"  # they are drawn from these alone

    def keys(self) -> Sequence[int]:
        return range(self.images)


def scene_config(data: SceneData, image_size: int = 256) -> SceneConfig:
    """The generator's settings from the recipe's."""
    values = data.model_dump(exclude={"kind", "scenes", "tasks", "seed"})
    return SceneConfig(**values, image_size=image_size)


class RowSource:
    """Rows with one conversation each, read when they are asked for. Keys of their images are paths inside the image
    folder, or (row, number among its images) where the row holds the image itself.

    Raises:
        UserError: a row is not as expected; the message names the file, the row, the field, what was found and what
            was expected.
    """

    def __init__(self, data: ConversationData) -> None:
        self.path = Path(data.path)
        own = self.path if self.path.is_dir() else self.path.parent
        self.folder = Path(data.images) if data.images else own

    def __len__(self) -> int:
        raise NotImplementedError

    def _row(self, number: int) -> Any:
        raise NotImplementedError

    def _read(self, number: int, find: Find) -> Sample:
        return read_row(self._row(number), str(number), f"{self.path}, row {number}", find)

    def __getitem__(self, number: int) -> Sample:
        return self._read(number, lambda images, where: _keys(number, images))

    def content(self, key: Any) -> tuple[bytes, str]:
        """An image's file, and what messages call it."""
        if not isinstance(key, str):
            number, place = key
            images = self._read(number, lambda images, where: images or []).images
            return images[place], f"{self.path}, row {number}, image {place}"
        path = find_file(self.folder, key)
        try:
            return path.read_bytes(), str(path)
        except FileNotFoundError:
            raise UserError(no_such_file(path)) from None
        except OSError as error:
            raise UserError(f"{no_such_file(path)} that can be read: {error.strerror}") from None

    def image(self, key: Any) -> Image.Image:
        return load_image(*self.content(key))

    def size(self, key: Any) -> tuple[int, int]:
        return size_of_image(find_file(self.folder, key)) if isinstance(key, str) else size_of_image(*self.content(key))

    def fingerprint(self, key: Any) -> str:
        return hashlib.sha256(self.content(key)[0]).hexdigest()

    def keys(self) -> Sequence[Hashable]:
        return list(dict.fromkeys(key for number in range(len(self)) for key in self[number].images))


def _keys(number: int, images: list[str | bytes] | None) -> list[Any]:
    return [image if isinstance(image, str) else (number, place) for place, image in enumerate(images or [])]


class ConversationSource(RowSource):
    """Conversations in any of the forms of `conversations`, from a .json list or .jsonl lines, or these with .gz.

    Args:
        strict: a bad row or a missing image is an error at once, and not only when it is asked for; a warning names
            the fields that training does not use.

    Raises:
        UserError: the file or a row is not as expected, or an image is not there.
    """

    def __init__(self, data: ConversationData, strict: bool = True) -> None:
        super().__init__(data)
        self.rows = open_rows(self.path)
        if not self.rows:
            raise UserError(f"{self.path}: no samples in it")
        if strict:
            self._look()

    def __len__(self) -> int:
        return len(self.rows)

    def _row(self, number: int) -> Any:
        return self.rows[number]

    def _look(self) -> None:
        """Tell before training, not hours into it, that an image is not there, or a field not used."""
        first: dict[str, str] = {}
        unused = Counter[str]()

        def find(images: list[str | bytes] | None, where: str) -> Sequence[Any]:
            first.update({image: where for image in images or [] if isinstance(image, str) and image not in first})
            return images or []

        for number in range(len(self)):
            unused.update(self._read(number, find).unused)
        missing = [path for path in first if not os.path.isfile(find_file(self.folder, path))]
        if missing:
            raise UserError(
                f"{first[missing[0]]}: {no_such_file(self.folder / missing[0])}"
                f" ({len(missing)} of {len(first)} images are missing)"
            )
        if unused:
            warnings.warn(unused_fields(self.path, unused, len(self)), stacklevel=3)


class TableSource(RowSource):
    """Parquet files, or a Dataset saved on disk: columns as the fields of JSON; images are paths, bytes, or both.

    Args:
        strict: a warning names the columns that training does not use.

    Raises:
        UserError: the tables cannot be read, are empty, or lack a column; the package datasets is not installed.
    """

    def __init__(self, data: ConversationData, strict: bool = True) -> None:
        super().__init__(data)
        table = _open_table(data)
        columns = table.column_names
        if not has_conversation(columns):
            raise UserError(
                f"{self.path}: expected a column 'conversations' (LLaVA) or 'messages', found the columns {columns}"
            )
        self.unused = tuple(name for name in columns if name not in FIELDS | METADATA)
        if strict and self.unused:
            warnings.warn(unused_fields(self.path, dict.fromkeys(self.unused, len(table)), len(table)), stacklevel=2)
        used = [name for name in columns if name in FIELDS]
        self.table = table.select_columns(used).with_format("arrow")  # as stored: images are not decoded

    def __len__(self) -> int:
        return len(self.table)

    def _row(self, number: int) -> Any:
        return self.table[number].to_pylist()[0]

    def __getitem__(self, number: int) -> Sample:
        sample = super().__getitem__(number)
        return replace(sample, unused=sample.unused + self.unused)


def _open_table(data: ConversationData) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data of kind '{data.kind}' need the package datasets, which is not installed: "
            "pip install 'sparsight[data]'"
        ) from None
    try:
        if data.kind == "parquet":
            files = [str(file) for file in _files(data.path, "*.parquet")]
            return datasets.load_dataset("parquet", data_files=files, split="train")
        table = datasets.load_from_disk(data.path)
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:  # also if it is empty
        raise UserError(f"{data.path}: cannot be read as {data.kind}: {error.__cause__ or error}") from None
    if isinstance(table, datasets.DatasetDict):
        raise UserError(f"{data.path}: expected one Dataset, found the splits {sorted(table)}; give the folder of one")
    return table


def _files(path: str, pattern: str) -> list[Path]:
    """A file, those of a folder that fit ``pattern``, or those that fit ``path``; sorted."""
    found = sorted(Path(path).glob(pattern)) if Path(path).is_dir() else [Path(f) for f in sorted(glob.glob(path))]
    if not found:
        raise UserError(
            f"{path}: found no files; expected a file, a folder of {pattern}, or a pattern such as a/{pattern}"
        )
    return found


class ShardSource(RowSource):
    """WebDataset tar shards: members with the same stem are one sample. Its .json is a row as in a .json file; without
    one, its .txt is a caption. Images are those that the row names, or in the order KEY.0.jpg, KEY.1.jpg.

    Raises:
        UserError: a tar is damaged or its index cannot be written (`shards.open_shards`).
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
            raise UserError(f"{where}: expected members of different names, found {[member for member, _ in found]}")
        stored = sorted((m for m in members if _kind(m) in IMAGES), key=_number_and_name)

        def find(images: list[str | bytes] | None, where: str) -> list[Any]:
            return [(part, members[image]) for image in _named(images, stored, where)]

        return read_row(_shard_row(shard, members, len(stored), where), name, where, find)

    def content(self, key: tuple[int, int]) -> tuple[bytes, str]:
        part, member = key
        return self.shards[part].read(member), self.shards[part].where(member)


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _number_and_name(name: str) -> tuple[int, str]:
    number = re.search(r"\.(\d+)\.[^./]+$", name)
    return int(number[1]) if number else -1, name


def _shard_row(shard: Shard, members: dict[str, int], stored: int, where: str) -> Any:
    """The sample's row: a .json with a conversation, or else the .txt; a .json beside it may hold other things."""
    captions = [place for name, place in members.items() if _kind(name) == ".txt"]
    row, found = None, []
    for name, place in members.items():
        if _kind(name) == ".json":
            row = parse(shard.read(place), shard.where(place))
            if isinstance(row, dict) and has_conversation(row):
                found.append(row)
    if len(found) > 1:
        raise UserError(
            f"{where}: {len(found)} members .json hold conversations; what stands before the first dot of a name tells "
            "samples apart, and these have the same"
        )
    if found:
        return found[0]
    if not captions:
        return row
    if len(captions) > 1 or not stored:
        raise UserError(f"{where}: expected one .txt and images beside it, found {list(members)}")
    caption = decode(shard.read(captions[0]), shard.where(captions[0]))
    turns = [("user", IMAGE_TAG * stored), ("assistant", caption.strip())]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _named(images: list[str | bytes] | None, stored: list[str], where: str) -> list[str]:
    """The members that a row names; all in their order if it names no images, or none of these."""
    if images is None:
        return stored
    known = {os.path.basename(image): image for image in stored} | {image: image for image in stored}
    names = [name.replace("\\", "/") if isinstance(name, str) else f"{len(name)} bytes" for name in images]
    found = [known.get(name) or known.get(os.path.basename(name)) for name in names]
    if not any(found) and len(names) == len(stored):
        return stored
    if not all(found):
        raise UserError(f"{where}: expected members of the sample, which are {stored}, found {names}")
    return [name for name in found if name]


class MixtureSource:
    """``length`` conversations of sources mixed by weight: sample i comes from a part as `Quotas` says, each part's own
    in order, again from its start when it ends.

    Raises:
        UserError: a part cannot be opened, or the weights do not fit a table.
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
        return replace(sample, id=f"{self.names[part]}/{sample.id}", images=tuple((part, key) for key in sample.images))

    def image(self, key: tuple[int, Any]) -> Image.Image:
        return self.parts[key[0]].image(key[1])

    def size(self, key: tuple[int, Any]) -> tuple[int, int]:
        return self.parts[key[0]].size(key[1])

    def fingerprint(self, key: tuple[int, Any]) -> str:
        return self.parts[key[0]].fingerprint(key[1])

    def keys(self) -> Sequence[Hashable]:
        return [(number, key) for number in range(len(self.parts)) for key in self.parts[number].keys()]  # noqa: SIM118


def open_source(data: Data, length: int, image_size: int, strict: bool = True) -> Source:
    """The training source of a run's first ``length`` conversations.

    Args:
        length: conversations that scenes or a mixture give; other sources have the length of their files.
        strict: what can be found wrong without reading images is an error at once, where that takes no long.
    """
    if isinstance(data, SceneData):
        return SceneSource(data, length, image_size=image_size)
    if isinstance(data, MixtureData):
        return MixtureSource(data, length, image_size, strict)
    if data.kind == "shards":
        return ShardSource(data)
    return (ConversationSource if data.kind == "json" else TableSource)(data, strict)
