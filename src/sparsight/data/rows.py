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
from pathlib import Path
from typing import Any

from sparsight.errors import UserError

_LIST_START = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(\][ \t\n\r]*\Z)?")
_ITEM_END = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|(\][ \t\n\r]*\Z))")


class File:
    """Bytes of a file by offset, in any process at any time: there is no common position. A .gz is unpacked into a
    temporary file without a name, and again in a process that gets this object by pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = _unpacked(path) if path.suffix == ".gz" else os.open(path, os.O_RDONLY)

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


def _unpacked(path: Path) -> int:
    with tempfile.TemporaryFile() as file:
        try:
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
            file.flush()
        except (OSError, EOFError, zlib.error) as error:
            text = f"{path}: cannot be unpacked by gzip into {tempfile.gettempdir()} (TMPDIR): {error}"
            raise UserError(text) from None
        return os.dup(file.fileno())


def decode(content: bytes, where: str) -> str:
    """Text from UTF-8."""
    try:
        return content.decode("utf-8-sig")  # some editors write a mark before the first character
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected text in UTF-8: {error}") from None


def parse(content: bytes, where: str) -> Any:
    """The value that JSON holds."""
    try:
        return json.loads(decode(content, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None


class Rows:
    """Lines of a .jsonl file, or items of a .json list; also behind .gz.

    Only their numbers, offsets and sizes are kept. As objects they would be many times as large, and copied into every
    process that loads data: to read an object is to write its reference count.

    Raises:
        UserError: there is no such file, it cannot be unpacked, or holds no list of JSON.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        self.file = File(path)
        self.lines = path.name.removesuffix(".gz").endswith(".jsonl")
        self.spans = (_lines if self.lines else _items)(self.file)

    def __len__(self) -> int:
        return len(self.spans) // 3

    def __getitem__(self, row: int) -> Any:
        if row >= len(self):
            raise IndexError(row)
        number, offset, size = self.spans[3 * row : 3 * row + 3]
        return parse(self.file.read(offset, size), f"{self.file.path}, {'line' if self.lines else 'row'} {number}")


def _lines(file: File) -> array[int]:
    """Number, offset and size of each line that is not blank."""
    spans, offset = array("q"), 0
    with os.fdopen(os.dup(file.descriptor), "rb") as content:
        content.seek(0)
        for number, line in enumerate(content, 1):  # bytes end lines at newlines alone, not at U+2028 as text does
            if line.strip():
                spans.extend((number, offset, len(line)))
            offset += len(line)
    return spans


def _items(file: File) -> array[int]:
    """Number, offset and size of each item of a JSON list, one parsed at a time."""
    content = file.read(0, os.fstat(file.descriptor).st_size)
    text, read = decode(content, str(file.path)), json.JSONDecoder().raw_decode
    spans, passed, offset = array("q"), 0, len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8)
    try:
        found = _LIST_START.match(text)
        while found and not found[1]:  # group 1 is the end of the list
            start = found.end()
            end = read(text, start)[1]
            offset, size = offset + len(text[passed:start].encode()), len(text[start:end].encode())
            spans.extend((len(spans) // 3, offset, size))
            offset, passed, found = offset + size, end, _ITEM_END.match(text, end)
    except (ValueError, RecursionError):
        found = None
    if not found:
        rows = parse(content, str(file.path))  # its message is about the file as a whole
        raise UserError(f"{file.path}: expected a list of samples, found {type(rows).__name__}")
    return spans
