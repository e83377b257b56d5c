"""Generated scenes: the truth is true, the same everywhere, and kept apart between the splits."""

from __future__ import annotations

import hashlib
import pickle
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from photos import make_photos
from sparsight import assets
from sparsight.errors import UserError
from sparsight.scenes import drawing
from sparsight.scenes import questions as scenes
from sparsight.scenes.questions import ALL_TASKS, STEPS, TASKS, ScenesDataset, graded_question, single_question
from sparsight.scenes.world import (
    SPLITS,
    Scene,
    SceneConfig,
    cell_names,
    held_out_pairs,
    images_of,
    kind_names,
    make_scene,
)

CUTOUTS = ("emoji", "families", "shapes") if assets.emoji_folder() else ("shapes",)
TESTS = Path(__file__).parents[1]
ALL_KINDS = {"emoji": 64, "families": 14, "photos": 15, "shapes": 64}
SHAPES = SceneConfig(cutouts="shapes")
PHOTOS = SceneConfig(cutouts="photos", kinds=15)


@pytest.fixture(scope="module")
def made_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of assets with tiny photographs alone."""
    return make_photos(tmp_path_factory.mktemp("assets") / "photos").parent


@pytest.fixture(params=(*CUTOUTS, "photos"))
def config(request: pytest.FixtureRequest, made_photos: Path, monkeypatch: pytest.MonkeyPatch) -> SceneConfig:
    if request.param == "photos":
        monkeypatch.setenv("SPARSIGHT_ASSETS", str(made_photos))
    return SceneConfig(cutouts=request.param, kinds=min(32, ALL_KINDS[request.param]))


def alone(scene: Scene, box: tuple[int, int, int, int], way: str) -> Any:
    """The thing that is next to a box in a direction, by pixels, and the only thing or number there."""
    side, grid = scene.config.image_size, scene.config.grid

    def spot(box: tuple[int, int, int, int]) -> tuple[int, int]:
        return grid * (box[1] + box[3]) // (2 * side), grid * (box[0] + box[2]) // (2 * side)

    axis, sign = {"above": (0, -1), "below": (0, 1), "left of": (1, -1), "right of": (1, 1)}[way]
    there = [(each, spot(each.box)) for each in scene.things]
    there += [(None, spot(scene.number_box))] if scene.number_box else []
    at = spot(box)
    found = [(each, own) for each, own in there if own[1 - axis] == at[1 - axis] and sign * (own[axis] - at[axis]) > 0]
    ((thing, own),) = found
    assert thing is not None and abs(own[axis] - at[axis]) == 1
    return thing


def true_answer(scene: Scene, question: str) -> str:
    """The answer worked out anew, from `things` and the pixel boxes alone (not from `cell`)."""
    side = scene.config.image_size

    def place(box: tuple[int, int, int, int]) -> str:
        column = ("left", "", "right")[int(3 * (box[0] + box[2]) / 2 / side)]
        row = ("top", "", "bottom")[int(3 * (box[1] + box[3]) / 2 / side)]
        return " ".join(filter(None, (row, column))) or "middle"

    body = question.removesuffix(" ?")
    beside = {"top": (), "middle": ("left", "right"), "bottom": ()}
    if body == "describe the image .":
        spots = [(t.box, f"{'an' if t.name[0] in 'aeiou' else 'a'} {t.name}") for t in scene.things]
        spots += [(scene.number_box, f"the number {scene.number}")] if scene.number_box else []
        rows = sorted(spots, key=lambda p: (3 * (p[0][1] + p[0][3]) // (2 * side), p[0][0] + p[0][2]))
        return " , ".join(words for _, words in rows)
    if body == "how many things":
        return str(len(scene.things))
    if body == "what number is printed":
        return str(scene.number)
    if body.startswith("what is ") and " the thing " in body:
        second, rest = body.removeprefix("what is ").split(" the thing ")
        first, name = rest.split(" the ")
        (start,) = (t for t in scene.things if t.name == name)
        return alone(scene, alone(scene, start.box, first).box, second).name
    if body.startswith("are there more : "):
        first, second = (
            sum(t.name == name for t in scene.things) for name in body.removeprefix("are there more : ").split(" than ")
        )
        assert first and second and first != second  # nothing is left to taste
        return "yes" if first > second else "no"
    if body.startswith("how many in the "):
        row, name = body.removeprefix("how many in the ").split(" row : ")
        return str(sum(t.name == name and place(t.box).split(" ")[0] in (row, *beside[row]) for t in scene.things))
    for start in (
        "is there an ",
        "is there a ",
        "how many : ",
        "what is at the ",
        "where is the ",
        "box of the ",
    ):
        if body.startswith(start):
            rest = body.removeprefix(start)
            break
    same = [t for t in scene.things if t.name == rest]
    if start.startswith("is there"):
        return "yes" if same else "no"
    if start == "how many : ":
        return str(len(same))
    if start == "what is at the ":
        (thing,) = (t for t in scene.things if place(t.box) == rest)
        return thing.name
    (thing,) = same
    if start == "where is the ":
        return place(thing.box)
    return " ".join(str(min(99, round(100 * v / side))) for v in thing.box)


def turns(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    texts = [part["text"] for m in messages for part in m["content"] if part["type"] == "text"]
    return list(zip(texts[::2], texts[1::2], strict=True))


# ---------------------------------------------------------------------------------------- the same everywhere


def fingerprint(config: SceneConfig) -> str:
    data, digest = ScenesDataset(config, "validation", 5, seed=3), hashlib.sha256()
    for index in (0, 4, 9):
        digest.update(data.image(index % 5).tobytes() + repr(data.messages(index)).encode())
    return digest.hexdigest()


def test_questions_stay_as_they_are() -> None:
    """Results rest on them: a change of this digest makes new results incomparable with old ones."""
    digest = hashlib.sha256()
    for split in SPLITS:
        data = ScenesDataset(SHAPES, split, 200, seed=1)
        digest.update(repr([data.messages(index) for index in range(250)]).encode())
    assert digest.hexdigest() == "3a57a979c58dbcc991024762bfe298e9d74fc28277dc7c579096819a47347897"


def test_same_bytes_in_another_process(config: SceneConfig) -> None:
    folders = [str(folder) for folder in (Path(scenes.__file__).parents[2], Path(__file__).parent, TESTS)]
    code = f"import sys; sys.path[:0] = {folders!r}; import test_scenes as t; print(t.fingerprint(t.{config!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fingerprint(config)


def test_other_index_seed_and_split_give_other_scenes(config: SceneConfig) -> None:
    base = make_scene(config, "train", 5)
    others = [("train", 6, 0), ("train", 5, 1), ("test", 5, 0), ("validation", 5, 0)]
    assert make_scene(config, "train", 5) == base
    assert len({make_scene(config, *other).ground for other in others} | {base.ground}) == 5


def test_no_global_generator_is_touched(config: SceneConfig) -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    first = fingerprint(config)
    after = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    assert before == after
    random.seed(2)
    np.random.seed(2)
    assert fingerprint(config) == first


# ---------------------------------------------------------------------------------------- splits


def test_held_out_pairs_are_never_in_train_and_always_elsewhere(config: SceneConfig) -> None:
    names = kind_names(config)
    held = {(names[kind], cell) for kind, cell in held_out_pairs(config.kinds, 9, 0.1)}
    assert len(held) == round(0.1 * config.kinds * 9)
    kinds, cells = map(set, zip(*held, strict=True))
    assert len(kinds) >= 0.75 * config.kinds and len(cells) >= min(9, len(held) // 2 + 1)
    for split in SPLITS:
        for index in range(400):
            pairs = {(t.name, t.cell) for t in make_scene(config, split, index).things}
            assert bool(pairs & held) == (split != "train")


def test_nothing_held_out_is_allowed() -> None:
    assert held_out_pairs(32, 9, 0) == frozenset()
    make_scene(replace(SHAPES, held_out=0), "test", 0)


# ---------------------------------------------------------------------------------------- images


def test_only_the_boxes_are_drawn_on(config: SceneConfig) -> None:
    for index in range(40):
        scene = make_scene(config if config.cutouts == "photos" else replace(config, noise=0), "train", index)
        changed = ImageChops.difference(scene.draw(), drawing.draw_ground(scene.ground, 256)).convert("L")
        boxes = [t.box for t in scene.things] + ([scene.number_box] if scene.number_box else [])
        for box in boxes:
            x1, y1, x2, y2 = changed.crop(box).point(lambda v: 255 * (v > 6)).getbbox()
            slack = 5  # a soft edge can match the ground
            assert x1 <= slack and y1 <= slack and x2 >= box[2] - box[0] - slack and y2 >= box[3] - box[1] - slack
        for box in boxes:
            changed.paste(0, box)
        assert changed.getbbox() is None


def test_boxes_keep_the_shape_of_the_cutout(config: SceneConfig) -> None:
    for index in range(50):
        for thing in make_scene(config, "train", index).things:
            width, height = drawing.whole_cutout(drawing.cutout_folder(config.cutouts), thing.image).size
            x1, y1, x2, y2 = thing.box
            assert 47 <= max(x2 - x1, y2 - y1) <= 84
            assert (x2 - x1) / (y2 - y1) == pytest.approx(width / height, rel=0.1)


def test_every_kind_loads_and_differs(config: SceneConfig) -> None:
    names = kind_names(replace(config, kinds=ALL_KINDS[config.cutouts]))
    files = [file for name in names for split in SPLITS for file in images_of(config, name, split)]
    drawn = {drawing.cutout(drawing.cutout_folder(config.cutouts), file, 32, 32).tobytes() for file in files}
    assert len(set(names)) == ALL_KINDS[config.cutouts]
    assert len(drawn) == len(set(files))


@pytest.mark.parametrize("config", sorted({"families", "photos"} & {*CUTOUTS, "photos"}), indirect=True)
def test_families_and_photos_hold_images_out(config: SceneConfig) -> None:
    """No image of validation or test is seen in training, and each split has one of every kind."""
    seen = {split: set() for split in SPLITS}  # type: dict[str, set[str]]
    grounds = {split: set() for split in SPLITS}  # type: dict[str, set[str]]
    for split in SPLITS:
        for index in range(500):
            scene = make_scene(config, split, index)
            seen[split] |= {thing.image for thing in scene.things}
            grounds[split].add(scene.ground.kind)
    for held in (seen, grounds) if config.cutouts == "photos" else (seen,):
        assert not held["train"] & (held["validation"] | held["test"]) and not held["validation"] & held["test"]
    for split in SPLITS:
        assert all(seen[split] & set(images_of(config, name, split)) for name in kind_names(config))
    assert len(seen["train"]) >= 2 * config.kinds
    if config.cutouts == "photos":
        assert all(len(names) > 25 for names in grounds.values())


def test_families_show_the_images_that_results_rest_on() -> None:
    config = SceneConfig(cutouts="families", kinds=14)
    for name, images in drawing.IMAGES["families"].items():
        shown = [images_of(config, name, split) for split in SPLITS]
        assert shown == [images[:-2], images[-2:-1], images[-1:]]


@pytest.mark.skipif(assets.photos_folder() is None, reason="needs `make photos`")
def test_real_photographs_are_trimmed_and_shown_by_one_split() -> None:
    folder, seen = drawing.cutout_folder("photos"), {}
    for images in drawing.IMAGES["photos"].values():
        assert len(images) >= 6
        for image in images:
            cutout = drawing.whole_cutout(folder, image)
            rows, columns = (np.asarray(cutout)[..., 3] > 24).any(axis=1), (np.asarray(cutout)[..., 3] > 24).any(axis=0)
            assert rows[[0, -1]].all() and columns[[0, -1]].all(), "the box is that of what is seen"
            assert max(cutout.size) >= 45, f"{image} is too small for a box of 48 to 84 pixels"
            assert seen.setdefault(cutout.tobytes(), image) == image
    for names in drawing.LANDSCAPES.values():
        for name in names:
            with Image.open(folder / "land" / f"{name}.jpg") as photo:
                assert photo.size == (720, 360)
                assert seen.setdefault(photo.convert("RGB").tobytes(), name) == name


def test_photos_are_shown_where_they_are_asked_for_alone(made_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIGHT_ASSETS", str(made_photos))
    assert make_scene(SceneConfig(), "train", 0).config.cutouts == "shapes"
    scene = make_scene(PHOTOS, "train", 0)
    thing, folder = scene.things[0], drawing.cutout_folder("photos")
    x1, y1, x2, y2 = thing.box
    shown = scene.draw().crop(thing.box)
    assert shown.tobytes() == drawing.cutout(folder, thing.image, x2 - x1, y2 - y1).convert("RGB").tobytes()
    with pytest.raises(UserError, match="noise is 0.2, expected 0.5: photos stand on landscapes"):
        replace(PHOTOS, noise=0.2)


def test_a_number_can_be_told_by_its_pixels() -> None:
    scene = make_scene(replace(SHAPES, numbers=1, noise=0), "train", 0)
    other = replace(scene, number="".join(str(9 - int(d)) for d in scene.number or ""))
    assert ImageChops.difference(scene.draw(), other.draw()).getbbox() is not None


# ---------------------------------------------------------------------------------------- questions


def test_answers_are_true(config: SceneConfig) -> None:
    asked, deeper = Counter[str](), dict.fromkeys((*STEPS, "position", "naming"), 1)
    for index in range(150):
        for split in ("train", "test"):
            scene = make_scene(config, split, index)
            assert all(answer == true_answer(scene, question) for question, answer in own_turns(scene, deeper, index))
            for task in ALL_TASKS:
                if (turn := single_question(scene, task, seed=index)) is not None:
                    assert turn[1] == true_answer(scene, turn[0]), (scene, turn)
                    asked[task] += 1
            for question, answer in turns(scenes.conversation(scene, seed=index)):
                assert answer == true_answer(scene, question), (scene, question)
    assert all(asked[task] > (60 if task in STEPS else 100) for task in ALL_TASKS)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.integers(2, 64),
    things=st.tuples(st.integers(1, 8), st.integers(1, 8)).map(sorted),
    image_size=st.integers(64, 512),
    held_out=st.floats(0, 0.5),
    index=st.integers(0, 2**40),
    split=st.sampled_from(SPLITS),
)
def test_any_config_gives_a_true_scene(
    kinds: int, things: list[int], image_size: int, held_out: float, index: int, split: str
) -> None:
    config = SceneConfig(image_size, kinds, *things, held_out=held_out, cutouts="shapes")
    scene = make_scene(config, split, index)
    assert things[0] <= len(scene.things) <= things[1]
    spots = [(t.cell, t.box) for t in scene.things]
    if scene.number_cell is not None and scene.number_box is not None:
        spots.append((scene.number_cell, scene.number_box))
    assert len({cell for cell, _ in spots}) == len(spots)
    for cell, (x1, y1, x2, y2) in spots:
        row, column = divmod(cell, 3)
        assert column * image_size // 3 <= x1 < x2 <= (column + 1) * image_size // 3
        assert row * image_size // 3 <= y1 < y2 <= (row + 1) * image_size // 3
    assert scene.draw().size == (image_size, image_size)
    messages = scenes.conversation(scene, seed=index)
    asked = turns(messages)
    assert 1 <= len(asked) <= 6 and len({question for question, _ in asked}) == len(asked)
    assert all(answer == true_answer(scene, question) for question, answer in asked)


@pytest.mark.parametrize("alone", [True, False])
def test_existence_is_balanced(config: SceneConfig, alone: bool) -> None:
    answers = Counter[str]()
    for index in range(2500):
        scene = make_scene(config, "train", index)
        asked = [single_question(scene, "existence")] if alone else turns(scenes.conversation(scene))
        answers.update(a for q, a in filter(None, asked) if q.startswith("is there"))
    assert 0.45 < answers["yes"] / answers.total() < 0.55, answers


def test_the_name_alone_does_not_tell_existence(config: SceneConfig) -> None:
    answers: dict[str, Counter[str]] = {}
    for index in range(6000):
        question, answer = single_question(make_scene(config, "train", index), "existence") or ("", "")
        answers.setdefault(question, Counter())[answer] += 1
    blind = sum(max(count.values()) for count in answers.values()) / 6000
    assert blind < 0.56  # about 0.53 is the luck of 190 questions a name


def test_counts_are_not_trivial(config: SceneConfig) -> None:
    answers = Counter[str]()
    for index in range(1500):
        question, answer = single_question(make_scene(config, "train", index), "count") or ("", "")
        answers[answer] += question != "how many things ?"
    assert set("01234") <= set(answers)
    assert max(answers.values()) < 0.4 * answers.total()


def test_the_image_comes_once_and_nothing_answers_itself(config: SceneConfig) -> None:
    captions = 0
    for index in range(300):
        messages = scenes.conversation(make_scene(config, "train", index))
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        kinds = [part["type"] for m in messages for part in m["content"]]
        assert kinds[0] == "image" and kinds.count("image") == 1
        questions = [question for question, _ in turns(messages)]
        if questions[0] == "describe the image .":
            captions += 1
            assert all(q.startswith(("where is", "box of")) for q in questions[1:])
        assert "describe the image ." not in questions[1:]
    assert 60 < captions < 140


def test_tasks_that_a_scene_does_not_allow_are_none() -> None:
    scene = make_scene(replace(SHAPES, numbers=0), "train", 0)
    assert single_question(scene, "text") is None
    twice = replace(scene, things=(scene.things[0], replace(scene.things[0], cell=8)))
    assert single_question(twice, "position") is None and single_question(twice, "grounding") is None
    with pytest.raises(ValueError, match=r"allows none of the tasks \['text'\]"):
        scenes.conversation(scene, tasks={"text": 1})


# ---------------------------------------------------------------------------------------- depth


def own_turns(scene: Scene, tasks: dict[str, int], seed: int) -> list[tuple[str, str]]:
    return turns(scenes.conversation(scene, seed, tasks)) if scene.things else []


def test_questions_of_an_evaluation_stay_as_they_are() -> None:
    """As `test_questions_stay_as_they_are`: tasks that came later have streams of their own."""
    asked = [single_question(make_scene(SHAPES, "test", n), task, n) for task in TASKS for n in range(200)]
    assert (
        hashlib.sha256(repr(asked).encode()).hexdigest()
        == "d768acc546f1aae64d778bb133188e80a12ec60c1235f656b346846f7756f91f"
    )


def test_deeper_tasks_are_asked_only_where_they_are_named() -> None:
    def asked(**options: Any) -> set[str]:
        data = ScenesDataset(SHAPES, "train", 150, **options)
        questions = [question for index in range(150) for question, _ in turns(data.messages(index))]
        marks = {"compare": "are there more", "count_where": "how many in the", "relation": " the thing "}
        return {task for task, mark in marks.items() if any(mark in question for question in questions)}

    assert asked() == set()
    assert asked(tasks=dict.fromkeys(ALL_TASKS, 1)) == set(STEPS)
    assert asked(tasks={"naming": 1, "relation": 1, "compare": 0}) == {"relation"}


@pytest.mark.parametrize("grid", [2, 3])
def test_answers_of_deeper_tasks_are_balanced(grid: int) -> None:
    """No answer is more likely than its rivals before the image is seen, nor once the question is read."""
    config = replace(SHAPES, kinds=12, grid=grid, max_things=5 if grid == 3 else 3)
    made = [make_scene(config, "train", index) for index in range(3000)]
    answers = {task: [turn for s in made if (turn := single_question(s, task))] for task in STEPS}
    share = {task: Counter(answer for _, answer in own) for task, own in answers.items()}
    assert 0.45 < share["compare"]["yes"] / share["compare"].total() < 0.55
    assert max(share["count_where"].values()) < 0.5 * share["count_where"].total()
    assert min(share["count_where"][count] for count in "012") > 0.05 * share["count_where"].total()
    assert max(share["relation"].values()) < 0.14 * share["relation"].total()
    named = [question.split(" : ")[1].split(" than ")[0] for question, _ in answers["compare"]]
    told = Counter(zip(named, (answer for _, answer in answers["compare"]), strict=True))
    blind = sum(max(told[name, "yes"], told[name, "no"]) for name in set(named)) / len(named)
    assert blind < 0.6  # 0.57 is the luck of 37 questions a name
    chance = scenes.chance(config, scenes=600, tasks=tuple(STEPS))
    assert chance.keys() == STEPS.keys() and chance["compare"] < 0.62 and chance["relation"] < 0.16


def test_no_deeper_question_is_answered_by_an_earlier_turn() -> None:
    """Counts of both kinds tell which are more; the name of a cell's thing tells a relation that ends there."""
    tasks = {"count": 1, "compare": 2, "naming": 2, "relation": 4, "count_where": 2, "position": 1}
    followed = Counter[str]()
    for index in range(600):
        scene, told, cells = make_scene(replace(SHAPES, questions=8), "train", index), set(), set()
        names = cell_names(3)
        for question, answer in own_turns(scene, tasks, index):
            body = question.removesuffix(" ?")
            if body.startswith("are there more : "):
                assert not told & set(body.removeprefix("are there more : ").split(" than "))
                followed["compare"] += 1
            if " the thing " in body:
                cell = {t.cell for t in scene.things if t.name == answer}
                assert not (len(cell) == 1 and cell <= cells)
                followed["relation"] += 1
            if body.startswith("how many in the "):
                name = body.split(" : ")[1]
                assert not {t.cell for t in scene.things if t.name == name} & cells
                followed["count_where"] += 1
            if body.startswith("how many : "):
                told.add(body.removeprefix("how many : "))
            if body.startswith("what is at the "):
                cells.add(names.index(body.removeprefix("what is at the ")))
            if body.startswith("where is the "):
                cells.add(names.index(answer))
    assert min(followed[task] for task in STEPS) > 60


def test_grades_are_those_of_the_image(config: SceneConfig) -> None:
    """Worked out anew from the words of question and answer."""
    seen = Counter[str]()
    for index in range(120):
        scene = make_scene(config, "test", index)
        here, noisy = list(scene.things), scene.ground.kind not in ("plain", "gradient")
        for task in ALL_TASKS:
            if (found := graded_question(scene, task, index)) is None:
                continue
            question, answer, grades = found
            words = f" {question} {answer} "
            about = {
                "caption": here,
                "count": here if "things" in question else [t for t in here if f" {t.name} " in words],
                "naming": [t for t in here if cell_names(3)[t.cell] == question[15:-2]],
                "text": [],
                "relation": None,
            }.get(task, [t for t in here if f" {t.name} " in words])
            assert (question, answer) == single_question(scene, task, index)
            assert grades["steps"] == {"compare": 2, "count_where": 2, "relation": 3}.get(task, 1)
            assert grades["things"] == len(here)
            reads = scene.number is not None and task in ("caption", "text")
            assert grades["digits"] == (len(scene.number or "") if reads else None)
            if about is None:
                assert grades["clutter"] == len(here) - 3 + bool(scene.number) + (
                    scene.ground.kind not in ("plain", "gradient")
                )
                continue
            boxes = [t.box for t in about] + ([scene.number_box] if reads else [])
            sides = [max(b[2] - b[0], b[3] - b[1]) for b in boxes]
            assert grades["size"] == (round(100 * min(sides) / 256) if sides else None), (question, answer)
            rest = len(here) - len(about) + (scene.number is not None and not reads)
            assert grades["clutter"] == rest + noisy
            seen[task] += 1
    assert min(seen[task] for task in ALL_TASKS if task != "relation") > 40


# ---------------------------------------------------------------------------------------- scores


def test_caption_recall_counts_repeats_numbers_and_no_recital() -> None:
    scene = make_scene(replace(SHAPES, numbers=1, min_things=3), "train", 0)
    truth = single_question(scene, "caption")
    assert truth is not None and scenes.caption_recall(truth[1], scene) == 1
    assert scenes.caption_recall("", scene) == 0
    total = len(scene.things) + 1
    assert scenes.caption_recall(f"the number {scene.number}", scene) == pytest.approx(1 / total)
    assert scenes.caption_recall(f"the number {scene.number}0", scene) == 0
    one, three = scene.things[0], replace(scene, things=(scene.things[0],) * 3, number=None)
    assert scenes.caption_recall(f"a {one.name} , a {one.name}", three) == pytest.approx(2 / 3)
    wrong = [name for name in kind_names(SHAPES) if name not in scene.counts()]
    assert scenes.caption_recall(" , ".join([*wrong[:9], truth[1]]), scene) == 0


def test_boxes_parse_and_overlap() -> None:
    assert scenes.parse_box(" 12 40 33 61 ") == (12, 40, 33, 61)
    for text in (
        "",
        "12 40 33",
        "12 40 33 61 5",
        "33 40 12 61",
        "12 40 33 100",
        "a 12 40 33 61",
        "12 40 33 40",
    ):
        assert scenes.parse_box(text) is None
    assert scenes.iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert scenes.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert scenes.iou((0, 0, 10, 10), (10, 10, 20, 20)) == 0


def test_chance_is_low_and_existence_is_a_coin() -> None:
    score = scenes.chance(SHAPES, scenes=600)
    assert set(score) == set(TASKS)
    assert 0.44 < score["existence"] < 0.56
    assert score["text"] < 0.06 and score["naming"] < 0.1 and score["position"] < 0.2
    assert score["count"] < 0.4 and score["caption"] < 0.3 and score["grounding"] < 0.2
    assert "text" not in scenes.chance(replace(SHAPES, numbers=0), scenes=20)


# ---------------------------------------------------------------------------------------- data set


def test_an_image_that_comes_again_has_other_questions(config: SceneConfig) -> None:
    data = pickle.loads(pickle.dumps(ScenesDataset(config, "train", scenes=10)))
    assert data.image(2).tobytes() == data.scene(2).draw().tobytes()
    assert any(data.messages(i) != data.messages(i + 10) for i in range(10))
    assert data.messages(12) == scenes.conversation(data.scene(2), 12)
    assert len(ScenesDataset(SHAPES, "test", scenes=4, tasks={"caption": 1}).messages(1)) == 2


def test_shapes_stand_in_where_no_emoji_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIGHT_ASSETS", str(tmp_path))
    scene = make_scene(SceneConfig(), "train", 0)
    assert scene.config.cutouts == "shapes" and scene.draw().mode == "RGB"
    for cutouts, command in (("emoji", "make assets"), ("families", "make assets"), ("photos", "make photos")):
        with pytest.raises(UserError, match=f"not found in {tmp_path}; in a checkout of Sparsight, run\n  {command}\n"):
            make_scene(SceneConfig(cutouts=cutouts, kinds=14), "train", 0)


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("image_size", 8, "at least 32"),
        ("kinds", 65, "2 to 64"),
        ("min_things", 7, r"1 to max_things \(6\)"),
        ("max_things", 9, "at most 8, a cell each"),
        ("digits", (2, 1), "fewest"),
        ("number_size", 60, "no wider than a cell of 85 px"),
    ],
)
def test_a_bad_config_shows_value_and_expectation(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        SceneConfig(**{name: value})
    assert f"scenes: {name} is {value!r}" in str(caught.value)


def test_grid_of_two_works() -> None:
    config = replace(SHAPES, grid=2, max_things=3)
    for index in range(30):
        scene = make_scene(config, "test", index)
        assert all(0 <= t.cell < 4 for t in scene.things) and scene.draw()
    assert cell_names(2) == ("top left", "top right", "bottom left", "bottom right")


def test_other_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'dev'"):
        make_scene(SHAPES, "dev", 0)
    with pytest.raises(ValueError, match="'ocr'"):
        ScenesDataset(SHAPES, "train", tasks={"ocr": 1})
    with pytest.raises(ValueError, match="weight of count is -1"):
        ScenesDataset(SHAPES, "train", tasks={"count": -1})
    with pytest.raises(ValueError, match="any image allows"):
        ScenesDataset(SHAPES, "train", tasks={"position": 1})
