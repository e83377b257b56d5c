"""How a row says which image it means: a path inside the image folder, the image's bytes, or a mapping of these."""

from __future__ import annotations

import base64
import os
import re
import unicodedata
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from sparsight.errors import UserError

CELL_KEYS = ("bytes", "base64", "image", "image_url", "path", "url")
_REMOTE = re.compile(r"(https?|ftp|s3|gs|hf)://", re.IGNORECASE)


def read_cell(cell: Any, where: str) -> str | bytes | None:
    """A path, an image's bytes, or None for an empty cell.

    Raises:
        UserError: a URL, a path that leads out of the image folder, or none of these.
    """
    if isinstance(cell, dict):
        filled = {key: value for key, value in cell.items() if value not in (None, "", [], {})}
        key = next((key for key in CELL_KEYS if key in filled), None)
        if filled and key is None:
            raise UserError(f"{where}: expected {{'path': 'images/a.png'}}, found the fields {list(filled)}")
        cell = filled.get(key)
        if key in ("bytes", "base64") and isinstance(cell, str):
            cell = f"data:;base64,{cell}"
        return read_cell(cell, where)
    if cell is None or isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise UserError(f"{where}: expected a path, a data URI or bytes of an image, found {type(cell).__name__}")
    if cell.startswith("data:"):
        head, _, content = cell.partition(",")
        try:
            return base64.b64decode(content if head.endswith(";base64") and content else "@", validate=True)
        except ValueError:
            raise UserError(f"{where}: expected an image as 'data:image/png;base64,...', found no base64") from None
    if _REMOTE.match(cell):
        raise UserError(
            f"{where}: '{cell:.200}' is a URL, and files are never fetched in training. Download it into the image "
            "folder first, and write its path in that folder here"
        )
    path = cell.removeprefix("file://")
    if _leads_out(path):
        raise UserError(f"{where}: expected a path inside the image folder, found '{path:.200}'")
    return path or None


def _leads_out(path: str) -> bool:
    """Whether a path leads out of its folder, read with slashes or with backslashes. Links in the folder are the user's
    own and are followed; a path comes from whoever wrote the data."""
    slashes = path.replace("\\", "/")
    absolute = os.path.isabs(slashes) or PureWindowsPath(path).is_absolute()
    return absolute or os.path.normpath(slashes).split(os.sep)[0] == os.pardir


def find_file(folder: Path, path: str) -> Path:
    """The file that a path of the data means: as written, with backslashes as slashes, with percent-encoding undone, or
    in another form of Unicode. The path as written if there is none."""
    slashes = path.replace("\\", "/")
    forms = path, slashes, unquote(slashes), *(unicodedata.normalize(form, unquote(slashes)) for form in ("NFC", "NFD"))
    inside = (folder / form for form in forms if not _leads_out(form))
    return next((file for file in inside if os.path.isfile(file)), folder / path)
