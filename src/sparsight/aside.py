"""Nothing of a user is deleted: files and folders that are in the way get another name."""

from __future__ import annotations

from itertools import count
from pathlib import Path


def moved_aside(path: Path, name: str) -> Path:
    """Rename a file or folder to ``name`` beside it, with a number behind that if it is taken, and return its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    new = next(
        each for number in count(1) if not _there(each := path.with_name(name if number == 1 else f"{name}-{number}"))
    )
    return path.rename(new)


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # also a link to nothing
