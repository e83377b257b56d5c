"""What scenes are drawn from: named cut-outs (emoji or shapes), cards with a number, grounds. Source: ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sparsight import assets

Colour = tuple[int, int, int]

# name, file, group; the first 16, 24 and 32 look as different as can be, and groups are of like size there,
# so that the name in an adversarial question does not tell the answer
_EMOJI = """
apple food 1f34e|dog animal 1f436|car machine 1f697|key machine 1f511|star nature 2b50|tree nature 1f333
fish animal 1f41f|clock home 23f0|ball toy 26bd|hat wear 1f3a9|banana food 1f34c|phone home 1f4f1
bicycle machine 1f6b2|crown wear 1f451|snowflake nature 2744-fe0f|guitar toy 1f3b8|frog animal 1f438
rainbow nature 1f308|house home 1f3e0|umbrella wear 2602-fe0f|robot toy 1f916|grape food 1f347
magnet machine 1f9f2|shirt wear 1f455|piano toy 1f3b9|cake food 1f382|penguin animal 1f427|balloon toy 1f388
heart toy 2764-fe0f|book home 1f4d5|butterfly animal 1f98b|camera home 1f4f7|gift toy 1f381|pizza food 1f355
panda animal 1f43c|rocket machine 1f680|anchor machine 2693|carrot food 1f955|elephant animal 1f418
train machine 1f682|mushroom nature 1f344|cactus nature 1f335|crab animal 1f980|dice toy 1f3b2
diamond wear 1f48e|moon nature 1f319|boat machine 26f5|hammer machine 1f528|cow animal 1f42e|glove wear 1f9e4
burger food 1f354|drum toy 1f941|bus machine 1f68c|snail animal 1f40c|flower nature 1f33b|trophy toy 1f3c6
globe nature 1f30d|pumpkin food 1f383|lion animal 1f981|ladder machine 1fa9c|plane machine 2708-fe0f
watermelon food 1f349|tent home 26fa|fire nature 1f525
"""
# families: several images of each kind, so that some can be held out
_FAMILIES = """
book print 1f4d5 1f4d9 1f4d3 1f4d4 1f4d2 1f4d7 1f4d8|heart sign 2764-fe0f 1f49b 1f49c 1f90e 1f5a4 1f49a 1f499 1f9e1
clock round 1f550 1f553 1f556 1f559 1f55c 1f55f 1f562 1f565|cat body 1f63a 1f63b 1f63c 1f640 1f638 1f63e 1f63d 1f639
car ride 1f697 1f693 1f698 1f694 1f695 1f699|ball round 26bd 1f3c0 1f3c8 1f94e 26be 1f3c9 1f3be 1f3d0
flower plant 1f338 1f33b 1f337 1f339 1f33a 1f33c|hand body 1f44b 1f44d 1f590-fe0f 1f44a 1f44e 1f91a 270a 270b
arrow sign 2b06-fe0f 2198-fe0f 2b05-fe0f 2197-fe0f 27a1-fe0f 2b07-fe0f|mail print 1f4e7 1f4e8 2709-fe0f 1f4e9
moon round 1f311 1f312 1f314 1f316 1f318 1f313 1f317|face body 1f603 1f604 1f601 1f606 1f642 1f609 1f60a 1f600
tree plant 1f334 1f384 1f333 1f332|train ride 1f686 1f684 1f685 1f69d 1f68a 1f687
"""


def _table(text: str) -> tuple[dict[str, tuple[str, ...]], dict[str, frozenset[str]]]:
    """Images and group by name."""
    rows = [entry.split() for entry in text.strip().replace("\n", "|").split("|")]
    return {row[0]: tuple(row[2:]) for row in rows}, {row[0]: frozenset({row[1]}) for row in rows}


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

# kind -> names of its images, and what a kind has in common with others: a group, or its colour and its shape
IMAGES: dict[str, dict[str, tuple[str, ...]]] = {"shapes": {name: (name,) for name in SHAPE_KINDS}}
TRAITS = {"shapes": {name: frozenset(name.split(" ")) for name in SHAPE_KINDS}}
for _set, _text_of in (("emoji", _EMOJI), ("families", _FAMILIES)):
    IMAGES[_set], TRAITS[_set] = _table(_text_of)


@dataclass(frozen=True)
class Ground:
    """What lies behind the things: "plain", "gradient" or "noise" between two colours."""

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
    mix = rng.random((7, 7, 1))
    blobs = mix * np.array(first) + (1 - mix) * np.array(second)
    smooth = Image.fromarray(blobs.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.integers(-14, 15, (size, size, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))


def cutout_folder(cutouts: str) -> Path | None:
    """Folder of the emoji, or None for shapes. Part of the cache key: tests move it."""
    return None if cutouts == "shapes" else assets.emoji_folder()


@lru_cache(maxsize=256)
def whole_cutout(folder: Path | None, name: str) -> Image.Image:
    """The cut-out at full size, RGBA, trimmed to what is visible."""
    if folder is None:
        colour, shape = name.split(" ")
        image = _draw_shape(colour, shape)
    else:
        with Image.open(folder / f"{name}.webp", formats=("WEBP",)) as file:
            image = file.convert("RGBA")
    visible = image.getchannel("A").point(lambda alpha: 255 * (alpha > 24))
    return image.crop(visible.getbbox())


@lru_cache(maxsize=1024)
def cutout(folder: Path | None, image: str, width: int, height: int) -> Image.Image:
    """The cut-out, RGBA, width x height."""
    return whole_cutout(folder, image).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _draw_shape(colour: str, shape: str, size: int = 256) -> Image.Image:
    """One shape, RGBA, drawn at 4x for smooth edges; a white rim keeps it apart from any ground."""
    s = 4 * size
    mask = Image.new("L", (s, s), 0)
    draw = ImageDraw.Draw(mask)

    def dots(*points: tuple[float, float]) -> None:
        draw.polygon([(x * s, y * s) for x, y in points], fill=255)

    if shape in ("circle", "ring", "moon"):
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
        if shape == "ring":
            draw.ellipse((0.27 * s, 0.27 * s, 0.73 * s, 0.73 * s), fill=0)
        if shape == "moon":
            draw.ellipse((0.3 * s, -0.12 * s, 1.18 * s, 0.76 * s), fill=0)
    elif shape == "square":
        dots((0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96))
    elif shape == "triangle":
        dots((0.5, 0.06), (1, 0.94), (0, 0.94))
    elif shape == "cross":
        dots((0.34, 0), (0.66, 0), (0.66, 1), (0.34, 1))
        dots((0, 0.34), (1, 0.34), (1, 0.66), (0, 0.66))
    elif shape == "star":
        turns = [(np.pi * i / 5, 0.5 if i % 2 == 0 else 0.21) for i in range(10)]
        dots(*((0.5 + r * float(np.sin(t)), 0.52 - r * float(np.cos(t))) for t, r in turns))
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 200)
        xs, ys = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        dots(*((0.5 + float(x) / 33, 0.46 - float(y) / 33) for x, y in zip(xs, ys, strict=True)))
    mask = mask.resize((size, size), Image.Resampling.LANCZOS)
    framed = Image.new("L", (size + 12, size + 12), 0)  # so that the rim follows the border too
    framed.paste(mask, (6, 6))
    inner = framed.filter(ImageFilter.MinFilter(11)).crop((6, 6, size + 6, size + 6))
    shade = np.linspace(1.06, 0.84, size)[:, None, None]
    body = np.clip(np.array(_COLOURS[colour]) * shade, 0, 255).repeat(size, axis=1).astype(np.uint8)
    image = Image.composite(Image.fromarray(body), Image.new("RGB", (size, size), "white"), inner)
    image.putalpha(mask)
    return image


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


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


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
