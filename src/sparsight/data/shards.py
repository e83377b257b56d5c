"""Tar shards (WebDataset): an index of offsets beside each tar, and the bytes of members without opening it anew.

An index file holds a header, one record for each member, and the members' names. It is written whole or not at all, and
belongs to one state of its tar: size and modification time are compared.
"""

from __future__ import annotations

import hashlib
import os
import resource
import tarfile
import tempfile
import warnings
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from sparsight.console import Console
from sparsight.errors import UserError

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
TEXTS = frozenset({".json", ".txt"})
_MAGIC = b"SPARIDX1"
# Bytes; times in nanoseconds. "offset" is that of the member's data, "name" the place among all names.
_HEADER = np.dtype([("magic", "S8"), *((key, "<i8") for key in ("tar", "modified", "samples", "members", "names"))])
_MEMBER = np.dtype([(key, "<i8") for key in ("sample", "offset", "size", "name", "name_size")])


class File:
    """Bytes of a file by their place. Each process may read at any time: there is no common position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """Raises UserError if the file ends before."""
        data = os.pread(self.descriptor, size, offset)
        if len(data) < size:
            raise UserError(f"{self.path}, offset {offset}: expected {size} bytes, found {len(data)}; is it cut short?")
        return data

    def __reduce__(self) -> tuple[type[File], tuple[Path]]:
        return File, (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Shard:
    """A tar with its index in a memory map: samples by number, members by their place in the index.

    Raises:
        FileNotFoundError: there is no index.
        UserError: the index is of another state of the tar, or not whole.
    """

    def __init__(self, tar: Path, index: Path) -> None:
        self.index, state = index, tar.stat()
        content = np.memmap(index, np.uint8, "r").view(np.ndarray)  # a plain array gives single items faster
        if content[: len(_MAGIC)].tobytes() != _MAGIC:
            raise UserError("it is no index of this version")
        start = _HEADER.itemsize
        size, modified, self.samples, members, names = content[:start].view(_HEADER)[0].tolist()[1:]
        if (size, modified) != (state.st_size, state.st_mtime_ns):
            raise UserError(f"{tar} has changed since ({size:,} bytes then, {state.st_size:,} now)")
        end = start + members * _MEMBER.itemsize
        if len(content) != end + names:
            raise UserError(f"expected {end + names:,} bytes, found {len(content):,}")
        self.members, self.names = content[start:end].view(_MEMBER), content[end:]
        self.file = File(tar)

    def __len__(self) -> int:
        return self.samples

    def __reduce__(self) -> tuple[type[Shard], tuple[Path, Path]]:
        return Shard, (self.file.path, self.index)

    def sample(self, number: int) -> list[tuple[str, int]]:
        """Names and places of a sample's members, in the tar's order."""
        owners = self.members["sample"]
        places = range(bisect_left(owners, number), bisect_left(owners, number + 1))
        return [(self._name(place), place) for place in places]

    def _name(self, place: int) -> str:
        start, size = self.members[place].tolist()[3:]
        return self.names[start : start + size].tobytes().decode(errors="surrogateescape")

    def where(self, place: int) -> str:
        """A member, for messages."""
        return f"{self.file.path}, offset {self.members[place]['offset']}, member '{self._name(place)}'"

    def read(self, place: int) -> bytes:
        """Raises UserError if the tar ends before."""
        _, offset, size, *_ = self.members[place].tolist()
        return self.file.read(offset, size)


def stem(name: str) -> str:
    """What members of one sample share: the name up to the first dot behind the folder; "" if it begins with it."""
    folder, _, file = name.rpartition("/")
    key = file.partition(".")[0]
    return f"{folder}/{key}" if folder and key else key


def open_shards(tars: Sequence[Path], index_folder: Path | None = None) -> list[Shard]:
    """The shards, in order. Indices that are missing or stale are built, with a bar; of stale ones a warning tells.

    Raises:
        UserError: a tar is damaged or holds no samples, or its index cannot be written.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * len(tars) + 256  # a descriptor for each tar and each index, and those of everything else
    if soft < needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    shards: dict[Path, Shard] = {}
    for tar in tars:
        try:
            shards[tar] = Shard(tar, _index_path(tar, index_folder))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except ValueError as error:
            text = f"{_index_path(tar, index_folder)}: the index does not fit, and is built anew: {error}"
            warnings.warn(text, stacklevel=2)
    todo = [tar for tar in tars if tar not in shards]
    with Progress(console=Console(stderr=True), disable=not todo) as bar:
        task = bar.add_task("indexing shards", total=sum(tar.stat().st_size for tar in todo))
        for tar in todo:
            index = _index_path(tar, index_folder)
            build_index(tar, index, lambda done: bar.advance(task, done))
            shards[tar] = Shard(tar, index)
    return [shards[tar] for tar in tars]


def _index_path(tar: Path, folder: Path | None) -> Path:
    if folder is None:
        return tar.with_name(f"{tar.name}.idx")
    place = hashlib.sha256(str(tar.absolute().parent).encode()).hexdigest()[:8]  # tars of one name in several folders
    return folder / f"{tar.name}.{place}.idx"


def build_index(tar: Path, index: Path, progress: Callable[[int], None] = lambda done: None) -> None:
    """Read the headers of a tar and write its index. Any number of processes may do so at once.

    Args:
        progress: told the bytes of the tar that have been passed since it was told last.

    Raises:
        UserError: the tar is damaged, holds no samples, or one without text; or the index cannot be written.
    """
    state = tar.stat()
    samples: dict[str, int] = {}
    fields, names, texts, others = array("q"), bytearray(), bytearray(), Counter[str]()
    told = 0
    for member in _members(tar):
        name = member.name.removeprefix("./")
        key, kind = stem(name), os.path.splitext(name)[1].lower()
        if not key or kind not in IMAGES | TEXTS:
            others[kind or name] += 1
            continue
        number = samples.setdefault(key, len(samples))
        if number == len(texts):
            texts.append(0)
        texts[number] |= kind in TEXTS
        coded = name.encode(errors="surrogateescape")
        fields.extend((number, member.offset_data, member.size, len(names), len(coded)))
        names += coded
        if member.offset_data - told > 1 << 20:
            progress(member.offset_data - told)
            told = member.offset_data
    progress(state.st_size - told)
    if others:
        text = f"{tar}: {others.total()} members are of no use here: {dict(others.most_common(5))}"
        warnings.warn(text, stacklevel=2)
    if not samples:
        raise UserError(f"{tar}: no samples in it; expected members .json or .txt, with images beside them")
    if not all(texts):
        key = list(samples)[texts.index(0)]
        raise UserError(
            f"{tar}, sample '{key}': expected a member '{key}.json' or '{key}.txt', found images alone"
            f" ({texts.count(0)} of {len(samples)} samples are so)"
        )
    members = np.frombuffer(fields, _MEMBER)
    members = members[np.argsort(members["sample"], kind="stable")]
    head = (_MAGIC, state.st_size, state.st_mtime_ns, len(samples), len(members), len(names))
    _write_whole(index, np.array(head, _HEADER).tobytes() + members.tobytes() + bytes(names), tar)


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. tarfile alone takes a damaged header for the end."""
    place = 0
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise tarfile.ReadError(f"expected files and folders, but '{member.name}' is a link or a device")
                if member.isreg():
                    yield member
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                place = archive.offset
            file.seek(place)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("expected a member or the end mark; is it cut short?")
    except tarfile.TarError as error:
        raise UserError(f"{tar}, offset {place}: not a whole tar: {error}") from None


def _write_whole(index: Path, content: bytes, tar: Path) -> None:
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=index.parent, prefix=index.name, suffix=".tmp", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # others may read it, as they may the tar
                os.replace(file.name, index)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(
            f"{index.parent}: the index of {tar} cannot be written here: {error.strerror}. "
            "Set index_folder to a folder where it can"
        ) from None
