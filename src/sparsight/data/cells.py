"""How a row says which image it means: a path inside the image folder, the image's bytes, or a mapping of these."""

from __future__ import annotations

import base64
import binascii
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from sparsight.errors import UserError

CELL_KEYS = ("bytes", "base64", "image", "image_url", "path", "url")
_REMOTE = re.compile(r"(https?|ftp|s3|gs|hf)://", re.IGNORECASE)
_LONGEST_NAME = 255  # bytes, on all common file systems


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: tables write all columns in every row."""
    return value is None or (isinstance(value, str | list | dict | tuple) and not value)


def read_cell(cell: Any, where: str) -> str | bytes | None:
    """A path, an image's bytes, or None for an empty cell.

    Raises:
        UserError: a URL, a path that leads out of the image folder, or none of these.
    """
    if isinstance(cell, dict):
        filled = {key: value for key, value in cell.items() if not is_empty(value)}
        known = [key for key in CELL_KEYS if key in filled]
        if filled and not known:
            raise UserError(f"{where}: expected {{'path': 'images/a.png'}}, found the fields {list(filled)}")
        value = filled[known[0]] if known else None
        in_base64 = isinstance(value, str) and known[0] in ("bytes", "base64")
        return _bytes(value, where) if in_base64 else read_cell(value, where)
    if is_empty(cell) or isinstance(cell, bytes):
        return cell if isinstance(cell, bytes) else None
    if not isinstance(cell, str):
        raise UserError(f"{where}: expected a path, a data URI or bytes of an image, found {type(cell).__name__}")
    if cell.startswith("data:"):
        head, _, content = cell.partition(",")
        return _bytes(content if head.endswith(";base64") else None, where)
    if _REMOTE.match(cell):
        raise UserError(
            f"{where}: '{cell:.200}' is a URL, and images are never fetched in training. Download it into the image "
            f"folder first (curl --remote-name --output-dir FOLDER URL), and write its path in that folder here"
        )
    return _inside(cell.removeprefix("file://"), where)


def _bytes(content: str | None, where: str) -> bytes:
    try:
        return base64.b64decode(content or "@", validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where}: expected an image as 'data:image/png;base64,...', found no base64 in it") from None


def _inside(path: str, where: str) -> str:
    """The path; it may not lead out of the image folder, read with slashes or with backslashes. Links in that folder
    are the user's own and are followed; a path comes from whoever wrote the data."""
    slashes = path.replace("\\", "/")
    absolute = os.path.isabs(slashes) or PureWindowsPath(path).is_absolute()
    if absolute or os.path.normpath(slashes).split(os.sep)[0] == os.pardir:
        raise UserError(f"{where}: expected a path inside the image folder, found '{path:.200}'")
    return path


def find_file(folder: Path, path: str) -> Path:
    """The file that a path of the data means: as it is written; else with backslashes as slashes, percent-encoding
    undone, or each name in another form of Unicode. The path as written if there is none."""
    written = folder / path
    if os.path.isfile(written):  # False too for what no file can be called
        return written
    found = folder
    for name in path.replace("\\", "/").split("/"):
        there = next((found / form for form in _forms(name) if os.path.exists(found / form)), None)
        if there is None:
            return written
        found = there
    return found if found.is_file() else written


def _forms(name: str) -> Iterator[str]:
    decoded = unquote(name)
    for form in (name, decoded) if "/" not in decoded and decoded not in (".", "..") else (name,):
        yield from (form, unicodedata.normalize("NFC", form), unicodedata.normalize("NFD", form))


def no_such_file(path: Path) -> str:
    """The end of a message, for a path where no file is."""
    longest = max(path.parts, key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) <= _LONGEST_NAME:
        return f"{path}: there is no such file"
    return (
        f"'{longest:.60}...': there is no such file: the name has {len(longest)} characters, more than a file's can. "
        "If it is the image itself, write it as 'data:image/png;base64,...'"
    )
