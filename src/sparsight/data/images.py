"""Images from files, bytes, or as they are."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sparsight.errors import UserError

# Refused from the header, before anything is decoded: 150 megapixels are 600 MB in memory.
MAX_PIXELS = 150_000_000
# The only formats that are opened, whatever a file is called: Pillow would hand EPS to Ghostscript, a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
Found = TypeVar("Found")


def load_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """A image as RGB: turned as its EXIF says, transparency laid on white, 16 bits brought to 8, an animation's first
    frame. What is in the file counts, not how its name ends.

    Args:
        source: a file, a file's bytes, or an opened image.
        name: what messages call it; the path if not given.

    Raises:
        UserError: the file is missing or cannot be read, has 32-bit pixels, or more than `MAX_PIXELS`; the message
            names it.
    """
    return _opened(source, name, _rgb)


def size_of_image(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height of a image from its header alone, as it is stored: EXIF may turn it.

    Raises:
        UserError: as `load_image`, but for what only decoding finds.
    """
    return _opened(source, name, _size)


def _opened(source: str | Path | bytes | Image.Image, name: str | None, use: Callable[[Image.Image], Found]) -> Found:
    name = name or (str(source) if isinstance(source, str | Path) else "image")
    try:
        if isinstance(source, Image.Image):
            lazy = bool(getattr(source, "tile", None))  # opened by somebody, and not decoded yet
            if lazy and source.format not in (*FORMATS, "MPO"):  # several JPEGs in one file
                raise UnidentifiedImageError
            return use(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known_formats())
        with opened:
            return use(opened)
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: cannot be read as a image: empty, or in no format that is known") from None
    except Exception as error:  # decoders raise all kinds of errors over broken bytes: KeyError, struct.error, ...
        raise UserError(f"{name}: cannot be read as a image: {error or type(error).__name__}") from None


@cache
def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has: it raises KeyError over others."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _size(opened: Image.Image) -> tuple[int, int]:
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    return width, height


def _rgb(opened: Image.Image) -> Image.Image:
    _size(opened)
    image = _eight_bits(ImageOps.exif_transpose(opened), opened.format)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Deep grey to 8 bits; Pillow's own conversion clips instead, so that nearly all comes out white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError("32-bit pixels, of which nobody knows what is white; save it with 8 or 16 bits")
    return image
