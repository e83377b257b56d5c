"""Scores on scenes: right answers score 1, the control sees wrong images, and batches do not matter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsight.data.sources import scene_config
from sparsight.evaluation import ask as evaluation
from sparsight.evaluation.ask import Item, Scores, answer, our_prompts, visual_tokens
from sparsight.evaluation.metrics import cider_d
from sparsight.evaluation.questions import scene_questions
from sparsight.pipeline.evaluate import judged
from sparsight.scenes.questions import TASKS, ScenesDataset, format_box
from sparsight.scenes.world import Scene, SceneConfig, make_scene
from sparsight.settings.data import SceneData
from tiny import ask

CONFIG = SceneConfig(cutouts="shapes", numbers=1.0)


def answer_all(model, processor, items: list[Item], visual, rows, batch_size: int, **options: Any) -> list[str]:
    prompts = our_prompts(model, processor, items, visual, rows)
    return answer(model, processor, items, prompts, batch_size, **options)


def make_items(data: ScenesDataset, per_task: int) -> list[Item]:
    return scene_questions(data, per_task).items


def score_answer(task: str, answer: str, truth: str, scene: Scene) -> float:
    """The points of an answer to a question on one scene."""
    data = SimpleNamespace(scene=lambda _: scene, scenes=0, tasks=None, image=None)
    return scene_questions(data, 0).score([Item(task, 0, "", truth)], [answer])[0]  # type: ignore[arg-type]


def evaluate_scenes(model, processor, data: ScenesDataset, per_task: int, batch_size: int = 50, **options) -> Scores:
    return evaluation.ask(model, processor, scene_questions(data, per_task), batch_size, **options)


@pytest.fixture
def data() -> ScenesDataset:
    settings = SceneData(cutouts="shapes", kinds=8, max_things=3)
    return ScenesDataset(scene_config(settings, 64), "test", scenes=30)


# ---------------------------------------------------------------------------------------- one answer


@pytest.mark.parametrize("task", ["existence", "count", "naming", "position", "text"])
def test_words_must_match_but_for_case_and_space(task: str) -> None:
    scene = make_scene(CONFIG, "test", 0)
    assert score_answer(task, " Red circle\n", "red circle", scene) == 1
    for wrong in ("red circles", "red", "", "a red circle"):
        assert score_answer(task, wrong, "red circle", scene) == 0


def test_captions_are_scored_by_what_they_name() -> None:
    scene = make_scene(CONFIG, "test", 3)
    names = [thing.name for thing in scene.things]
    whole = " , ".join([*(f"a {name}" for name in names), f"the number {scene.number}"])
    assert score_answer("caption", whole, "not looked at", scene) == 1
    assert score_answer("caption", f"a {names[0]}", "", scene) == pytest.approx(1 / (len(names) + 1))
    assert score_answer("caption", "nothing", "", scene) == 0


def test_boxes_are_scored_by_overlap() -> None:
    scene = make_scene(CONFIG, "test", 0)
    truth = "10 10 50 50"
    answers = {truth: 1, "10 10 50 31": 1, "10 10 50 29": 0, "60 60 90 90": 0, "10 10 50": 0, "a box": 0, "": 0}
    assert {text: score_answer("grounding", text, truth, scene) for text in answers} == answers
    box = scene.things[0].box
    assert score_answer("grounding", format_box(box, 256), format_box(box, 256), scene) == 1


# ---------------------------------------------------------------------------------------- the questions


def test_each_task_has_its_number_of_questions(data: ScenesDataset) -> None:
    items = make_items(data, 5)
    assert {task: sum(item.task == task for item in items) for task in TASKS} == dict.fromkeys(TASKS, 5)
    assert all(0 <= item.image < 30 for item in items)
    for task in TASKS:
        images = [item.image for item in items if item.task == task]
        assert len(set(images)) == 5  # not one image five times
    assert items == make_items(data, 5)


def test_F21_only_the_tasks_that_are_trained_are_asked(data: ScenesDataset) -> None:
    """The demo asked four tasks that it had hardly trained, and they stayed at chance."""
    own = ScenesDataset(data.config, "test", scenes=30, tasks={"naming": 2, "position": 0, "caption": 1})
    assert [(item.task, item.image) for item in make_items(own, 2)] == [
        (item.task, item.image) for item in make_items(data, 2) if item.task in ("caption", "naming")
    ]


def test_the_truth_scores_one(data: ScenesDataset) -> None:
    for item in make_items(data, 5):
        assert score_answer(item.task, item.truth, item.truth, data.scene(item.image)) == 1


@pytest.mark.parametrize(
    "task, answer, points, right",
    [
        ("caption", "a dog , a cat", 1.0, True),
        ("caption", "a dog , a car", 0.5, None),
        ("caption", "a car", 0.0, False),
        ("count", "2", 1.0, True),
        ("grounding", "1 2 3 4", 0.0, False),
    ],
)
def test_F21_a_caption_that_is_right_in_part_is_not_judged(task: str, answer: str, points: float, right: bool) -> None:
    assert judged(Item(task, 0, "?", "a dog , a cat"), answer, points) is right


def test_too_few_images_give_fewer_questions(data: ScenesDataset) -> None:
    few = ScenesDataset(data.config, "test", scenes=3)
    assert sum(item.task == "caption" for item in make_items(few, 5)) == 3


# ---------------------------------------------------------------------------------------- asking a model


class Spy:
    """Records the rows of visual tokens that every question is asked with, and lets it be asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[Item], torch.Tensor]] = []
        real = evaluation.our_prompts

        def spied(model: Any, processor: Any, items: list[Item], visual: Any, rows: Any) -> Any:
            self.calls.append((items, visual[rows]))
            return real(model, processor, items, visual, rows)

        monkeypatch.setattr(evaluation, "our_prompts", spied)


def test_the_control_asks_every_question_about_another_image(
    tiny_vlm, data: ScenesDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_vlm()
    spy = Spy(monkeypatch)
    result = evaluate_scenes(model, processor, data, 2)
    (items, own), (again, other) = spy.calls
    assert items == again == make_items(data, 2)
    images = sorted({item.image for item in items})
    tokens = visual_tokens(model, processor, data.image, images, 7)
    row = {image: tokens[place] for place, image in enumerate(images)}
    for item, right, wrong in zip(items, own, other, strict=True):
        assert torch.allclose(right, row[item.image], atol=1e-5)
        assert any(torch.allclose(wrong, row[image], atol=1e-5) for image in images if image != item.image)
        assert not torch.allclose(wrong, right, atol=1e-3)
    assert result.scores.keys() == result.shuffled.keys() == result.items.keys() == set(TASKS)
    assert result.items == dict.fromkeys(TASKS, 2)
    assert [item for item, _ in result.answers] == items
    assert all(0 <= value <= 1 for value in [*result.scores.values(), *result.shuffled.values()])


def test_points_stand_item_by_item(tiny_vlm, data: ScenesDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the answers right, by hand: points, means, intervals and what existence adds follow from them."""
    model, processor = tiny_vlm()
    items = make_items(data, 6)
    given = [item.truth if place % 2 else "nothing" for place, item in enumerate(items)]
    monkeypatch.setattr(evaluation, "answer", lambda *rest, **more: given)
    result = evaluate_scenes(model, processor, data, 6)
    for task in TASKS:
        own = [place for place, item in enumerate(items) if item.task == task]
        assert result.points[task] == result.shuffled_points[task] == [float(place % 2) for place in own]
        assert result.images[task] == [items[place].image for place in own]
    estimates = result.estimates()
    assert list(estimates) == [*TASKS, "existence F1", "yes-ratio"]
    assert all(estimates[task].mean == result.scores[task] == 0.5 for task in TASKS)
    assert all(found.low < found.mean < found.high for found in estimates.values())
    pairs = [(answer, item.truth) for item, answer in result.answers if item.task == "existence"]
    said, true = [answer != "no" for answer, _ in pairs], [truth == "yes" for _, truth in pairs]
    hits = sum(a and t for a, t in zip(said, true, strict=True))
    assert estimates["existence F1"].mean == pytest.approx(2 * hits / (sum(said) + sum(true)))
    assert estimates["yes-ratio"].mean == pytest.approx(sum(said) / len(pairs))


def test_the_same_questions_have_the_same_hash(data: ScenesDataset) -> None:
    def asked(data: ScenesDataset, count: int) -> dict[str, str]:
        items = make_items(data, count)
        return Scores([(item, "") for item in items], {task: [0.0] for task in TASKS}).questions

    other = ScenesDataset(data.config, "test", scenes=30, seed=1)
    first = asked(data, 3)
    assert first == asked(data, 3) and len(set(first.values())) == len(TASKS)
    assert all(first[task] != asked(data, 4)[task] for task in TASKS)
    assert all(first[task] != asked(other, 3)[task] for task in ("existence", "position", "grounding"))


def test_without_the_control_nothing_is_shuffled(tiny_vlm, data: ScenesDataset) -> None:
    model, processor = tiny_vlm()
    seen: list[tuple[int, int]] = []
    result = evaluate_scenes(model, processor, data, 1, 4, control=False, progress=lambda *pair: seen.append(pair))
    assert result.shuffled == {} and result.scores.keys() == set(TASKS)
    assert seen == [(4, 7), (7, 7)]


def test_progress_counts_both_rounds(tiny_vlm, data: ScenesDataset) -> None:
    model, processor = tiny_vlm()
    seen: list[tuple[int, int]] = []
    evaluate_scenes(model, processor, data, 1, 4, progress=lambda *pair: seen.append(pair))
    assert seen == [(4, 14), (7, 14), (11, 14), (14, 14)]


def test_answers_do_not_depend_on_the_batch(tiny_vlm, data: ScenesDataset) -> None:
    """A model with random weights talks until it is cut off: also the cut must be each question's own."""
    model, processor = tiny_vlm()
    answers = [
        [answer for _, answer in evaluate_scenes(model, processor, data, 3, size, control=False).answers]
        for size in (1, 4, 50)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 5 and max(map(len, answers[0])) > 8


def test_answers_are_those_of_plain_generation(tiny_vlm, data: ScenesDataset) -> None:
    """Encoded once and asked in batches is the same as one image and one question by the processor."""
    model, processor = tiny_vlm()
    items = make_items(data, 2)
    images = [data.image(item.image) for item in items]
    visual = visual_tokens(model, processor, data.image, [item.image for item in items], 4)
    found = answer_all(model, processor, items, visual, torch.arange(len(items)), 5)
    length = {item: len(processor.tokenizer(item.truth)["input_ids"]) for item in items}
    for item, image, text in zip(items, images, found, strict=True):
        inputs = ask(processor, image, item.question)
        room = max(length[other] for other in items if other.task == item.task) + 8
        ids = model.generate(**inputs, max_new_tokens=room, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_a_model_that_rambles_gets_the_room_of_its_task(tiny_vlm, data: ScenesDataset) -> None:
    """A cut at each item's own truth gave away its length, and flattered captions that run on: here they begin with
    the truth, word by word, and go on."""
    model, processor = tiny_vlm()
    tokenizer, images = processor.tokenizer, range(8)
    visual = visual_tokens(model, processor, data.image, images, 4)

    def answers(items: list[Item], size: int = 3) -> list[str]:
        return answer_all(model, processor, items, visual, torch.tensor([item.image for item in items]), size)

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    free = answers([Item("long", n, "describe the image .", "word " * 40) for n in images])
    assert min(len(ids(text)) for text in free) > 30  # it does not stop by itself
    short = [Item("talk", n, "describe the image .", tokenizer.decode(ids(free[n])[:6]).strip()) for n in images]
    longest = Item("talk", 0, "describe the image .", tokenizer.decode(ids(free[0])[:30]).strip())
    found = answers([*short, longest])
    assert found == [one for item in (*short, longest) for one in answers([item, longest])[:1]]  # each by itself
    before = [answers([item])[0] for item in short]  # alone in its task: room for its own truth
    assert all(text.startswith(start) and len(text) > len(start) for text, start in zip(found, before, strict=False))
    truths = [[" ".join(item.truth.split())] for item in short]
    old, new = (sum(cider_d(texts, truths)) for texts in (before, found[:-1]))
    assert 0 < new < 0.8 * old


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_asked_in_eval_mode_and_given_back_as_it_was(
    tiny_vlm, data: ScenesDataset, training: bool
) -> None:
    model, processor = tiny_vlm()
    modes: list[bool] = []
    model.model.language_model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.train(training)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_scenes(model, processor, data, 1)
    assert modes and not any(modes)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
