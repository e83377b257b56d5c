"""Pictures from files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def load_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Read a picture as RGB: turned as its EXIF says, transparency laid on white, 16 bits brought to 8.

    Args:
        content: the picture's bytes where it is no file of its own; ``path`` then names it in messages.

    Raises:
        ValueError: the file is missing or cannot be read, or has 32-bit pixels; the message names it.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as opened:
            picture = _eight_bits(ImageOps.exif_transpose(opened), opened.format)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture: {error}") from None


def _eight_bits(picture: Image.Image, file_format: str | None) -> Image.Image:
    """Deep grey to 8 bits; Pillow's own conversion clips instead, so that nearly all comes out white."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels, of which nobody knows what is white; save it with 8 or 16 bits")
    return picture
