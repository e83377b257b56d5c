"""A cache of a frozen encoder's features: each picture is encoded once, then read from a memory map.

Shapes: I images, H x W patches, C channels. Features are kept in bf16.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import torch


class FeatureCache:
    """Feature levels by picture key, memory-mapped from ``folder``."""

    def __init__(self, folder: Path, keys: Sequence[Hashable]) -> None:
        self.rows = {key: row for row, key in enumerate(keys)}
        self.folder = folder
        meta = json.loads((folder / "cache.json").read_text())
        self.seconds = float(meta["seconds"])  # what encoding took
        self.levels = [
            np.memmap(folder / f"level{number}.bin", dtype=np.uint16, mode="r", shape=tuple(shape))
            for number, shape in enumerate(meta["shapes"])
        ]

    def read(self, keys: Sequence[Hashable]) -> tuple[torch.Tensor, ...]:
        """Features of pictures, one (len(keys), H, W, C) in bf16 for each level."""
        rows = np.array([self.rows[key] for key in keys], dtype=np.intp)
        return tuple(torch.from_numpy(level[rows].copy()).view(torch.bfloat16) for level in self.levels)


def cache_name(fingerprint: str) -> str:
    """A folder name from everything that the features depend on."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


@torch.no_grad()
def build_cache(
    folder: Path,
    keys: Sequence[Hashable],
    encode: Callable[[Sequence[Hashable]], Sequence[torch.Tensor]],
    progress: Callable[[int], None] = lambda done: None,
    batch_size: int = 8,
) -> FeatureCache:
    """Encode every picture once; a folder that is complete is used as it is, one that is not is made anew.

    Args:
        folder: where it lies; ``cache.json`` is written last, so that a cache that was cut short is seen.
        keys: the pictures, in order.
        encode: keys -> feature levels, each (I, H, W, C); the same map size for all pictures.
        progress: told the number of pictures done.
        batch_size: pictures encoded together; small, for a CPU's caches.

    Raises:
        ValueError: maps of several sizes, as native-resolution encoders give them.
    """
    if (folder / "cache.json").is_file():
        return FeatureCache(folder, keys)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    maps: list[np.memmap] = []
    for start in range(0, len(keys), batch_size):
        part = list(keys[start : start + batch_size])
        levels = [level.to(torch.bfloat16).cpu().contiguous() for level in encode(part)]
        if not maps:
            maps = [
                np.memmap(folder / f"level{n}.bin", np.uint16, "w+", shape=(len(keys), *level.shape[1:]))
                for n, level in enumerate(levels)
            ]
        for memory, level in zip(maps, levels, strict=True):
            if level.shape[1:] != memory.shape[1:]:
                raise ValueError(
                    f"picture '{part[0]}' has a feature map {tuple(level.shape[1:])}, others {memory.shape[1:]}: only "
                    "maps of one size can be cached. Set cache_features: false"
                )
            memory[start : start + len(part)] = level.view(torch.uint16).numpy()
        progress(start + len(part))
    for memory in maps:
        memory.flush()
    written = folder / f"cache.{os.getpid()}.tmp"
    written.write_text(
        json.dumps({"shapes": [memory.shape for memory in maps], "seconds": time.perf_counter() - begun})
    )
    written.replace(folder / "cache.json")
    return FeatureCache(folder, keys)
