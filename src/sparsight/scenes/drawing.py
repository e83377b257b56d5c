"""Drawing: named cut-outs (emoji, shapes or photographs), cards with a number, grounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sparsight import assets

Colour = tuple[int, int, int]

_COLOURS: dict[str, Colour] = {
    "red": (222, 38, 44),
    "blue": (38, 92, 226),
    "yellow": (255, 214, 10),
    "green": (34, 150, 60),
    "purple": (126, 44, 178),
    "orange": (255, 134, 12),
    "pink": (255, 142, 196),
    "brown": (124, 74, 34),
}
_SHAPES = ("circle", "star", "square", "heart", "triangle", "cross", "ring", "moon")
# each block of eight shows every colour and every shape once
SHAPE_KINDS = tuple(f"{c} {_SHAPES[(i + 3 * b) % 8]}" for b in range(8) for i, c in enumerate(_COLOURS))

# Set -> kind -> its group (of photographs "group folder"), then its images. The first 16, 24 and 32 emoji and 12 kinds
# of photographs look as different as possible, and groups are of like size there, so that the name in an adversarial
# question does not give the answer away.
_FILES: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("kinds.json").read_text())
LANDSCAPES = _FILES.pop("landscapes")  # by split; the photographs that those of things stand on


def _paths(group: str, *images: str) -> tuple[str, ...]:
    """Paths of a kind's images below `cutout_folder`."""
    _, _, folder = group.partition(" ")
    return tuple(f"stamps/{folder}/{image}.png" if folder else f"{image}.webp" for image in images)


# Set -> kind -> its images, and the traits that it shares with others: a group, or its colour and its shape.
IMAGES = {name: {kind: _paths(*images) for kind, images in kinds.items()} for name, kinds in _FILES.items()}
TRAITS = {name: {kind: {group.split()[0]} for kind, (group, *_) in kinds.items()} for name, kinds in _FILES.items()}
IMAGES["shapes"] = {kind: (kind,) for kind in SHAPE_KINDS}
TRAITS["shapes"] = {kind: set(kind.split()) for kind in SHAPE_KINDS}


@dataclass(frozen=True)
class Ground:
    """The background: "plain", "gradient" or "noise" between two colours, or the name of a landscape."""

    kind: str
    colours: tuple[Colour, Colour]
    seed: int


def draw_ground(ground: Ground, size: int) -> Image.Image:
    """The ground alone, RGB, size x size."""
    first, second = ground.colours
    if ground.kind == "plain":
        return Image.new("RGB", (size, size), first)
    if ground.kind == "gradient":
        corners = np.array([[first, second], [first, second]], dtype=np.uint8)
        corners = corners if ground.seed % 2 else corners.transpose(1, 0, 2)
        return Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)
    rng = np.random.Generator(np.random.Philox(ground.seed))
    if ground.kind != "noise":
        return _landscape(ground.kind, size, rng)
    mix = rng.random((7, 7, 1))
    blobs = mix * np.array(first) + (1 - mix) * np.array(second)
    smooth = Image.fromarray(blobs.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.integers(-14, 15, (size, size, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))


def _landscape(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A random square of the photograph (720 x 360 pixels), at least two thirds of its height."""
    folder = cutout_folder("photos")
    assert folder is not None, "the photographs went away"
    with Image.open(folder / "land" / f"{name}.jpg", formats=("JPEG",)) as file:
        photo = file.convert("RGB")
    side = int(rng.integers(photo.height * 2 // 3, photo.height + 1))
    x, y = (int(rng.integers(whole - side + 1)) for whole in photo.size)
    return photo.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side))


def cutout_folder(cutouts: str) -> Path | None:
    """Folder of the emoji or photographs; None for shapes, or if absent. Part of the cache key: tests move it."""
    if cutouts == "photos":
        return assets.photos_folder()
    return None if cutouts == "shapes" else assets.emoji_folder()


@lru_cache(maxsize=256)
def whole_cutout(folder: Path | None, name: str) -> Image.Image:
    """The cut-out at full size, RGBA, trimmed to what is visible."""
    if folder is None:
        colour, shape = name.split(" ")
        image = _draw_shape(colour, shape)
    else:
        with Image.open(folder / name, formats=("WEBP", "PNG")) as file:
            image = file.convert("RGBA")
    visible = image.getchannel("A").point(lambda alpha: 255 * (alpha > 24))
    return image.crop(visible.getbbox())


@lru_cache(maxsize=1024)
def cutout(folder: Path | None, image: str, width: int, height: int) -> Image.Image:
    """The cut-out, RGBA, width x height."""
    return whole_cutout(folder, image).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _polygons() -> dict[str, list[list[tuple[float, float]]]]:
    """Corners of the shapes that have some, 0 to 1."""
    turns = [(np.pi * i / 5, 0.5 if i % 2 == 0 else 0.21) for i in range(10)]
    t = np.linspace(0, 2 * np.pi, 200)
    xs, ys = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return {
        "square": [[(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)]],
        "triangle": [[(0.5, 0.06), (1, 0.94), (0, 0.94)]],
        "cross": [[(0.34, 0), (0.66, 0), (0.66, 1), (0.34, 1)], [(0, 0.34), (1, 0.34), (1, 0.66), (0, 0.66)]],
        "star": [[(0.5 + r * float(np.sin(t)), 0.52 - r * float(np.cos(t))) for t, r in turns]],
        "heart": [[(0.5 + float(x) / 33, 0.46 - float(y) / 33) for x, y in zip(xs, ys, strict=True)]],
    }


def _draw_shape(colour: str, shape: str, size: int = 256) -> Image.Image:
    """One shape, RGBA, drawn at 4x for smooth edges; a white rim keeps it apart from any ground."""
    s = 4 * size
    mask = Image.new("L", (s, s), 0)
    draw = ImageDraw.Draw(mask)
    for corners in _polygons().get(shape, []):
        draw.polygon([(x * s, y * s) for x, y in corners], fill=255)
    if shape in ("circle", "ring", "moon"):
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
    if shape == "ring":
        draw.ellipse((0.27 * s, 0.27 * s, 0.73 * s, 0.73 * s), fill=0)
    if shape == "moon":
        draw.ellipse((0.3 * s, -0.12 * s, 1.18 * s, 0.76 * s), fill=0)
    mask = mask.resize((size, size), Image.Resampling.LANCZOS)
    framed = Image.new("L", (size + 12, size + 12), 0)  # so that the rim follows the border too
    framed.paste(mask, (6, 6))
    inner = framed.filter(ImageFilter.MinFilter(11)).crop((6, 6, size + 6, size + 6))
    shade = np.linspace(1.06, 0.84, size)[:, None, None]
    body = np.clip(np.array(_COLOURS[colour]) * shade, 0, 255).repeat(size, axis=1).astype(np.uint8)
    image = Image.composite(Image.fromarray(body), Image.new("RGB", (size, size), "white"), inner)
    image.putalpha(mask)
    return image


_font = lru_cache(maxsize=32)(ImageFont.load_default)
# card and digits: legible on any ground
CARDS: tuple[tuple[Colour, Colour], ...] = (
    ((255, 255, 255), (24, 26, 32)),
    ((255, 255, 255), (178, 24, 32)),
    ((255, 255, 255), (18, 66, 160)),
    ((28, 30, 38), (255, 255, 255)),
    ((28, 30, 38), (255, 214, 60)),
)


def card_size(font: int, digits: int) -> tuple[int, int]:
    """Width and height of a card for so many digits, in the font's unit."""
    return round(font * (0.6 * digits + 0.4)), round(font * 1.2)


@lru_cache(maxsize=512)
def draw_card(number: str, width: int, height: int, style: int) -> Image.Image:
    """A rounded card with the number on it, RGBA, width x height."""
    paper, ink = CARDS[style]
    mask = Image.new("L", (4 * width, 4 * height), 0)
    edge = (0, 0, 4 * width - 1, 4 * height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(edge, radius=0.7 * height, fill=255)
    card = Image.new("RGBA", (width, height), (*paper, 255))
    font = _font(max(4, round(height / 1.2)))
    ImageDraw.Draw(card).text((width / 2, height / 2), number, fill=(*ink, 255), font=font, anchor="mm")
    card.putalpha(mask.resize((width, height), Image.Resampling.LANCZOS))
    return card
