"""A folder of tiny images, laid out as `make photos` lays out the photographs that scenes show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sparsight.scenes.drawing import IMAGES, LANDSCAPES


def make_photos(folder: Path) -> Path:
    """Noise of another shape and colour for each thing, with an invisible margin, and for each landscape."""
    rng = np.random.default_rng(0)
    for name in (name for images in IMAGES["photos"].values() for name in images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(8, 40, 2)
        pixels = np.zeros((height + 4, width + 6, 4), dtype=np.uint8)
        pixels[1:-3, 2:-4] = rng.integers(0, 256, (height, width, 4))
        pixels[1:-3, 2:-4, 3] = 255
        Image.fromarray(pixels).save(folder / name)
    (folder / "land").mkdir()
    for name in (name for names in LANDSCAPES.values() for name in names):
        Image.fromarray(rng.integers(0, 256, (18, 36, 3), dtype=np.uint8)).save(folder / "land" / f"{name}.jpg")
    return folder
