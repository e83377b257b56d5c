"""A cache of a frozen encoder's features: each image is encoded once, then read from a memory map.

Shapes: I images, H x W patches, C channels. Features are kept in bf16, and a sum of
each image's: blocks that a disk lost are noticed where they are read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from sparsight.aside import moved_aside
from sparsight.errors import UserError
from sparsight.safety import flush

Encode = Callable[[Sequence[Hashable]], Sequence[torch.Tensor]]


class FeatureCache:
    """Feature levels by image key, memory-mapped from ``folder``; ``seconds``: of encoding.

    Args:
        rows: each image's row in the maps.

    Raises:
        UserError: the folder is damaged.
    """

    def __init__(self, folder: Path, rows: Mapping[Hashable, int]) -> None:
        self.folder, self.rows = folder, rows
        try:
            meta = json.loads((folder / "cache.json").read_bytes())
            self.seconds = float(meta["seconds"])
            self.levels = [
                np.memmap(folder / f"level{number}.bin", dtype=np.uint16, mode="r", shape=tuple(shape))
                for number, shape in enumerate(meta["shapes"])
            ]
            self.sums: list[int] = meta["sums"]
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(f"{folder}: damaged: {error}") from None

    def read(self, keys: Sequence[Hashable]) -> tuple[torch.Tensor, ...]:
        """Features of images, one (len(keys), H, W, C) in bf16 for each level.

        Raises:
            UserError: they are not as they were written; the folder is moved aside.
        """
        rows = np.array([self.rows[key] for key in keys], dtype=np.intp)
        found = [level[rows].copy() for level in self.levels]
        for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
            if _sum(level[number] for level in found) != self.sums[row]:
                with suppress(OSError):  # another process was faster
                    moved_aside(self.folder, f"damaged-{self.folder.name}")
                raise UserError(
                    f"{self.folder}: damaged: image '{key}' is not as it was written. The folder is moved aside: with "
                    "--resume, images are encoded again"
                )
        return tuple(torch.from_numpy(level).view(torch.bfloat16) for level in found)


def _sum(levels: Iterable[np.ndarray]) -> int:
    """Of an image's features."""
    return zlib.crc32(b"".join(level.tobytes() for level in levels))


def image_rows(fingerprints: Mapping[Hashable, str]) -> tuple[dict[Hashable, int], str]:
    """The row of each image, one for all that are the same, and a hash of the contents of all rows."""
    found: dict[str, int] = {}
    rows = {key: found.setdefault(fingerprint, len(found)) for key, fingerprint in fingerprints.items()}
    return rows, hashlib.sha256("\n".join(found).encode()).hexdigest()


def remove_caches(root: Path) -> None:
    """Remove the caches that `build_cache` has made in a folder, and the folder if nothing else is in it."""
    for folder in root.iterdir() if root.is_dir() else ():
        ours = re.fullmatch(r"[0-9a-f]{16}(\..*\.partial)?", folder.name)
        if ours and all(re.fullmatch(r"cache\.json|level\d+\.bin", file.name) for file in folder.iterdir()):
            shutil.rmtree(folder)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


@torch.no_grad()
def build_cache(
    folder: Path,
    rows: Mapping[Hashable, int],
    encode: Encode,
    progress: Callable[[int], None] = lambda done: None,
    batch_size: int = 8,
    tell: Callable[[str], None] = lambda text: None,
) -> FeatureCache:
    """Encode every image once. A folder that is there is used as it is; a damaged one is moved aside, and made anew.

    Any number of processes may do so at once: each writes a folder of its own, and the first to be done gives it the
    name.

    Args:
        folder: its name says all that features depend on.
        rows: from `image_rows`.
        encode: keys -> feature levels, each (I, H, W, C); the same map size for all images.
        progress: gets the number of images done.
        batch_size: images encoded together; small, for a CPU's caches.
        tell: gets a message if a damaged cache is moved.

    Raises:
        UserError: maps of several sizes, as native-resolution encoders give them.
    """
    if (folder / "cache.json").is_file():
        try:
            return FeatureCache(folder, rows)
        except ValueError as damaged:
            tell(f"{damaged}. Images are encoded again; it is now {moved_aside(folder, f'damaged-{folder.name}')}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        first = {row: key for key, row in reversed(list(rows.items()))}
        _write(partial, [first[row] for row in range(len(first))], encode, progress, batch_size)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "cache.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return FeatureCache(folder, rows)


def _write(
    folder: Path, keys: Sequence[Hashable], encode: Encode, progress: Callable[[int], None], batch_size: int
) -> None:
    begun, shapes, sums = time.perf_counter(), list[tuple[int, ...]](), list[int]()
    with ExitStack() as stack:
        files: list[BinaryIO] = []  # no memory maps: at these, a full disk kills the process
        for start in range(0, len(keys), batch_size):
            part = list(keys[start : start + batch_size])
            levels = [level.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy() for level in encode(part)]
            for level in levels[len(files) :]:
                files.append(stack.enter_context((folder / f"level{len(files)}.bin").open("wb")))
                shapes.append((len(keys), *level.shape[1:]))
            for file, shape, level in zip(files, shapes, levels, strict=True):
                if level.shape[1:] != shape[1:]:
                    raise UserError(
                        f"image '{part[0]}' has a feature map {level.shape[1:]}, others {shape[1:]}: only maps of one "
                        "size can be cached. Set cache_features: false"
                    )
                file.write(level.data)
            sums += [_sum(level[number] for level in levels) for number in range(len(part))]
            progress(start + len(part))
    for number in range(len(shapes)):
        flush(folder / f"level{number}.bin")
    meta = {"shapes": shapes, "seconds": time.perf_counter() - begun, "sums": sums}
    (folder / "cache.json").write_text(json.dumps(meta))
    flush(folder / "cache.json")
