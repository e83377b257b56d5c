"""Questions about scenes and their answers, the scores of boxes and captions, and blind guessing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from sparsight.errors import UserError
from sparsight.scenes.drawing import TRAITS
from sparsight.scenes.world import Box, Scene, SceneConfig, Thing, cell_names, kind_names, make_scene

_TOTAL = "how many things ?"
_TEXT = "what number is printed ?"
_CAPTION = "describe the image ."

# (question, answer, the fact that it gives away, boxes it is about): two turns about a fact would answer each other
_Turn = tuple[str, str, str, tuple[Box | None, ...]]


_scene = lru_cache(4096)(make_scene)  # several questions are asked about each, and in each stage


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _pick(rng: np.random.Generator, options: list[Any]) -> Any:
    return options[rng.integers(len(options))]


def _boxes(scene: Scene, *names: str) -> tuple[Box, ...]:
    """Of things of these kinds, or of all things."""
    return tuple(thing.box for thing in scene.things if not names or thing.name in names)


def _caption(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    parts = [(thing.cell, _with_article(thing.name)) for thing in scene.things]
    if scene.number_cell is not None:
        parts.append((scene.number_cell, f"the number {scene.number}"))
    return _CAPTION, " , ".join(words for _, words in sorted(parts)), _CAPTION, (*_boxes(scene), scene.number_box)


def _existence(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    """Yes or no by a fair coin, and only where both can be asked, so that neither is more likely.

    Half of the absent kinds are adversarial: like one in the image (same group, or colour, or shape).
    """
    here, alike = scene.counts(), TRAITS[scene.config.cutouts]
    free = [name for name in kind_names(scene.config) if f"is {name}" not in asked]
    present, absent = [name for name in free if name in here], [name for name in free if name not in here]
    if not present or not absent:
        return None
    if rng.random() < 0.5:
        name, answer = _pick(rng, present), "yes"
    else:
        near = [name for name in absent if any(alike[name] & alike[shown] for shown in here)]
        name, answer = _pick(rng, near if near and rng.random() < 0.5 else absent), "no"
    return f"is there {_with_article(name)} ?", answer, f"is {name}", _boxes(scene, name)


def _count(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    """All things (the number is none), an absent kind (0), or a present one, rather one that repeats."""
    here = scene.counts()
    # where nothing repeats, a present kind would always be "1"
    total, zero = (0.15, 0.1) if max(here.values()) > 1 else (0.45, 0.25)
    flavour = rng.random()
    if flavour < total:
        return _TOTAL, str(len(scene.things)), _TOTAL, _boxes(scene)
    absent = [name for name in kind_names(scene.config) if name not in here]
    if flavour < total + zero and absent:
        name = _pick(rng, absent)
    else:
        name = _pick(rng, [name for name, n in here.items() for _ in range((1, 5, 12, 20)[min(n, 4) - 1])])
    return f"how many : {name} ?", str(here[name]), f"count {name}", _boxes(scene, name)


def _naming(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    return _about(_pick(rng, list(scene.things)), "what is at the {cell} ?", "{name}", scene)


def _position(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    return _about(_single(scene, rng, asked), "where is the {name} ?", "{cell}", scene)


def _grounding(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    return _about(_single(scene, rng, asked), "box of the {name} ?", "{box}", scene)


def _single(scene: Scene, rng: np.random.Generator, asked: set[str]) -> Thing | None:
    here = scene.counts()
    options = [thing for thing in scene.things if here[thing.name] == 1 and f"thing {thing.cell}" not in asked]
    return _pick(rng, options) if options else None


def _about(thing: Thing | None, question: str, answer: str, scene: Scene) -> _Turn | None:
    if thing is None:
        return None
    cell, box = cell_names(scene.config.grid)[thing.cell], format_box(thing.box, scene.config.image_size)
    says = {"name": thing.name, "cell": cell, "box": box}
    return question.format(**says), answer.format(**says), f"thing {thing.cell}", (thing.box,)


def _text(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    return None if scene.number is None else (_TEXT, scene.number, _TEXT, (scene.number_box,))


def _compare(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    """Two kinds in the image, not as many of each; either order is as likely, and so are yes and no."""
    here = {name: count for name, count in scene.counts().items() if f"count {name}" not in asked}
    pairs = [(first, second) for first in here for second in here if here[first] != here[second]]
    if not pairs:
        return None
    first, second = _pick(rng, pairs)
    question, answer = f"are there more : {first} than {second} ?", "yes" if here[first] > here[second] else "no"
    return question, answer, f"compare {sorted((first, second))}", _boxes(scene, first, second)


def _count_where(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    """Things of a kind in a row, rather many than none; of no kind whose cell was told."""
    grid, told = scene.config.grid, {thing.name for thing in scene.things if f"thing {thing.cell}" in asked}
    spots = [(thing.name, thing.cell // grid) for thing in scene.things if thing.name not in told]
    options = [(spots.count((name, row)), name, row) for name in dict(spots) for row in range(grid)]
    if not options:
        return None
    count = _pick(rng, [each for each in sorted({n for n, *_ in options}) for _ in range((5, 5, 14, 30)[each])])
    _, name, row = _pick(rng, [each for each in options if each[0] == count])
    question = f"how many in the {('top', 'middle', 'bottom')[2 * row // (grid - 1)]} row : {name} ?"
    return question, str(count), f"where {name}", _boxes(scene, name)


def _relation(scene: Scene, rng: np.random.Generator, asked: set[str]) -> _Turn | None:
    """From a thing, the only one of its kind, to the next one, and around the corner to the one that is asked for."""
    options = [
        (f"what is {way} the thing {first} the {start.name} ?", start, between, end)
        for start in scene.things
        for first, between in _next_to(scene, start)
        for way, end in _next_to(scene, between)
        if scene.counts()[start.name] == 1 and end != start and f"thing {end.cell}" not in asked
    ]
    question, *chain = _pick(rng, options) if options else ("",)
    return (question, chain[2].name, f"thing {chain[2].cell}", tuple(each.box for each in chain)) if chain else None


def _next_to(scene: Scene, thing: Thing) -> Iterator[tuple[str, Thing]]:
    """Things in the next cell, where nothing else is in that direction: no one can mean another."""
    cell, grid = thing.cell, scene.config.grid
    left, right = range(cell - 1, cell - cell % grid - 1, -1), range(cell + 1, cell - cell % grid + grid)
    up, down = range(cell - grid, -1, -grid), range(cell + grid, grid**2, grid)
    for way, ahead in {"above": up, "below": down, "left of": left, "right of": right}.items():
        found = [other for other in scene.things if other.cell in ahead]
        if len(found) == 1 and found[0].cell == ahead[0] and scene.number_cell not in ahead:
            yield way, found[0]


TASKS = ("caption", "existence", "count", "naming", "position", "text", "grounding")
STEPS = {"compare": 2, "count_where": 2, "relation": 3}  # of tasks asked only where they are named; others take one
ALL_TASKS = (*TASKS, *STEPS)
_Ask = Callable[[Scene, np.random.Generator, set[str]], _Turn | None]
_ASKS = (_caption, _existence, _count, _naming, _position, _text, _grounding, _compare, _count_where, _relation)
_ASK: dict[str, _Ask] = dict(zip(ALL_TASKS, _ASKS, strict=True))
# a third of the first turns are captions
WEIGHTS: Mapping[str, float] = {**dict.fromkeys(TASKS, 1.0), "caption": 3.0}


def single_question(scene: Scene, task: str, seed: int = 0) -> tuple[str, str] | None:
    """One (question, answer) for evaluation, or None where the scene does not allow this task."""
    found = graded_question(scene, task, seed)
    return found[:2] if found else None


def graded_question(scene: Scene, task: str, seed: int = 0) -> tuple[str, str, dict[str, int | None]] | None:
    """The same with its grades: by name, whole numbers, or None where it has none of that name (docs/scenes.md)."""
    turn = _ASK[task](scene, scene.rng(1, seed, ALL_TASKS.index(task)), set())
    if turn is None:
        return None
    marks = {box for box in (*_boxes(scene), scene.number_box) if box}
    sides = [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in marks.intersection(turn[3])]
    others = len(marks) - len(sides) + (scene.ground.kind not in ("plain", "gradient"))
    grades = {"steps": STEPS.get(task, 1), "things": len(scene.things), "clutter": others}
    size = round(100 * min(sides) / scene.config.image_size) if sides else None
    digits = len(scene.number) if scene.number and scene.number_box in turn[3] else None
    return *turn[:2], grades | {"size": size, "digits": digits}


def conversation(scene: Scene, seed: int = 0, tasks: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Messages in the HF format; the image stands in the first user turn alone. No question comes twice.

    A caption can only come first. It gives away what is there, so after it only position and grounding are asked. A
    thing is asked for by one of naming, position and grounding: they tell each other.

    Args:
        tasks: weight of each task; those left out are not asked. None: `WEIGHTS`.

    Raises:
        UserError: the scene allows none of the tasks.
    """
    weights = WEIGHTS if tasks is None else tasks
    messages: list[dict[str, Any]] = []
    for question, answer in _turns(scene, scene.rng(2, seed), weights):
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if not messages:
        raise UserError(f"scene {scene.index} of {scene.split} allows none of the tasks {sorted(weights)}")
    return messages


def _turns(scene: Scene, rng: np.random.Generator, weights: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    left = {task: weight for task, weight in weights.items() if weight > 0}
    asked: set[str] = set()
    misses = 0
    while left and len(asked) < scene.config.questions and misses < 12:
        edges = np.cumsum(list(left.values()))
        task = list(left)[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
        turn = _ASK[task](scene, rng, asked)
        if turn is None:
            del left[task]
        elif turn[2] in asked:
            misses += 1
        else:
            left.pop("caption", None)
            if task == "caption":
                left = {name: weight for name, weight in left.items() if name in ("position", "grounding")}
            asked.add(turn[2])
            yield turn[:2]


def format_box(box: Box, image_size: int) -> str:
    """A box in pixels as the text of four whole percents, 0 to 99: "12 40 33 61"."""
    return " ".join(str(min(99, round(100 * value / image_size))) for value in box)


def parse_box(text: str) -> Box | None:
    """The box that a text names, in percent, or None unless it is four integers of 0..99 with an area."""
    if not re.fullmatch(r"\s*\d{1,2}(\s+\d{1,2}){3}\s*\.?\s*", text):
        return None
    x1, y1, x2, y2 = (int(value) for value in re.findall(r"\d+", text))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes in the same unit, 0..1."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def caption_recall(prediction: str, scene: Scene) -> float:
    """Share of the things (as a multiset) and the number that the prediction names, 0..1.

    Only as many names are read as there are: reciting every name does not pay.
    """
    truth = scene.counts() + Counter([scene.number] if scene.number is not None else [])
    names = sorted(kind_names(scene.config), key=len, reverse=True)
    pattern = rf"\b(?:number (\d+)|({'|'.join(names)}))\b"
    found = [number or name for number, name in re.findall(pattern, prediction)][: truth.total()]
    return (truth & Counter(found)).total() / truth.total()


def chance(
    config: SceneConfig, split: str = "test", scenes: int = 2000, tasks: Sequence[str] = TASKS
) -> dict[str, float]:
    """The score of blind guessing by task, 0..1. Tasks that never occur are left out.

    The guess is the most frequent answer ("how many things" and "how many : kind" have one each), the most frequent
    names for captions, and the mean box for grounding (share with IoU >= 0.5). It is taken from `scenes` training
    scenes and scored on as many of `split`. None is drawn; about 2 s.
    """
    fit = [make_scene(config, "train", index) for index in range(scenes)]
    held = [make_scene(config, split, index) for index in range(scenes, 2 * scenes)]
    score: dict[str, float] = {}
    for task in tasks:
        known, asked = ([qa for s in half if (qa := single_question(s, task))] for half in (fit, held))
        if not known or not asked:
            continue
        if task == "caption":
            names = Counter(name for s in fit for name in s.counts()).most_common(config.grid**2)
            guess = " , ".join(name for name, _ in names)
            hits = [caption_recall(guess, s) for s in held]
        elif task == "grounding":
            mean = tuple(np.mean([[int(value) for value in answer.split()] for _, answer in known], axis=0))
            hits = [float(iou(mean, parse_box(answer) or (0, 0, 0, 0)) >= 0.5) for _, answer in asked]
        else:
            best = {
                flavour: Counter(answer for q, answer in known if (q == _TOTAL) == flavour).most_common(1)
                for flavour in (False, True)
            }
            hits = [float(answer in dict(best[q == _TOTAL])) for q, answer in asked]
        score[task] = float(np.mean(hits))
    return score


class ScenesDataset:
    """A number of scenes of a split, and as many conversations about them as are asked for. Picklable; no torch.

    Args:
        scenes: number of images.
        tasks: weight of each task of `ALL_TASKS`, see `conversation`. None: `WEIGHTS`.

    Raises:
        UserError: a task is unknown or its weight is no weight, or not every image allows one of the tasks.
        UserError: emoji or photographs are asked for and absent.
    """

    def __init__(
        self,
        config: SceneConfig,
        split: str,
        scenes: int = 4000,
        *,
        seed: int = 0,
        tasks: Mapping[str, float] | None = None,
    ) -> None:
        weights = WEIGHTS if tasks is None else tasks
        for task, weight in weights.items():
            if task not in ALL_TASKS:
                raise UserError(f"task is {task!r}, expected one of {', '.join(ALL_TASKS)}")
            if not 0 <= weight < float("inf"):
                raise UserError(f"weight of {task} is {weight!r}, expected a number of at least 0")
        always = {"caption", "count", "naming", "count_where"} | ({"text"} if config.numbers == 1 else set())
        if not any(weights.get(task, 0) > 0 for task in always):
            raise UserError(f"tasks is {dict(weights)}, expected one that any image allows: {sorted(always)}")
        self.config, self.split, self.scenes = config.resolved(), split, scenes
        self.seed, self.tasks = seed, tasks

    def scene(self, number: int) -> Scene:
        """The truth about an image."""
        return _scene(self.config, self.split, number, self.seed)

    def image(self, number: int) -> Image.Image:
        """The image, RGB, image_size x image_size."""
        return self.scene(number).draw()

    def messages(self, index: int) -> list[dict[str, Any]]:
        """Conversation ``index``, about image ``index % scenes``; an image that comes again has other questions."""
        return conversation(self.scene(index % self.scenes), index, self.tasks)
