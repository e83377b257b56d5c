"""Images from files, bytes, or as they are."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sparsight.errors import UserError

MAX_PIXELS = 150_000_000  # more are refused from the header, before decoding: each takes 4 bytes, 16 if transparent
_ALLOWED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
Image.init()
# Formats that are opened, whatever a file's name: Pillow would hand EPS to a program. Not every Pillow has AVIF.
FORMATS = tuple(name for name in _ALLOWED if name in Image.OPEN)


def load_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """An image as RGB: turned as its EXIF says, transparency laid on white, 16 bits brought to 8, an animation's first
    frame. The content decides the format, not the file's name.

    Args:
        source: a file, a file's bytes, or an opened image.
        name: for messages; the path if not given.

    Raises:
        UserError: the file is missing or cannot be read, has 32-bit pixels, or more than `MAX_PIXELS`.
    """
    with _opened(source, name) as opened:
        image: Image.Image = opened
        if isinstance(source, Image.Image):
            image = ImageOps.exif_transpose(opened)  # a copy: the caller's stays as it is
        else:
            ImageOps.exif_transpose(opened, in_place=True)
        image = _eight_bits(image, opened.format)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()  # before the file is closed; `convert` would make a second one of as many bytes
        return image


def size_of_image(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height as stored (EXIF may turn them), read from the header alone. Raises UserError as `load_image`."""
    with _opened(source, name) as opened:
        return opened.size


@contextmanager
def _opened(source: str | Path | bytes | Image.Image, name: str | None) -> Iterator[Image.Image]:
    """The image, not decoded yet; every error over it, also of the block, is a UserError that names it."""
    name = name or (str(source) if isinstance(source, str | Path) else "image")
    found: AbstractContextManager[Image.Image]
    try:
        if isinstance(source, Image.Image):
            if getattr(source, "tile", None) and source.format not in (*FORMATS, "MPO"):  # not decoded yet
                raise UnidentifiedImageError
            found = nullcontext(source)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
                found = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        with found as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")
            yield opened
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: cannot be read as an image: empty, or in no format that is known") from None
    except Exception as error:  # over broken bytes, decoders raise KeyError, struct.error and others
        raise UserError(f"{name}: cannot be read as an image: {error or type(error).__name__}") from None


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Deep grey to 8 bits; Pillow's own conversion clips, so that nearly all comes out white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError("32-bit channels do not say which value is white; save the image with 8 or 16 bits")
    return image
