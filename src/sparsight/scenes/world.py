"""Scenes: things and their cells, as a pure function of (config, split, seed, index). No global generator is touched.

Boxes are (x1, y1, x2, y2) in pixels, right and bottom exclusive. Cells count row by row from the top left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from sparsight import assets
from sparsight.errors import UserError
from sparsight.scenes import drawing
from sparsight.scenes.drawing import IMAGES, LANDSCAPES, SHAPE_KINDS, Ground

Box = tuple[int, int, int, int]

SPLITS = ("train", "validation", "test")
_REPEAT = 0.35  # share of things that repeat a kind, so that counting is not always "1"
_MAX_OF_A_KIND = 4
_SIZES = 16  # distinct sizes of a cut-out: bounds the cache of resized ones


@dataclass(frozen=True)
class SceneConfig:
    """Settings of the images; `settings.data.SceneData` checks the ranges. Pixels are those of an image of 256 px.

    Args:
        kinds: how many kinds of things occur, the first ones of the list.
        thing_size: smallest and largest longer side of a thing; it must fit into a cell (256 / grid).
        numbers: probability of a printed number of `digits` (fewest, most) digits, font size `number_size`.
        noise: probability of a noisy ground, otherwise plain or a gradient.
        cutouts: "emoji", "shapes", or "auto" (emoji if they are installed); "families" are emoji with several images
            of a kind: the last fifth (one or more) is for test, as many before it for validation, the others are for
            training; "photos" are photographs of 15 kinds, split alike, on photographs of landscapes.
        held_out: share of the (kind, cell) pairs that no training scene shows and each other scene does.
        questions: the most question turns of a conversation.

    Raises:
        UserError: settings do not go together; the message shows the value and what was expected.
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
        kinds, cells, side = len(IMAGES.get(self.cutouts, SHAPE_KINDS)), self.grid**2, 256 // self.grid
        (few, many), most = self.digits, cells - (self.numbers > 0)
        width = max(drawing.card_size(self.number_size, many))
        for name, holds, expected in (
            ("image_size", self.image_size >= 32, "at least 32"),
            ("kinds", 2 <= self.kinds <= kinds, f"2 to {kinds}"),
            ("min_things", 1 <= self.min_things <= self.max_things, f"1 to max_things ({self.max_things})"),
            ("max_things", self.max_things <= most, f"at most {most}, a cell each, and one for a number"),
            ("digits", 1 <= few <= many <= 4, "(fewest, most) with 1 <= fewest <= most <= 4"),
            ("number_size", width <= side, f"{many} digits no wider than a cell of {side} px"),
            (
                "noise",
                self.cutouts != "photos" or self.noise == 0.5,
                "0.5: photos stand on landscapes instead",
            ),
        ):
            if not holds:
                raise UserError(f"scenes: {name} is {getattr(self, name)!r}, expected {expected}")

    def resolved(self) -> SceneConfig:
        """The same with `cutouts` settled. Raises UserError if emoji or photographs are asked for and absent."""
        found = drawing.cutout_folder(self.cutouts)
        if self.cutouts == "auto":
            return replace(self, cutouts="emoji" if found else "shapes")
        if found is None and self.cutouts != "shapes":
            raise assets.missing("photos" if self.cutouts == "photos" else "fluent-emoji-3d")
        return self


@dataclass(frozen=True)
class Thing:
    """One cut-out: kind, cell, its tight box, and which image of the kind it is."""

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

    def counts(self) -> Counter[str]:
        """How many things there are of each kind that occurs."""
        return Counter(thing.name for thing in self.things)

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator of this scene's own for each purpose."""
        return _rng(self.seed, self.split, self.index, *stream)

    def draw(self) -> Image.Image:
        """The image, RGB, image_size x image_size."""
        image = drawing.draw_ground(self.ground, self.config.image_size)
        folder = drawing.cutout_folder(self.config.cutouts)
        for thing in self.things:
            x1, y1, x2, y2 = thing.box
            drawn = drawing.cutout(folder, thing.image, x2 - x1, y2 - y1)
            image.paste(drawn, (x1, y1), drawn)
        if self.number is not None and self.number_box is not None:
            x1, y1, x2, y2 = self.number_box
            card = drawing.draw_card(self.number, x2 - x1, y2 - y1, self.ground.seed % len(drawing.CARDS))
            image.paste(card, (x1, y1), card)
        return image


def kind_names(config: SceneConfig) -> tuple[str, ...]:
    """The names of the kinds that occur; `config.cutouts` is settled."""
    return tuple(IMAGES[config.cutouts])[: config.kinds]


def images_of(config: SceneConfig, name: str, split: str) -> tuple[str, ...]:
    """The images of a kind that a split shows; of a kind with one alone, all splits show that."""
    every = IMAGES[config.cutouts][name]
    held, n = max(1, len(every) // 5), len(every)  # for validation, and for test
    own = {"train": every[: n - 2 * held], "validation": every[n - 2 * held : n - held], "test": every[n - held :]}
    return every if n == 1 else own[split]


def cell_names(grid: int) -> tuple[str, ...]:
    """The words for the cells: "top left", "top", ... for grid 3; the four corners for grid 2."""
    columns = ("left", "", "right") if grid == 3 else ("left", "right")
    rows = ("top", "", "bottom") if grid == 3 else ("top", "bottom")
    return tuple(f"{row} {column}".strip() or "middle" for row in rows for column in columns)


@lru_cache(maxsize=64)
def held_out_pairs(kinds: int, cells: int, share: float) -> frozenset[tuple[int, int]]:
    """The (number of the kind, cell) pairs that no training scene shows; each other scene shows one or more."""
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


def _rng(seed: int, split: str, index: int, *stream: int) -> np.random.Generator:
    if split not in SPLITS:
        raise UserError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS.index(split), index, *stream])))


def make_scene(config: SceneConfig, split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of the endless stream (split, seed), not drawn. Raises UserError for an unknown split."""
    config, rng = config.resolved(), _rng(seed, split, index, 0)
    placed = _place(config, rng, split == "train")
    things = tuple(_thing(config, rng, name, cell, split) for name, cell in placed)
    scene = Scene(config, split, seed, index, things, _ground(config, rng, split))
    if rng.random() >= config.numbers:
        return scene
    few, many = config.digits
    number = str(rng.integers(10 ** (few - 1) if few > 1 else 0, 10**many))
    free = sorted(set(range(config.grid**2)) - {cell for _, cell in placed})
    cell = free[rng.integers(len(free))]
    box = _box(config, rng, cell, *drawing.card_size(config.number_size, len(number)), config.image_size / 256)
    return replace(scene, number=number, number_cell=cell, number_box=box)


def _place(config: SceneConfig, rng: np.random.Generator, train: bool) -> list[tuple[str, int]]:
    """Kinds and cells. Training takes no held-out pair; other splits take one first, then any."""
    names, cells = kind_names(config), config.grid**2
    held = held_out_pairs(config.kinds, cells, config.held_out)
    count = int(rng.integers(config.min_things, config.max_things + 1))
    order = [int(cell) for cell in rng.permutation(cells)[:count]]
    placed: list[tuple[int, int]] = []
    if held and not train:
        first = sorted(held)[rng.integers(len(held))]
        placed, order = [first], [cell for cell in order if cell != first[1]][: count - 1]
    for cell in order:
        used = Counter(kind for kind, _ in placed)
        allowed = [kind for kind in range(config.kinds) if not (train and (kind, cell) in held)]
        again = [kind for kind in allowed if 0 < used[kind] < _MAX_OF_A_KIND]
        new = [kind for kind in allowed if not used[kind]]
        repeat = bool(again) and (not new or rng.random() < _REPEAT)
        pool = (again if repeat else new) or allowed
        placed.append((pool[rng.integers(len(pool))], cell))
    return [(names[kind], cell) for kind, cell in sorted(placed, key=lambda pair: pair[1])]


def _box(config: SceneConfig, rng: np.random.Generator, cell: int, width: float, height: float, scale: float) -> Box:
    """A box of width x height, scaled, anywhere within the cell."""
    sides = max(1, int(width * scale)), max(1, int(height * scale))
    edges = [i * config.image_size // config.grid for i in range(config.grid + 1)]
    row, column = divmod(cell, config.grid)
    x, y = (
        edges[at] + int(rng.integers(edges[at + 1] - edges[at] - side + 1))
        for at, side in zip((column, row), sides, strict=True)
    )
    return x, y, x + sides[0], y + sides[1]


def _thing(config: SceneConfig, rng: np.random.Generator, name: str, cell: int, split: str) -> Thing:
    images = images_of(config, name, split)
    image = images[rng.integers(len(images))] if len(images) > 1 else images[0]
    low, high = config.thing_size
    size = (low + (high - low) * int(rng.integers(_SIZES)) / (_SIZES - 1)) * config.image_size / 256
    width, height = drawing.whole_cutout(drawing.cutout_folder(config.cutouts), image).size
    return Thing(name, cell, _box(config, rng, cell, width, height, size / max(width, height)), image)


def _ground(config: SceneConfig, rng: np.random.Generator, split: str) -> Ground:
    low, high = (186, 250) if rng.random() < 0.6 else (24, 92)  # light or dark
    first, second = (tuple(int(v) for v in rng.integers(low, high, 3)) for _ in range(2))
    kind = "noise" if rng.random() < config.noise else ("plain", "gradient")[rng.integers(2)]
    if config.cutouts == "photos":
        kind = LANDSCAPES[split][rng.integers(len(LANDSCAPES[split]))]
    return Ground(kind, (first, second), int(rng.integers(2**31)))  # type: ignore[arg-type]
