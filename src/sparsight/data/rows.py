"""Rows of a .json or .jsonl file, also of one packed by gzip, read when they are asked for."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsight.data.shards import File
from sparsight.errors import UserError

_LIST_START = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(\][ \t\n\r]*\Z)?")
_ITEM_END = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|(\][ \t\n\r]*\Z))")


def open_rows(path: Path) -> Rows:
    """The rows of a file, by how its name ends: lines of .jsonl, or else a list; .gz behind it is unpacked.

    Raises:
        UserError: there is no such file, it cannot be unpacked, or is not as expected.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    return (Lines if path.name.removesuffix(".gz").endswith(".jsonl") else List)(path)


def decode(content: bytes, where: str) -> str:
    """Text from UTF-8."""
    try:
        return content.decode("utf-8-sig")  # some editors write a mark before the first character
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected text in UTF-8: {error}") from None


def parse(content: bytes, where: str) -> Any:
    """What JSON says."""
    try:
        return json.loads(decode(content, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None


class _Unpacked(File):
    """A .gz file's content, in a temporary file without a name: it is gone with the process. Another process that gets
    it by pickle unpacks it anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with tempfile.TemporaryFile() as file:
            try:
                with gzip.open(path) as packed:
                    shutil.copyfileobj(packed, file, 1 << 20)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot be unpacked by gzip: {error}") from None
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}. Unpack it yourself, "
                    "or set TMPDIR to a folder with room"
                ) from None
            file.flush()
            self.descriptor = os.dup(file.fileno())

    def __reduce__(self) -> tuple[type[File], tuple[Path]]:
        return _Unpacked, (self.path,)


class Rows:
    """Rows of a file; only their places are kept: number, offset and size in bytes.

    As objects they would be many times as large, and copied into every process that loads data: to read an object
    is to write its reference count.
    """

    unit = "row"

    def __init__(self, path: Path) -> None:
        self.file, self.places = (_Unpacked if path.suffix == ".gz" else File)(path), array("q")

    def __len__(self) -> int:
        return len(self.places) // 3

    def __getitem__(self, row: int) -> Any:
        if row >= len(self):
            raise IndexError(row)
        number, offset, size = self.places[3 * row : 3 * row + 3]
        return parse(self.file.read(offset, size), f"{self.file.path}, {self.unit} {number}")


class Lines(Rows):
    """Rows of a .jsonl file, by their lines. Blank lines are none."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        offset = 0
        with os.fdopen(os.dup(self.file.descriptor), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):  # they end at newlines alone, not at U+2028 as those of text do
                if line.strip():
                    self.places.extend((number, offset, len(line)))
                offset += len(line)


class List(Rows):
    """Rows of a .json file that holds a list of them.

    Raises:
        UserError: it holds no list, or no JSON.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        content = self.file.read(0, os.fstat(self.file.descriptor).st_size)
        text = decode(content, str(path))
        offset, passed = len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8), 0
        try:
            for number, (start, end) in enumerate(_items(text)):
                offset, size = offset + len(text[passed:start].encode()), len(text[start:end].encode())
                self.places.extend((number, offset, size))
                offset, passed = offset + size, end
        except (ValueError, RecursionError):
            rows = parse(content, str(path))  # what is wrong is told of the file as a whole
            raise UserError(f"{path}: expected a list of samples, found {type(rows).__name__}") from None


def _items(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each item of a JSON list, one parsed at a time. Raises UserError if the text is none."""
    read, found = json.JSONDecoder().raw_decode, _LIST_START.match(text)
    if not found:
        raise UserError("no list")
    while not found[1]:  # which is the end of the list
        start = found.end()
        end = read(text, start)[1]
        found = _ITEM_END.match(text, end)
        if not found:
            raise UserError("neither another item nor the end")
        yield start, end
