"""A contact sheet: images over their conversations, to look at data before training on it."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from sparsight.data.conversations import Sample
from sparsight.data.sources import Source

_SIDE, _MARGIN, _LINE = 256, 12, 20  # pixels: of an image, around it, of a line of text


def contact_sheet(source: Source, n: int = 12, columns: int = 4) -> Image.Image:
    """The first ``n`` samples, in RGB."""
    tiles = [_tile(source, source[index]) for index in range(min(n, len(source)))]
    width, height = tiles[0].width, max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (min(columns, len(tiles)) * width, -(-len(tiles) // columns) * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return sheet


def _tile(source: Source, sample: Sample) -> Image.Image:
    """A sample's images, side by side, over its turns: questions in grey, answers in blue."""
    lines = [
        (line, "#1d4ed8" if message["role"] == "assistant" else "#6b7280")
        for message in sample.messages
        for line in textwrap.wrap(" ".join(part.get("text", "") for part in message["content"]), 34)
    ]
    top = _SIDE * bool(sample.images) + 2 * _MARGIN
    tile = Image.new("RGB", (_SIDE + 2 * _MARGIN, top + _LINE * len(lines)), "white")
    for number, key in enumerate(sample.images):
        image = source.image(key)
        image.thumbnail((_SIDE // len(sample.images), _SIDE))
        tile.paste(image, (_MARGIN + number * _SIDE // len(sample.images), _MARGIN))
    draw = ImageDraw.Draw(tile)
    for number, (line, colour) in enumerate(lines):
        draw.text((_MARGIN, top - _MARGIN // 2 + _LINE * number), line, colour, ImageFont.load_default(15))
    return tile
