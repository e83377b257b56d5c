"""Sources of conversations about images: all have a length, random access, and images by key."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from sparsight.data.cells import find_file
from sparsight.data.conversations import (
    FIELDS,
    IMAGE_TAG,
    METADATA,
    Sample,
    has_conversation,
    read_row,
    unused_fields,
)
from sparsight.data.images import load_image, size_of_image
from sparsight.data.mixture import Quotas
from sparsight.data.rows import Rows, decode, parse
from sparsight.data.shards import IMAGES, Shard, open_shards, stem
from sparsight.data.videos import Frame, library, load_frame, size_of_video
from sparsight.errors import UserError
from sparsight.scenes.questions import ScenesDataset
from sparsight.scenes.world import SceneConfig
from sparsight.settings.data import ConversationData, Data, MixtureData, SceneData


class Source(Protocol):
    """Conversations by number, and their images by key."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def image(self, key: Any) -> Image.Image: ...

    def size(self, key: Any) -> tuple[int, int]: ...  # width and height, without decoding the image

    def fingerprints(self) -> dict[Hashable, str]: ...  # of all images by key; equal for images that are the same


class SceneSource:
    """The embedded scenes as a source of ``length`` conversations about ``data.scenes`` images;
    an image that comes again has other questions."""

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

    def fingerprints(self) -> dict[Hashable, str]:  # images are drawn from these alone
        return {key: f"{self.config} {self.split} {self.scenes.seed} {key}" for key in range(self.images)}


def scene_config(data: SceneData, image_size: int = 256) -> SceneConfig:
    """The generator's settings from the recipe's."""
    values = data.model_dump(exclude={"kind", "scenes", "tasks", "seed"})
    return SceneConfig(**values, image_size=image_size)


class RowSource:
    """Rows with one conversation each, read when they are asked for. Keys of their images are paths inside the image
    folder, frames of a video there, or (row, number among its images) where the row holds the image itself.

    Raises:
        UserError: a row is not as expected; the message names the file, the row, the field, what was found and what
            was expected.
    """

    def __init__(self, data: ConversationData, rows: Any = ()) -> None:
        self.path, self.rows, self.frames = Path(data.path), rows, data.video_frames
        own = self.path if self.path.is_dir() else self.path.parent
        self.folder = Path(data.images) if data.images else own

    def __len__(self) -> int:
        return len(self.rows)

    def _row(self, number: int) -> Any:
        return self.rows[number]

    def _read(self, number: int) -> Sample:
        return read_row(self._row(number), str(number), f"{self.path}, row {number}", frames=self.frames)

    def __getitem__(self, number: int) -> Sample:
        sample = self._read(number)
        keys = (image if _path(image) else (number, nth) for nth, image in enumerate(sample.images))
        return replace(sample, images=tuple(keys))

    def stored(self, key: Any) -> tuple[Path | bytes, str, Frame | None]:
        """The file or the content of an image, or of the video that it is a frame of; its name in messages."""
        image, name = key, ""
        if not isinstance(key, str | Frame):
            number, nth = key
            image, name = self._read(number).images[nth], f"{self.path}, row {number}, image {nth}"
        frame = image if isinstance(image, Frame) else None
        if path := _path(image):
            found = find_file(self.folder, path)
            return found, str(found), frame
        return frame.video if frame else image, name, frame  # type: ignore[return-value]

    def image(self, key: Any) -> Image.Image:
        source, name, frame = self.stored(key)
        return load_frame(source, name, frame) if frame else load_image(source, name)

    def size(self, key: Any) -> tuple[int, int]:
        source, name, frame = self.stored(key)
        return (size_of_video if frame else size_of_image)(source, name)

    def fingerprints(self) -> dict[Hashable, str]:
        @lru_cache(maxsize=1)  # frames of a video come one after the other
        def digest(source: Path | bytes) -> str:
            return hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).hexdigest()

        keys = dict.fromkeys(key for number in range(len(self)) for key in self[number].images)
        stored = ((key, self.stored(key)) for key in keys)
        return {
            key: digest(source) + (f" {frame.number} of {frame.count}" if frame else "")
            for key, (source, _, frame) in stored
        }


def _path(image: Any) -> str | None:
    """The path of an image, or of the video that it is a frame of; None for bytes."""
    named = image.video if isinstance(image, Frame) else image
    return named if isinstance(named, str) else None


class ConversationSource(RowSource):
    """Conversations in any of the forms of `conversations`, from a .json list or .jsonl lines, or these with .gz.

    Args:
        strict: a bad row or a missing image is an error at once, and not only when it is asked for; a warning names
            the fields that training does not use.

    Raises:
        UserError: the file or a row is not as expected, or an image is not there.
    """

    def __init__(self, data: ConversationData, strict: bool = True) -> None:
        super().__init__(data, Rows(Path(data.path)))
        if not self.rows:
            raise UserError(f"{self.path}: no samples in it")
        if strict:
            self._look()

    def _look(self) -> None:
        first: dict[str, str] = {}
        unused = Counter[str]()
        for number in range(len(self)):
            sample = self._read(number)
            unused.update(sample.unused)
            for image in sample.images:
                if isinstance(image, Frame):
                    library(f"{self.path}, row {number} (id {sample.id})")
                if path := _path(image):
                    first.setdefault(path, f"row {number} (id {sample.id})")
        missing = [path for path in first if not os.path.isfile(find_file(self.folder, path))]
        if missing:
            raise UserError(
                f"{self.path}, {first[missing[0]]}: {self.folder}/{missing[0]:.200}: there is no such file "
                f"({len(missing)} of {len(first)} files are missing)"
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
        table = _open_table(data)
        columns = table.column_names
        used = [name for name in columns if name in FIELDS]
        super().__init__(data, table.select_columns(used).with_format("arrow"))  # as stored: images are not decoded
        if not has_conversation(columns):
            raise UserError(
                f"{self.path}: expected a column 'conversations' (LLaVA) or 'messages', found the columns {columns}"
            )
        self.unused = tuple(name for name in columns if name not in FIELDS | METADATA)
        if strict and self.unused:
            warnings.warn(unused_fields(self.path, dict.fromkeys(self.unused, len(table)), len(table)), stacklevel=2)

    def _row(self, number: int) -> Any:
        return self.rows[number].to_pylist()[0]

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
    """A file, the files of a folder that fit ``pattern``, or those that fit ``path``; sorted."""
    found = sorted(Path(path).glob(pattern)) if Path(path).is_dir() else [Path(f) for f in sorted(glob.glob(path))]
    if not found:
        raise UserError(
            f"{path}: found no files; expected a file, a folder of {pattern}, or a pattern such as a/{pattern}"
        )
    return found


class ShardSource(RowSource):
    """WebDataset tar shards: members with the same stem are one sample. Its .json is a row as in a .json file; without
    one, its .txt is a caption. Images are those that the row names, or in the order KEY.0.jpg, KEY.1.jpg. Keys of
    images are (shard, member).

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
        images = sorted((member for member in members if _kind(member) in IMAGES), key=_number_and_name)
        sample = read_row(_shard_row(shard, members, len(images), where), name, where, images)
        return replace(sample, images=tuple((part, members[image]) for image in sample.images))

    def stored(self, key: tuple[int, int]) -> tuple[bytes, str, None]:
        part, member = key
        return self.shards[part].read(member), self.shards[part].where(member), None


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _number_and_name(name: str) -> tuple[int, str]:
    number = re.search(r"\.(\d+)\.[^./]+$", name)
    return int(number[1]) if number else -1, name


def _shard_row(shard: Shard, members: dict[str, int], images: int, where: str) -> Any:
    """The sample's row: a .json with a conversation, or else the .txt; a .json beside it may hold other things."""

    def read(kind: str, reader: Any) -> list[Any]:
        found = [member for name, member in members.items() if _kind(name) == kind]
        return [reader(shard.read(member), shard.where(member)) for member in found]

    rows, captions = read(".json", parse), read(".txt", decode)
    talks = [row for row in rows if isinstance(row, dict) and has_conversation(row)]
    if len(talks) > 1:
        raise UserError(
            f"{where}: {len(talks)} members .json hold conversations; what stands before the first dot of a name tells "
            "samples apart, and these have the same"
        )
    if talks or not captions:
        return (talks or rows)[-1]
    if len(captions) > 1 or not images:
        raise UserError(f"{where}: expected one .txt and images beside it, found {list(members)}")
    turns = [("user", IMAGE_TAG * images), ("assistant", captions[0].strip())]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


class MixtureSource:
    """``length`` conversations of sources mixed by weight: `Quotas` say from which part each comes, each part's own in
    order, again from its start when it ends. Keys of images are (part, its key).

    Raises:
        UserError: a part cannot be opened, or the weights are too uneven (`Quotas`).
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
        part, rank = self.quotas.turn(index)
        sample = self.parts[part][rank % len(self.parts[part])]
        return replace(sample, id=f"{self.names[part]}/{sample.id}", images=tuple((part, key) for key in sample.images))

    def image(self, key: tuple[int, Any]) -> Image.Image:
        return self.parts[key[0]].image(key[1])

    def size(self, key: tuple[int, Any]) -> tuple[int, int]:
        return self.parts[key[0]].size(key[1])

    def fingerprints(self) -> dict[Hashable, str]:
        parts = enumerate(part.fingerprints() for part in self.parts)
        return {(number, key): found for number, part in parts for key, found in part.items()}


def open_source(data: Data, length: int, image_size: int, strict: bool = True) -> Source:
    """The training source of a run's first ``length`` conversations.

    Args:
        length: conversations that scenes or a mixture give; other sources have the length of their files.
        strict: bad rows and missing images, as far as they are found without reading images, are errors at once.
    """
    if isinstance(data, SceneData):
        return SceneSource(data, length, image_size=image_size)
    if isinstance(data, MixtureData):
        return MixtureSource(data, length, image_size, strict)
    if data.kind == "shards":
        return ShardSource(data)
    return (ConversationSource if data.kind == "json" else TableSource)(data, strict)
