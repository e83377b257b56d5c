"""A contact sheet: images with their conversations, to look at data before training on it."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sparsight.data.sources import Source
from sparsight.errors import UserError

_BACKGROUND = (236, 239, 244)


def contact_sheet(source: Source, n: int = 12, columns: int = 4) -> Image.Image:
    """The first ``n`` samples, in RGB.

    Raises:
        UserError: ``n`` or ``columns`` is below 1.
    """
    if n < 1 or columns < 1:
        raise UserError(f"n={n}, columns={columns}, expected at least 1")
    tiles = []
    for index in range(min(n, len(source))):
        sample = source[index]
        tiles.append(_tile([source.image(key) for key in sample.images], sample.messages))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    gap, width = 20, max(tile.width for tile in tiles)
    heights = [max(tile.height for tile in row) + 20 for row in rows]
    size = (gap + len(rows[0]) * (width + gap), gap + sum(heights) + gap * len(rows))
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, y = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            x = gap + column * (width + gap)
            draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), radius=10, fill="white")
            sheet.paste(tile, (x, y + 10))
        y += height + gap
    return sheet


def _tile(images: list[Image.Image], messages: list[dict[str, Any]], side: int = 256, margin: int = 12) -> Image.Image:
    """The images (fitted into a square of ``side``) with the turns below: question in grey, answer in blue."""
    font, line = ImageFont.load_default(15), 20
    lines: list[tuple[str, str]] = []
    for message in messages:
        colour = "#1d4ed8" if message["role"] == "assistant" else "#6b7280"
        text = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        lines += [(part, colour) for part in _wrap(text, font, side)]
    top = (side + margin) * len(images)
    tile = Image.new("RGB", (side + 2 * margin, top + margin + line * len(lines)), "white")
    for number, image in enumerate(images):
        scale = side / max(image.size)
        fitted = image.resize([max(1, round(length * scale)) for length in image.size])
        tile.paste(fitted, (margin, 2 + (side + margin) * number))
    draw = ImageDraw.Draw(tile)
    for number, (text, colour) in enumerate(lines):
        draw.text((margin, top + line * number), text, fill=colour, font=font)
    return tile


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines
