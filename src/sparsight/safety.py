"""Folders that are whole or do not count, and folders that one run has for itself: manifests of SHA-256 sums, locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsight.errors import UserError

MANIFEST = "sparsight_manifest.json"
LOCK = "sparsight.lock"
_UNLISTED = (MANIFEST, f"{MANIFEST}.partial", LOCK, "README.md")  # people edit model cards
_LARGE = 2**30  # bytes from which on threads are worth it
_FULL = ("No space left", "unexpected pos", "file write failed", "iostream error")  # torch.save hides the number


def write_manifest(folder: str | Path) -> None:
    """Flush all files under a folder to the disk, then write their SHA-256 sums as `MANIFEST`, which appears as the
    last one and whole: a folder counts from then on. ``README.md`` is left out."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _UNLISTED)
    sums = dict(zip([file.relative_to(folder).as_posix() for file in files], _sums(files), strict=True))
    for each in (*files, *{file.parent for file in files}):
        flush(each)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_bytes(_text(sums))
    flush(partial)
    partial.replace(folder / MANIFEST)
    flush(folder)
    flush(folder.parent)


def faults(folder: str | Path) -> dict[str, str]:
    """What is wrong with a folder that `write_manifest` has sealed, by file; empty if it is whole. All of it is read.

    Raises:
        OSError: the disk cannot be read.
    """
    folder = Path(folder)
    try:
        text = (folder / MANIFEST).read_bytes()
        sums: dict[str, list[Any]] = json.loads(text)["files"]
        if text != _text(sums):
            raise ValueError
    except FileNotFoundError:
        return {MANIFEST: "missing: it was cut short while it was written, or written without a manifest"}
    except (ValueError, KeyError, TypeError):
        return {MANIFEST: "cut short, or its content has changed"}

    wrong = {}
    for name, found in zip(sums, _sums([folder / name for name in sums]), strict=True):
        if found == sums[name]:
            continue
        other = next((other for other, wanted in sums.items() if wanted == found), None)
        size, wanted = found[0], sums[name][0]
        cut = f"{size} bytes where {wanted} were written" if size != wanted else "its content has changed"
        wrong[name] = "missing" if size is None else f"has the content of {other}" if other else cut
    return wrong


def describe(found: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in found.items())


def check_manifest(folder: str | Path) -> None:
    """Raises UserError that names each file which is not as it was saved; passes a folder without a manifest."""
    if (Path(folder) / MANIFEST).exists() and (found := faults(folder)):
        raise UserError(
            f"{folder} is damaged ({describe(found)}): nothing is loaded from it. Get these files anew; if you changed "
            f"them yourself, remove {MANIFEST}"
        )


def _sums(files: Sequence[Path]) -> list[list[Any]]:
    """Bytes of each file and their SHA-256 sum; None for one that is not there."""

    def one(file: Path) -> list[Any]:
        if not file.is_file():
            return [None, None]
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
            return [content.tell(), found]

    if sum(file.stat().st_size for file in files if file.is_file()) < _LARGE:
        return list(map(one, files))  # also where there is no memory for threads
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, files))


def _text(sums: dict[str, list[Any]]) -> bytes:
    """Of a manifest, with a sum of itself."""
    own = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    return json.dumps({"version": 1, "own": own, "files": sums}, indent=1).encode()


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk and not in memory alone."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into: it gets a manifest and the name ``out`` once all is there, and else nothing is left.

    Raises:
        FileExistsError: ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)  # an error if it is there: then it is somebody's
    try:
        yield partial
        write_manifest(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def naming_space(folder: Path, needed: Callable[[], int], kept: str) -> Iterator[None]:
    """Around what writes ``folder``: a full disk is a UserError that says how many bytes are needed, and what is left
    of the run (``kept``)."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT) and not any(text in str(error) for text in _FULL):
            raise
        need, free = (size / 1e9 for size in (needed(), shutil.disk_usage(folder.parent).free))
        raise UserError(
            f"{folder} could not be written, the disk is full: it needs about {need:.3g} GB, and {free:.3g} GB are "
            f"free. {kept}. Make room, and go on with --resume"
        ) from error


@contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[bool]:
    """Have a folder for this run alone. Each rank holds a byte of `LOCK`, the first one takes all at first; whoever
    ends, or is killed, holds nothing any more. Gives whether the first rank's is the same folder.

    Raises:
        UserError: a process of another run holds it; the message names it and its host.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1 if rank else 0, rank)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise BlockingIOError  # the run that held it removed it meanwhile
            if not rank:
                fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)  # theirs to take
                file.truncate(0)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holders = " and ".join(file.read().splitlines()) or "a run that just began or ends"
            raise UserError(
                f"{folder} is in use by {holders}: two runs would write over each other. Wait until that one ends, "
                "end it, or choose another folder"
            ) from None
        except OSError as error:  # some file systems have no locks
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second run in it", stacklevel=3)
        file.seek(0)
        seen = not rank or bool(file.read())
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # for other machines
        try:
            yield seen
        finally:
            if not rank:
                path.unlink(missing_ok=True)  # while it is held
