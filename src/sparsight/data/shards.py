"""Tar shards (WebDataset): an index of offsets beside each tar, and any member's bytes without opening the tar anew.

An index is an array of numpy with a record for each member. It is written whole or not at all, and belongs to one state
of its tar, which its first record holds: number of samples, size, modification time (ns).
"""

from __future__ import annotations

import hashlib
import os
import resource
import tarfile
import uuid
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.progress import track

from sparsight.console import Console
from sparsight.data.rows import File
from sparsight.errors import UserError

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
TEXTS = frozenset({".json", ".txt"})


class Shard:
    """A tar with its index in a memory map: samples by number, members by their number in the index.

    Raises:
        FileNotFoundError: there is no index.
        ValueError, EOFError: the index is of another state of the tar, or not whole.
    """

    def __init__(self, tar: Path, index: Path) -> None:
        self.index, state = index, tar.stat()
        content = np.load(index, mmap_mode="r").view(np.ndarray)  # a plain array gives single items faster
        self.samples, size, modified, _ = content[0].item()
        if (size, modified) != (state.st_size, state.st_mtime_ns):
            raise UserError(f"{tar} has changed since ({size:,} bytes then, {state.st_size:,} now)")
        self.file, self.members = File(tar), content[1:]

    def __len__(self) -> int:
        return self.samples

    def __reduce__(self) -> tuple[type[Shard], tuple[Path, Path]]:
        return Shard, (self.file.path, self.index)

    def sample(self, number: int) -> list[tuple[str, int]]:
        """Names and numbers of a sample's members, in the tar's order."""
        owners = self.members["sample"]
        members = range(bisect_left(owners, number), bisect_left(owners, number + 1))
        return [(self._name(member), member) for member in members]

    def _name(self, member: int) -> str:
        return self.members[member]["name"].item().decode(errors="surrogateescape")

    def where(self, member: int) -> str:
        """A member, for messages."""
        return f"{self.file.path}, offset {self.members[member]['offset']}, member '{self._name(member)}'"

    def read(self, member: int) -> bytes:
        """Raises UserError if the tar ends before."""
        _, offset, size, _ = self.members[member].item()
        return self.file.read(offset, size)


def stem(name: str) -> str:
    """The name that members of one sample share: up to the first dot behind the folder; "" if it begins with it."""
    folder, _, file = name.rpartition("/")
    key = file.partition(".")[0]
    return f"{folder}/{key}" if folder and key else key


def open_shards(tars: Sequence[Path], index_folder: Path | None = None) -> list[Shard]:
    """The shards, in order. Indices that are missing or stale are built, with a bar; a warning tells of stale ones.

    Raises:
        UserError: a tar is damaged or holds no samples, or its index cannot be written.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * len(tars) + 256  # a descriptor for each tar and each index, and those of everything else
    if soft < needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    indices = {tar: _index_path(tar, index_folder) for tar in tars}
    shards = {tar: _fitting(tar, index) for tar, index in indices.items()}
    todo = [tar for tar, shard in shards.items() if shard is None]
    for tar in track(todo, "indexing shards", console=Console(stderr=True), disable=not todo):
        build_index(tar, indices[tar])
        shards[tar] = Shard(tar, indices[tar])
    return [shard for shard in shards.values() if shard is not None]


def _index_path(tar: Path, folder: Path | None) -> Path:
    if folder is None:
        return tar.with_name(f"{tar.name}.idx")
    own = hashlib.sha256(str(tar.absolute().parent).encode()).hexdigest()[:8]  # tars of one name in several folders
    return folder / f"{tar.name}.{own}.idx"


def _fitting(tar: Path, index: Path) -> Shard | None:
    try:
        return Shard(tar, index)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, EOFError) as error:
        warnings.warn(f"{index}: the index does not fit, and is built anew: {error}", stacklevel=3)
        return None


def build_index(tar: Path, index: Path) -> None:
    """Read the headers of a tar and write its index. Any number of processes may do so at once.

    Raises:
        UserError: the tar is damaged, holds no samples, or one without text; or the index cannot be written.
    """
    state, samples = tar.stat(), dict[str, int]()
    members: list[tuple[int, int, int, bytes]] = []
    with_text, others = set[int](), Counter[str]()
    for member in _members(tar):
        name = member.name.removeprefix("./")
        key, kind = stem(name), os.path.splitext(name)[1].lower()
        if not key or kind not in IMAGES | TEXTS:
            others[kind or name] += 1
            continue
        number = samples.setdefault(key, len(samples))
        with_text |= {number} if kind in TEXTS else set()
        members.append((number, member.offset_data, member.size, name.encode(errors="surrogateescape")))
    if others:
        text = f"{tar}: {others.total()} members are of no use here: {dict(others.most_common(5))}"
        warnings.warn(text, stacklevel=2)
    if not samples:
        raise UserError(f"{tar}: no samples in it; expected members .json or .txt, with images beside them")
    if silent := [key for key, number in samples.items() if number not in with_text]:
        raise UserError(
            f"{tar}, sample '{(key := silent[0])}': expected a member '{key}.json' or '{key}.txt', found images alone "
            f"({len(silent)} of {len(samples)} samples are so)"
        )
    longest = max(len(name) for *_, name in members)
    kinds = [("sample", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("name", f"S{longest}")]
    head = (len(samples), state.st_size, state.st_mtime_ns, b"")
    partial = index.with_name(f"{index.name}.{uuid.uuid4().hex}.tmp")
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, np.array([head, *sorted(members, key=lambda member: member[0])], kinds))
        partial.replace(index)
    except OSError as error:
        raise UserError(
            f"{index.parent}: the index of {tar} cannot be written here: {error.strerror}. "
            "Set index_folder to a folder where it can"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. tarfile alone takes a damaged header for the end."""
    offset = 0
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise tarfile.ReadError(f"expected files and folders, but '{member.name}' is a link or a device")
                if member.isreg():
                    yield member
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                offset = archive.offset
            file.seek(offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("expected a member or the end mark; is it cut short?")
    except tarfile.TarError as error:
        raise UserError(f"{tar}, offset {offset}: not a whole tar: {error}") from None
