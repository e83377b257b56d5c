"""Miniature files, each in the exact form of what its authors publish: what is asked, how it is scored, what is refused."""

# ruff: noqa: E501

from __future__ import annotations

import base64
import csv
import io
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from PIL import Image
from rich.console import Console

from sparsight.evaluation.ask import Questions
from sparsight.evaluation.benchmarks import FORMATS, benchmark_questions
from sparsight.evaluation.questions import held_out_questions
from sparsight.evaluation.scoring import METRICS, MME
from sparsight.pipeline import evaluate_checkpoint
from sparsight.settings import recipe
from sparsight.settings.recipe import HeldOut, held_out_file
from tiny import make_image


def image(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(number, 40).save(folder / name)


def dump(file: Path, content: Any) -> str:
    file.write_text(json.dumps(content))
    return str(file)


def vqav2(folder: Path) -> dict:
    """Of v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json."""
    head = {"info": {"version": "2.0"}, "license": {}, "data_subtype": "val2014", "data_type": "mscoco"}
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "Is he tall?", "question_id": 262148001},
        {"image_id": 393225, "question": "How many dogs?", "question_id": 393225000},
    ]
    said = [["down"] * 7 + ["table", "at table", "skateboard"], ["yes"] * 10, ["2"] * 2 + ["dog's"] * 8]
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": own[0],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number + 1} for number, text in enumerate(own)
            ],
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_id": question["question_id"],
        }
        for own, question in zip(said, questions, strict=True)
    ]
    image(folder, "COCO_val2014_000000262148.jpg", "COCO_val2014_000000393225.jpg")
    first = dump(folder / "questions.json", head | {"task_type": "Open-Ended", "questions": questions})
    second = dump(folder / "annotations.json", head | {"annotations": annotations})
    return {"data": {"path": first}, "answers": second}


def gqa(folder: Path) -> dict:
    """Of testdev_balanced_questions.json."""
    rows = {
        "201307251": {
            "semantic": [], "entailed": [], "equivalent": ["201307251"], "question": "Is it overcast?", "imageId": "n161313",
            "isBalanced": True, "groups": {}, "answer": "no", "semanticStr": "", "annotations": {}, "types": {},
            "fullAnswer": "No, it is clear.",
        },
        "201640614": {"question": "Who is wearing the dress?", "imageId": "n235859", "answer": "women"},
    }  # fmt: skip
    image(folder, "n161313.jpg", "n235859.jpg")
    return {"data": {"path": dump(folder / "gqa.json", rows)}}


def textvqa(folder: Path) -> dict:
    """Of TextVQA_0.5.1_val.json."""
    row = {
        "question": "what is the brand of this camera?", "image_id": "003a8ae2ef43b901", "image_classes": ["Cassette deck"],
        "flickr_original_url": "", "image_width": 1024, "image_height": 664, "question_id": 34602, "set_name": "val",
        "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", "dakota", "dakota", "dakota digital",
                    "dakota digital", "dakota", "dakota's"],
    }  # fmt: skip
    image(folder, "003a8ae2ef43b901.jpg")
    top = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [row]}
    return {"data": {"path": dump(folder / "textvqa.json", top)}}


def scienceqa(folder: Path) -> dict:
    """Of problems.json."""
    row = {
        "question": "Which property do these match?", "choices": ["rough", "soft", "yellow"], "answer": 1,
        "hint": "Select the better answer.", "image": "image.png", "task": "closed choice", "grade": "grade2",
        "subject": "natural science", "topic": "physics", "category": "Materials", "skill": "Compare", "lecture": "",
        "solution": "", "split": "test",
    }  # fmt: skip
    rows = {"4": row, "5": row | {"image": None, "hint": ""}, "1": row | {"split": "train"}}
    image(folder, "images/test/4/image.png")
    return {"data": {"path": dump(folder / "problems.json", rows), "images": str(folder / "images")}}


def pope(folder: Path) -> dict:
    """Of coco_pope_random.json, a line for each question."""
    labels = [("snowboard", "yes"), ("dining table", "no"), ("person", "yes"), ("car", "no")]
    rows = [
        {
            "question_id": n + 1,
            "image": f"COCO_val2014_{n // 2:012d}.jpg",
            "text": f"Is there a {w} in the image?",
            "label": l,
        }
        for n, (w, l) in enumerate(labels)
    ]
    image(folder, "COCO_val2014_000000000000.jpg", "COCO_val2014_000000000001.jpg")
    (folder / "pope.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"data": {"path": str(folder / "pope.json")}}


def mme(folder: Path) -> dict:
    """Of MME_Benchmark_release_version: both of its forms of folders."""
    for category, text in (
        ("existence", "0001"),
        ("existence", "0002"),
        ("code_reasoning", "0001"),
    ):  # whose names recur
        (folder / "mme" / category).mkdir(parents=True, exist_ok=True)
        lines = [f"Is {text} in it? Please answer yes or no.\tYes", "Is it not? Please answer yes or no.\tNo"]
        (folder / "mme" / category / f"{text}.txt").write_text("\n".join(lines))
        image(folder, f"mme/{category}/{text}.{'png' if category == 'code_reasoning' else 'jpg'}")
    (folder / "mme/posters/questions_answers_YN").mkdir(parents=True)
    (folder / "mme/posters/questions_answers_YN/tt01.txt").write_text("Is it a film?\tYes\nIs it a song?\tNo\n")
    image(folder, "mme/posters/images/tt01.jpg")
    return {"data": {"path": str(folder / "mme")}}


COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
           "split"]  # fmt: skip


def mmbench(folder: Path, rolled: bool = False) -> dict:
    """Of mmbench_dev_20230712.tsv; ``rolled``: of mmbench_dev_en_20231003.tsv, which holds the rolled options."""
    buffers = [io.BytesIO(), io.BytesIO()]
    for number, buffer in enumerate(buffers):
        make_image(number, 40).save(buffer, format="JPEG")
    one, other = (base64.b64encode(buffer.getvalue()).decode() for buffer in buffers)
    rows = [
        dict(zip(COLUMNS, [241, "Which is\nthe main topic?", "", "cat", "dog", "a fish", "", "B", "topic", one, "s",
                           "coarse", "", "dev"], strict=True)),
        dict(zip(COLUMNS, [252, "Is it so?", "The passage.", "yes", "no", "", "", "A", "topic", other, "s", "fine", "",
                           "dev"], strict=True)),
    ]  # fmt: skip
    if rolled:
        rows += [rows[1] | {"index": 1000252, "A": "no", "B": "yes", "answer": "B", "image": "252"}]
    with (folder / "mmbench.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return {"data": {"path": str(folder / "mmbench.tsv")}}


def refcoco(folder: Path) -> dict:
    """Of refs(unc).p as JSON, and instances.json."""
    refs = [
        {
            "sent_ids": [0, 1], "file_name": "COCO_train2014_000000581857_16.jpg", "ann_id": 1719310, "ref_id": 0,
            "image_id": 581857, "split": split, "category_id": 1,
            "sentences": [
                {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
                {"tokens": ["lady"], "raw": "lady", "sent_id": 1, "sent": "lady in blue"},
            ],
        }
        for split in ("testA", "train")
    ]  # fmt: skip
    coco = {
        "info": {},
        "images": [
            {"license": 1, "file_name": "COCO_train2014_000000000009.jpg", "height": 300, "width": 300, "id": 9},
            {"license": 1, "file_name": "COCO_train2014_000000581857.jpg", "height": 400, "width": 640, "id": 581857},
        ],
        "annotations": [
            {"segmentation": [], "area": 1, "iscrowd": 0, "image_id": 581857, "bbox": [64.0, 40.0, 320.0, 200.0],
             "category_id": 1, "id": 1719310},
            {"segmentation": [], "area": 1, "iscrowd": 0, "image_id": 9, "bbox": [1.0, 2.0, 3.0, 4.0], "category_id": 1, "id": 7},
        ],
        "categories": [],
    }  # fmt: skip
    image(folder, "COCO_train2014_000000581857.jpg")
    second = dump(folder / "instances.json", coco)
    return {"data": {"path": dump(folder / "refs.json", refs)}, "answers": second, "split": "testA"}


def coco_captions(folder: Path) -> dict:
    """Of captions_val2017.json."""
    image(folder, "000000179765.jpg", "000000190236.jpg")
    top = {
        "info": {}, "licenses": [],
        "images": [{"license": 3, "file_name": f"{n:012d}.jpg", "height": 40, "width": 40, "id": n} for n in (179765, 190236)],
        "annotations": [
            {"image_id": 179765, "id": 38, "caption": "A black Honda motorcycle parked in front of a garage."},
            {"image_id": 190236, "id": 45, "caption": "An office cubicle with four different types of computers."},
            {"image_id": 179765, "id": 98, "caption": "A Honda motorcycle in a grass driveway"},
        ],
    }  # fmt: skip
    return {"data": {"path": dump(folder / "captions.json", top)}}


MINIATURES = (vqav2, gqa, textvqa, scienceqa, pope, mme, mmbench, refcoco, coco_captions)
SHORT = "\nAnswer the question using a single word or phrase."


def read(make: Any, folder: Path, **more: Any) -> Questions:
    return held_out_questions("own", HeldOut(format=make.__name__, **make(folder), **more), 32)


def test_every_format_and_metric_has_a_name_in_the_settings() -> None:
    assert ("conversations", *FORMATS) == get_args(recipe.Format)
    assert set(METRICS) == set(get_args(recipe.Metric)) and {each.metric for each in FORMATS.values()} <= set(METRICS)
    assert [each.__name__ for each in MINIATURES] == list(FORMATS)


# Format: first question, first truth, and for some answers to all questions the points.
EXPECTED: dict[str, tuple[str, str, list[tuple[list[str], list[float]]]]] = {
    "vqav2": (f"Where is he looking?{SHORT}", "down", [
        (["Down.", "Yes", "dogs"], [1, 1, 0]), (["table", "no", "two"], [0.3, 0, 0.6]), (["x", "x", "dog's"], [0, 0, 1]),
    ]),
    "gqa": (f"Is it overcast?{SHORT}", "no", [(["No.", "women"], [1, 1]), (["not", "woman"], [0, 0])]),
    "textvqa": (f"What is the brand of this camera?{SHORT}", "dakota", [
        (["Dakota?"], [1]), (["dakota's"], [0.3]), (["dakota 's"], [0.3]), (["the dakota digital"], [0.9]),
    ]),
    "scienceqa": (
        "Context: Select the better answer.\nWhich property do these match?\nA. rough\nB. soft\nC. yellow\n"
        "Answer with the option's letter from the given choices directly.",
        "B",
        [(["b"], [1]), (["B. soft"], [1]), (["soft"], [0]), (["A"], [0])],
    ),
    "pope": (f"Is there a snowboard in the image?{SHORT}", "yes", [
        (["yes", "no", "Yes, there is", "No, there is not"], [1, 1, 1, 1]), (["yes", "yes", "no", "yes"], [1, 0, 0, 0]),
    ]),
    "mme": ("Is 0001 in it? Please answer yes or no.", "Yes", [
        (["Yes", "no", "Yes.", "No", "maybe", "no", "yes", "no"], [1, 1, 1, 1, 0, 1, 1, 1])
    ]),
    "mmbench": (
        "Which is\nthe main topic? There are several options:\nA. cat\nB. dog\nC. a fish\n"
        "Answer with the option's letter from the given choices directly.",
        "B",
        [(["B", "C.", "(A)", "yes", "B"], [1, 1, 1, 1, 1]), (["A", "dog", "A or B", "B. no", "yes no"], [0, 1, 0, 0, 0])],
    ),
    "refcoco": ("", "[0.1, 0.1, 0.6, 0.6]", [
        (["[0.1, 0.1, 0.6, 0.6]", "It is at [0.1,0.1,0.6,0.36]."], [1, 1]), (["10 10 60 60", "0.1 0.1 0.6 0.6"], [1, 0]),
    ]),
    "coco_captions": ("Provide a one-sentence caption for the provided image.", "A black Honda motorcycle parked in front of "
        "a garage.", [(["", "An office cubicle with four different types of computers."], [0, 1])]),
}  # fmt: skip


@pytest.mark.parametrize("make", MINIATURES)
def test_a_miniature_of_the_published_file(make: Any, tmp_path: Path) -> None:
    questions = read(make, tmp_path)
    text, truth, cases = EXPECTED[make.__name__]
    item = questions.items[0]
    assert item.question == text if text else item.question.endswith("this sentence describes: the lady")
    assert item.truth == truth and all(questions.image(each.image).size == (40, 40) for each in questions.items)
    for answers, points in cases:
        assert questions.score(questions.items, answers) == pytest.approx(points), answers
    assert f"own: {len(questions.items)} of {len(questions.items)} questions of " in questions.note
    assert questions.score(questions.items, [""] * len(questions.items)) == [0] * len(questions.items)


@pytest.mark.parametrize(
    "make, last, images", [(vqav2, "COCO_val2014_000000393225.jpg", [0, 0, 1]), (gqa, "n235859.jpg", [0, 1])]
)
def test_a_question_is_about_its_own_image(make: Any, last: str, images: list[int], tmp_path: Path) -> None:
    questions = read(make, tmp_path)
    assert [item.image for item in questions.items] == images
    assert (
        questions.image(1).tobytes()
        == Image.open(tmp_path / last).convert("RGB").tobytes()
        != questions.image(0).tobytes()
    )


def test_science_questions_without_an_image_are_counted(tmp_path: Path) -> None:
    assert read(scienceqa, tmp_path).note.endswith("problems.json; 1 without an image are left out")


def test_pope_reports_its_figures(tmp_path: Path) -> None:
    questions = read(pope, tmp_path)
    answers = ["yes", "yes", "no", ""]
    found = questions.figures(questions.items, answers, questions.score(questions.items, answers))
    expected = {"precision": 1 / 2, "recall": 1 / 2, "F1": 1 / 2, "yes-ratio": 1 / 2}
    assert {name: value.mean for name, value in found.items()} == expected


def test_mme_has_two_scores(tmp_path: Path) -> None:
    questions = read(mme, tmp_path)
    assert [item.category for item in questions.items] == ["code_reasoning"] * 2 + ["existence"] * 4 + ["posters"] * 2
    answers = ["yes", "yes", "yes", "no", "yes", "yes", "no", "no"]  # existence: 3 of 4, one image of two whole
    points = questions.score(questions.items, answers)
    found = questions.figures(questions.items, answers, points)
    assert {name: value.mean for name, value in found.items()} == {
        "perception score, 2 of 10 categories": pytest.approx(0.75 + 0.5 + 0.5 + 0),
        "cognition score, 1 of 4 categories": pytest.approx(0.5),
    }
    assert sum(map(len, MME.values())) == 14


@pytest.mark.parametrize("inside", ["MME_Benchmark", "."])
def test_mme_takes_the_folder_above_and_its_own_categories_alone(inside: str, tmp_path: Path) -> None:
    """A category that is none would be in neither score."""
    folder = Path(mme(tmp_path)["data"]["path"])
    folder.rename(tmp_path / "MME_Benchmark")
    settings = HeldOut(format="mme", data={"path": str(tmp_path / inside)})
    questions = benchmark_questions("own", settings)
    assert [item.category for item in questions.items][::2] == ["code_reasoning", "existence", "existence", "posters"]
    (tmp_path / "MME_Benchmark/existence").rename(tmp_path / "MME_Benchmark/existance")
    with pytest.raises(
        ValueError, match="0001.txt: 'existance' is no category of MME; expected folders of existence, count"
    ):
        benchmark_questions("own", settings)
    with pytest.raises(ValueError, match="note.txt: expected the folder that holds MME's categories"):
        benchmark_questions("own", HeldOut(format="mme", data={"path": str(tmp_path / "note.txt")}))


def test_mmbench_is_right_only_in_every_order(tmp_path: Path) -> None:
    questions = read(mmbench, tmp_path)
    assert [item.truth for item in questions.items] == ["B", "C", "A", "A", "B"]
    assert [item.options for item in questions.items][1] == ("a fish", "cat", "dog")
    answers = ["B", "C", "A", "A", "A"]
    found = questions.figures(questions.items, answers, questions.score(questions.items, answers))
    assert found["circular accuracy"].mean == 0.5  # one of two questions, of four answers of five


def test_mmbench_takes_the_rolled_rows_of_a_file(tmp_path: Path) -> None:
    settings = HeldOut(format="mmbench", **mmbench(tmp_path, rolled=True))
    questions = benchmark_questions("own", settings)
    assert [(item.group, item.truth) for item in questions.items] == [("241", "B"), ("252", "A"), ("252", "B")]
    assert [item.image for item in questions.items] == [0, 1, 1]


def test_captions_have_the_usual_scale(tmp_path: Path) -> None:
    questions = read(coco_captions, tmp_path)
    answers = [item.truths[0] for item in questions.items]
    points = questions.score(questions.items, answers)
    found = questions.figures(questions.items, answers, points)
    assert [len(item.truths) for item in questions.items] == [2, 1]
    assert found["CIDEr-D"].mean == pytest.approx(10 * sum(points) / 2) and points[1] == pytest.approx(1)


@pytest.mark.parametrize("make, items, kept", [(mmbench, 4, 3), (mme, 3, 2), (gqa, 1, 1), (mmbench, 1, 3)])
def test_few_items_are_whole_groups(make: Any, items: int, kept: int, tmp_path: Path) -> None:
    """Half a pair or some of the orders would be scored as if they were all; the first group is asked at least."""
    assert len(read(make, tmp_path, items=items).items) == kept


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "make, file, old, new, said",
    [
        (vqav2, "annotations.json", "393225000", "393225009", "of 3 of .*questions.json, 1 have no match by 'question_id', "
         "and 1 rows here match none; the first is question_id 393225000"),
        (vqav2, "annotations.json", '"annotations": [{', '"annotations": [], "old": [{', "of 3 of .*questions.json, 3 have no match by "
         "'question_id', and 0 rows"),
        (vqav2, "questions.json", '"questions": [{', '"questions": [], "old": [{', "0 have no match by 'question_id', and 3 rows"),
        (vqav2, "questions.json", '"question":', '"qestion":', r"questions.json, questions\[0\]: expected a field 'question', "
         "found .*'qestion'"),
        (gqa, "gqa.json", '"answer": "no"', '"answer": ""', "1 of 2 questions have no answer; the first is 201307251"),
        (gqa, "gqa.json", '"answer": "no", ', "", "gqa.json, 201307251: expected a field 'answer', found"),
        (gqa, "gqa.json", "n235859", "n0", "1 of 2 images are missing; the first is .*/n0.jpg"),
        (textvqa, "textvqa.json", '"data":', '"dta":', "textvqa.json: expected a field 'data', found"),
        (textvqa, "textvqa.json", '"answers": [', '"answers": [], "old": [', "1 of 1 questions have no answer"),
        (scienceqa, "problems.json", '"split": "test"', '"split": "tset"', "expected rows of split 'test', and no others .* found {'tset': 1"),
        (mme, "mme/existence/0001.txt", "\tNo", " No", "0001.txt: expected two lines, each a question, a tab, and Yes or No"),
        (textvqa, "textvqa.json", '"answers": [', '"answers": "dakota", "old": [', "'answers': expected list, found 'dakota'"),
        (scienceqa, "problems.json", '"answer": 1', '"answer": 3', "problems.json, 4: the answer is 3, expected one of 0 to 2"),
        (scienceqa, "problems.json", '"answer": 1', '"answer": -1', "the answer is -1, expected one of 0 to 2"),
        (mmbench, "mmbench.tsv", "\tB\ttopic", "\tD\ttopic", r"row 0: expected .* the letter of one as answer; found '241', .* 'D'"),
        (mmbench, "mmbench.tsv", "\tB\ttopic", "\t\ttopic", r"mmbench.tsv: 3 of 5 questions have no answer; the first is 241"),
        (mmbench, "mmbench.tsv", "\tdog\t", "\t\t", "row 0: expected .* options from A on without a gap"),
        (mmbench, "mmbench.tsv", "241\t", "two\t", "row 0: expected a number as index"),
        (mmbench, "mmbench.tsv", "hint\t", "hnt\t", "mmbench.tsv, row 0: expected a field 'hint'"),
        (mmbench, "mmbench.tsv", "\t/9j/", "\t?9j/", "mmbench.tsv, row 0: the image is neither base64 nor another row's index"),
        (refcoco, "instances.json", '"id": 1719310', '"id": 1', "1 of 1 refs name an image or a box that is not in it; the "
         "first is ref_id 0"),
        (coco_captions, "captions.json", '"image_id": 190236', '"image_id": 1', "captions.json, annotations: of 2 of images, 1 "
         "have no match by 'id', and 1 rows here match none"),
        (pope, "pope.json", '"label": "no"', '"label": "maybe"', "1 of 4 truths are neither yes nor no; the first is 'maybe'"),
    ],
)  # fmt: skip
def test_what_a_file_lacks_is_named_and_counted(make, file, old, new, said, tmp_path: Path) -> None:
    settings = HeldOut(format=make.__name__, **make(tmp_path))
    change(tmp_path / file, old, new)
    with pytest.raises(ValueError, match=said):
        benchmark_questions("own", settings)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"format": "vqa2"}, "format: expected one of 'conversations', 'vqav2'"),
        (
            {"format": "vqav2"},
            r"format vqav2 keeps its answers in a file of its own; give it as answers \(--answers\): v2_mscoco",
        ),
        ({"format": "gqa", "answers": "a.json"}, "answers 'a.json': gqa has none"),
        ({"format": "gqa", "prompt": "Say:"}, r"prompt 'Say:': expected \{question\} in it"),
        ({"metric": "mme"}, "metric mme needs format mme, found conversations"),
        ({"metrc": "vqa"}, "unknown key 'metrc' in HeldOut; did you mean 'metric'"),
    ],
)
def test_settings_that_do_not_fit_are_told(keys: dict, said: str, tmp_path: Path) -> None:
    values = {"data": vqav2(tmp_path)["data"]} | keys
    with pytest.raises(ValueError, match=said):
        held_out_questions("own", HeldOut.read(values, "eval"), 32)


def test_the_recipe_of_the_page_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    held_out = recipe.Evaluation.read(yaml.safe_load(block)["evaluation"], "page").held_out["pope"]
    assert (held_out.format, held_out.items) == ("pope", 3000)
    assert all(f"| `{name}` |" in page for name in FORMATS)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "refs(unc).p").write_bytes(b"x")
    settings = HeldOut(data={"path": str(tmp_path / "refs(unc).p")}, format="refcoco", answers="instances.json")
    with pytest.raises(ValueError, match=r"a pickle can run code .* make JSON of it: json.dump"):
        benchmark_questions("own", settings)


def test_a_saved_model_is_asked_and_its_empty_answers_are_counted(tmp_path: Path, tiny_vlm) -> None:
    """A model that ends at once would be "yes" to all of POPE, whose rules take an empty answer for a yes."""
    model, processor = tiny_vlm()
    end = processor.tokenizer.eos_token_id
    model.generation_config.begin_suppress_tokens = [id for id in range(len(processor.tokenizer)) if id != end]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    out, file = StringIO(), Path(pope(tmp_path)["data"]["path"])
    held_out = held_out_file(file, None, None, 10, format="pope", split="test")
    (result,) = evaluate_checkpoint(tmp_path / "model", 10, "test", Console(file=out, width=160), held_out)
    assert [answer for _, answer in result.answers] == [""] * 4 and result.scores == {"pope": 0}
    assert {name: value.mean for name, value in result.figures.items()} == dict.fromkeys(result.figures, 0)
    assert f"pope: 4 of 4 questions of {file}" in out.getvalue().replace("\n", "")
    assert "4 of 4 answers are empty: no points" in out.getvalue() and "yes-ratio" in out.getvalue()
    assert "not above the control with shuffled images: pope. Nothing shows" in out.getvalue()


def test_lines_of_other_alphabets_are_no_rows(tmp_path: Path) -> None:
    """Signs at which Python's splitlines parts lines stand in questions of tables and of MME."""
    settings = {each.__name__: each(tmp_path) for each in (mmbench, mme)}
    change(tmp_path / "mmbench.tsv", "The passage.", "The\u2028passage.\x85")
    change(tmp_path / "mme/existence/0001.txt", "Is 0001 in it?", "Is\x0b0001\u2028in it?")
    asked = {name: benchmark_questions(name, HeldOut(format=name, **own)).items for name, own in settings.items()}
    assert asked["mmbench"][3].question.startswith("The\u2028passage.\x85 Is it so?")
    assert asked["mme"][2].question.startswith("Is\x0b0001\u2028in it?")
