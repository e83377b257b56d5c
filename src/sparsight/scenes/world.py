"""Scenes: which things stand where, as a pure function of (config, split, seed, index). Source: ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from sparsight import assets
from sparsight.errors import UserError
from sparsight.scenes.drawing import (
    CARDS,
    IMAGES,
    SHAPE_KINDS,
    Ground,
    card_size,
    cutout,
    cutout_folder,
    draw_card,
    draw_ground,
    whole_cutout,
)

Box = tuple[int, int, int, int]

TASKS = ("caption", "existence", "count", "naming", "position", "text", "grounding")
SPLITS = ("train", "validation", "test")
# a third of the first turns are captions
WEIGHTS: Mapping[str, float] = {**dict.fromkeys(TASKS, 1.0), "caption": 3.0}

_REPEAT = 0.35  # share of things that repeat a kind, so that counting is not always "1"
_MAX_OF_A_KIND = 4
_SIZES = 16  # distinct sizes of a cut-out: bounds the cache of resized ones


@dataclass(frozen=True)
class SceneConfig:
    """What the images hold. Pixel lengths are for a image of 256 px and scale with `image_size`.

    Args:
        kinds: how many kinds of things occur, the first ones of the list (2..64).
        thing_size: smallest and largest longer side of a thing; it must fit into a cell (256 / grid).
        numbers: probability of a printed number of `digits` (fewest, most) digits, font size `number_size`.
        noise: probability of a noisy ground, otherwise plain or a gradient.
        cutouts: "emoji", "shapes", or "auto" (emoji if they are installed); "families" are emoji with several images
            of a kind: the last one is for test, the one before it for validation, the others are for training.
        held_out: share of the (kind, cell) pairs that no training scene shows and each other scene does.
        questions: the most question turns of a conversation.

    Raises: ValueError that shows the value and what was expected.
    """

    image_size: int = 256
    kinds: int = 32
    min_things: int = 1
    max_things: int = 6
    thing_size: tuple[int, int] = (48, 84)
    numbers: float = 0.5
    digits: tuple[int, int] = (1, 2)
    number_size: int = 40
    noise: float = 0.5
    cutouts: str = "auto"
    held_out: float = 0.1
    questions: int = 6
    grid: int = 3

    def __post_init__(self) -> None:
        for name in ("thing_size", "digits"):  # YAML and JSON give lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        cell, most = 256 // self.grid if self.grid in (2, 3) else 0, self.grid**2
        low, high = self.thing_size if len(self.thing_size) == 2 else (0, 0)
        few, many = self.digits if len(self.digits) == 2 else (0, 0)
        most_kinds = len(IMAGES.get(self.cutouts, SHAPE_KINDS))
        rules: dict[str, tuple[bool, str]] = {
            "grid": (self.grid in (2, 3), "2 or 3"),
            "image_size": (self.image_size >= 32, "at least 32"),
            "kinds": (2 <= self.kinds <= most_kinds, f"2 to {most_kinds}"),
            "min_things": (1 <= self.min_things <= self.max_things, f"1 to max_things ({self.max_things})"),
            "max_things": (
                self.max_things <= 8 and self.max_things + (self.numbers > 0) <= most,
                f"at most 8, and with a printed number no more than the {most} cells",
            ),
            "thing_size": (8 <= low <= high <= cell, f"(least, most) with 8 <= least <= most <= {cell}"),
            "numbers": (0 <= self.numbers <= 1, "a probability"),
            "digits": (1 <= few <= many <= 4, "(fewest, most) with 1 <= fewest <= most <= 4"),
            "number_size": (
                self.number_size >= 8 and max(card_size(self.number_size, many)) <= cell,
                f"at least 8, and {many} digits no wider than a cell of {cell} px",
            ),
            "noise": (0 <= self.noise <= 1, "a probability"),
            "cutouts": (self.cutouts in ("auto", *IMAGES), "auto, shapes, emoji or families"),
            "held_out": (0 <= self.held_out <= 0.5, "0 to 0.5"),
            "questions": (self.questions >= 1, "at least 1"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UserError(f"SceneConfig.{name} is {getattr(self, name)!r}, expected {expected}")

    def resolved(self) -> SceneConfig:
        """The same with `cutouts` settled. Raises FileNotFoundError if emoji are asked for and absent."""
        found = assets.emoji_folder()
        if self.cutouts in ("emoji", "families") and found is None:
            raise FileNotFoundError(
                f"cutouts='{self.cutouts}', but {assets.assets_dir()}/fluent-emoji-3d lacks them: run `make assets`, "
                "or set SPARSIGHT_ASSETS to the folder that has them"
            )
        return replace(self, cutouts="emoji" if found else "shapes") if self.cutouts == "auto" else self


@dataclass(frozen=True)
class Thing:
    """One cut-out: kind, cell (0 = top left), its tight box in pixels, and which image of the kind it is."""

    name: str
    cell: int
    box: Box
    image: str


@dataclass(frozen=True)
class Scene:
    """The whole truth about one image. `things` are in reading order; `config.cutouts` is settled."""

    config: SceneConfig
    split: str
    seed: int
    index: int
    things: tuple[Thing, ...]
    ground: Ground
    number: str | None = None
    number_cell: int | None = None
    number_box: Box | None = None

    @property
    def image_size(self) -> int:
        """Side of the square image in pixels."""
        return self.config.image_size

    def counts(self) -> Counter[str]:
        """How many things there are of each kind that occurs."""
        return Counter(thing.name for thing in self.things)

    def draw(self) -> Image.Image:
        """The image, RGB, image_size x image_size."""
        image = draw_ground(self.ground, self.image_size)
        for thing in self.things:
            x1, y1, x2, y2 = thing.box
            drawn = cutout(cutout_folder(self.config.cutouts), thing.image, x2 - x1, y2 - y1)
            image.paste(drawn, (x1, y1), drawn)
        if self.number is not None and self.number_box is not None:
            x1, y1, x2, y2 = self.number_box
            card = draw_card(self.number, x2 - x1, y2 - y1, self.ground.seed % len(CARDS))
            image.paste(card, (x1, y1), card)
        return image


# ------------------------------------------------------------------------------------------- names and pairs


def _images(config: SceneConfig) -> dict[str, tuple[str, ...]]:
    """The images of every kind. Looks for the emoji only where it must: this is asked many times a scene."""
    return IMAGES[config.resolved().cutouts if config.cutouts == "auto" else config.cutouts]


def kind_names(config: SceneConfig) -> tuple[str, ...]:
    """The names of the kinds that occur, `config.kinds` of them."""
    return tuple(_images(config))[: config.kinds]


def images_of(config: SceneConfig, name: str, split: str) -> tuple[str, ...]:
    """The images of a kind that a split shows; of a kind with one alone, all splits show that."""
    every = _images(config)[name]
    if len(every) == 1:
        return every
    return {"train": every[:-2], "validation": every[-2:-1], "test": every[-1:]}[split]


def cell_names(grid: int) -> tuple[str, ...]:
    """The words for the cells, row by row: "top left", "top", ... for grid 3; the four corners for grid 2."""
    columns = ("left", "", "right") if grid == 3 else ("left", "right")
    rows = ("top", "", "bottom") if grid == 3 else ("top", "bottom")
    return tuple(f"{row} {column}".strip() or "middle" for row in rows for column in columns)


@lru_cache(maxsize=64)
def _held_out(kinds: int, cells: int, share: float) -> frozenset[tuple[int, int]]:
    wanted = max(1, round(share * kinds * cells)) if share else 0
    order = np.random.Generator(np.random.Philox(20240229)).permutation(kinds * cells)
    chosen: list[tuple[int, int]] = []
    by_kind, by_cell = Counter[int](), Counter[int]()
    per_kind, per_cell = -(-wanted // kinds), -(-wanted // cells)
    for kind, cell in (divmod(int(pair), cells) for pair in order):
        # evenly spread, so that no kind and no cell is lost to training
        if len(chosen) < wanted and by_kind[kind] < per_kind and by_cell[cell] < per_cell:
            chosen.append((kind, cell))
            by_kind[kind] += 1
            by_cell[cell] += 1
    return frozenset(chosen)


def held_out_pairs(config: SceneConfig) -> frozenset[tuple[str, int]]:
    """The (kind, cell) pairs that never occur in training; each other scene shows at least one."""
    names, pairs = kind_names(config), _held_out(config.kinds, config.grid**2, config.held_out)
    return frozenset((names[kind], cell) for kind, cell in pairs)


def _rng(seed: int, split: str, index: int, *stream: int) -> np.random.Generator:
    if split not in SPLITS:
        raise UserError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    key = np.random.SeedSequence([seed, SPLITS.index(split), index, *stream])
    return np.random.Generator(np.random.Philox(key))


# -------------------------------------------------------------------------------------------- making a scene


def make_scene(config: SceneConfig, split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of the endless stream (split, seed), not drawn. ValueError for an unknown split."""
    config, rng = config.resolved(), _rng(seed, split, index, 0)
    placed = _place(config, rng, split == "train")
    things = tuple(_thing(config, rng, name, cell, split) for name, cell in placed)
    ground = _make_ground(config, rng)
    if rng.random() >= config.numbers:
        return Scene(config, split, seed, index, things, ground)
    few, many = config.digits
    number = str(rng.integers(10 ** (few - 1) if few > 1 else 0, 10**many))
    taken = {cell for _, cell in placed}
    free = [cell for cell in range(config.grid**2) if cell not in taken]
    cell = free[rng.integers(len(free))]
    scale = config.image_size / 256
    size = card_size(config.number_size, len(number))
    box = _jitter(config, rng, cell, max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))
    return Scene(config, split, seed, index, things, ground, number, cell, box)


def _place(config: SceneConfig, rng: np.random.Generator, train: bool) -> list[tuple[str, int]]:
    """Kinds and cells. Train takes no held-out pair; other splits take one first, then any."""
    names, cells = kind_names(config), config.grid**2
    held = _held_out(config.kinds, cells, config.held_out)
    count = int(rng.integers(config.min_things, config.max_things + 1))
    order = [int(cell) for cell in rng.permutation(cells)[:count]]
    placed: list[tuple[int, int]] = []
    if held and not train:
        first = sorted(held)[rng.integers(len(held))]
        placed, order = [first], [cell for cell in order if cell != first[1]][: count - 1]
    for cell in order:
        used = Counter(kind for kind, _ in placed)
        allowed = [k for k in range(config.kinds) if not (train and (k, cell) in held)]
        again = [k for k in allowed if 0 < used[k] < _MAX_OF_A_KIND]
        new = [k for k in allowed if not used[k]]
        repeat = bool(again) and (not new or rng.random() < _REPEAT)
        pool = (again if repeat else new) or allowed
        placed.append((pool[rng.integers(len(pool))], cell))
    return [(names[kind], cell) for kind, cell in sorted(placed, key=lambda pair: pair[1])]


def _jitter(config: SceneConfig, rng: np.random.Generator, cell: int, width: int, height: int) -> Box:
    row, column = divmod(cell, config.grid)
    edges = [i * config.image_size // config.grid for i in range(config.grid + 1)]
    x = edges[column] + int(rng.integers(edges[column + 1] - edges[column] - width + 1))
    y = edges[row] + int(rng.integers(edges[row + 1] - edges[row] - height + 1))
    return x, y, x + width, y + height


def _thing(config: SceneConfig, rng: np.random.Generator, name: str, cell: int, split: str) -> Thing:
    images = images_of(config, name, split)
    image = images[rng.integers(len(images))] if len(images) > 1 else images[0]
    low, high = config.thing_size
    size = (low + (high - low) * int(rng.integers(_SIZES)) / (_SIZES - 1)) * config.image_size / 256
    width, height = whole_cutout(cutout_folder(config.cutouts), image).size
    scale = size / max(width, height)
    box = _jitter(config, rng, cell, max(1, int(width * scale)), max(1, int(height * scale)))
    return Thing(name, cell, box, image)


def _make_ground(config: SceneConfig, rng: np.random.Generator) -> Ground:
    light = rng.random() < 0.6
    low, high = (186, 250) if light else (24, 92)
    first, second = (tuple(int(v) for v in rng.integers(low, high, 3)) for _ in range(2))
    kind = "noise" if rng.random() < config.noise else ("plain", "gradient")[rng.integers(2)]
    return Ground(kind, (first, second), int(rng.integers(2**31)))  # type: ignore[arg-type]
