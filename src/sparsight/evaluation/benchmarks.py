"""Benchmarks in the file formats that their authors publish: one table of readers, one of metrics.

Users bring the files. A reader gives a `Question` for each row; `benchmark_questions` makes questions of them. What a
file lacks is an error that names it and counts how much is missing, never a lower score.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from sparsight.data.cells import find_file
from sparsight.data.images import load_image
from sparsight.data.rows import decode, parse
from sparsight.errors import UserError
from sparsight.evaluation.ask import Item, Questions
from sparsight.evaluation.scoring import MME, score
from sparsight.settings.recipe import HeldOut

_SHORT = "{question}\nAnswer the question using a single word or phrase."
_LETTER = "{question}\nAnswer with the option's letter from the given choices directly."
_BOX = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: {question}"
)
_SPLITS = {"train", "val", "test", "minitrain", "minival", "minitest", "testA", "testB"}
_ROLLED = 10**6  # MMBench: rows of one question whose options are rolled have numbers that differ by multiples of it


@dataclass(frozen=True)
class Question:
    """A row: ``image`` is a path inside the image folder, or the image's bytes; ``group`` is asked whole or not at all;
    the first of ``truths`` is the most usual."""

    id: str
    image: str | bytes | None
    text: str
    truths: tuple[str, ...]
    options: tuple[str, ...] = ()
    group: str = ""
    category: str = ""


class _Row(dict[str, Any]):
    """Fields of a row; one that is not there is an error that names the row and the fields that are."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected a mapping of fields, found {type(values).__name__}")
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.where}: expected a field '{key}', found {sorted(map(str, self))[:20]}")

    def of(self, key: str, kind: type) -> Any:
        if not isinstance(self[key], kind):
            raise UserError(f"{self.where}, '{key}': expected {kind.__name__}, found {self[key]!r:.80}")
        return self[key]

    def rows(self, key: str) -> Iterator[_Row]:
        return (_Row(values, f"{self.where}, {key}[{number}]") for number, values in enumerate(self.of(key, list)))


def _content(path: str) -> bytes:
    if path.endswith((".p", ".pkl", ".pickle")):
        line = "json.dump(pickle.load(open('refs(unc).p', 'rb'), encoding='latin1'), open('refs.json', 'w'))"
        raise UserError(f"{path}: a pickle can run code when it is read, so none is; make JSON of it: {line}")
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    return Path(path).read_bytes()


def _file(path: str) -> _Row:
    """A JSON file whose top is a mapping; one that is a list is under "rows"."""
    top = parse(_content(path), path)
    return _Row({"rows": top} if isinstance(top, list) else top, path)


def _answers(settings: HeldOut, what: str) -> _Row:
    if settings.answers is None:
        raise UserError(
            f"format {settings.format} keeps its answers in a file of its own; give it as answers (--answers): {what}"
        )
    return _file(settings.answers)


def _named(settings: HeldOut) -> Iterator[_Row]:
    """Rows of a mapping, with their keys as ids."""
    top = _file(settings.data.path)
    return (_Row({"id": key} | _Row(row, f"{top.where}, {key}"), f"{top.where}, {key}") for key, row in top.items())


def _lines(settings: HeldOut) -> Iterator[_Row]:
    names = (
        (f"{settings.data.path}, line {n}", line) for n, line in enumerate(_content(settings.data.path).splitlines(), 1)
    )
    return (_Row(parse(line, where), where) for where, line in names if line.strip())


def _by_id(rows: Iterable[_Row], key: str, where: str, wanted: Iterable[Any], other: str) -> dict[Any, _Row]:
    """Rows by their id, which are to be those that are wanted."""
    found, wanted = {row[key]: row for row in rows}, list(wanted)
    lost, spare = [each for each in wanted if each not in found], found.keys() - set(wanted)
    if lost or spare:
        some = f"; the first is {key} {(lost or sorted(spare))[0]}"
        raise UserError(
            f"{where}: of {len(wanted)} of {other}, {len(lost)} have no match by '{key}', and {len(spare)} rows here "
            f"match none{some}. Expected the two files of one split"
        )
    return found


def _vqav2(settings: HeldOut) -> Iterator[_Row]:
    top, notes = _file(settings.data.path), _answers(settings, "v2_mscoco_val2014_annotations.json")
    rows = list(top.rows("questions"))
    wanted = [row["question_id"] for row in rows]
    told = _by_id(notes.rows("annotations"), "question_id", notes.where, wanted, top.where)
    for row in rows:
        said = [each["answer"] for each in told[row["question_id"]].rows("answers")]
        file = f"COCO_{top['data_subtype']}_{row.of('image_id', int):012d}.jpg"
        yield _Row(row | {"answers": said, "file": file}, row.where)


def _textvqa(settings: HeldOut) -> Iterator[_Row]:
    rows = _file(settings.data.path).rows("data")
    return (_Row(row | {"question": row.of("question", str).capitalize()}, row.where) for row in rows)


def _scienceqa(settings: HeldOut) -> Iterator[Question]:
    for row in _of_split(list(_named(settings)), settings):
        letters = ascii_uppercase[: len(row.of("choices", list))]
        if row.of("answer", int) not in range(len(letters)):
            raise UserError(f"{row.where}: the answer is {row['answer']}, expected one of 0 to {len(letters) - 1}")
        choices = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
        text = "\n".join([*([f"Context: {row['hint']}"] if row["hint"] else []), row["question"], *choices])
        image = row["image"] and f"{row['split']}/{row['id']}/{row['image']}"
        yield Question(row["id"], image, text, (letters[row["answer"]],))


def _mme(settings: HeldOut) -> Iterator[Question]:
    folder = Path(settings.data.path)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder that holds MME's categories")
    for file in sorted(folder.rglob("*.txt")):
        parent, own, name = file.parent, file.parent, file.stem
        if parent.name == "questions_answers_YN":
            parent, own = parent.parent / "images", parent.parent
        if own.name not in (known := [*MME["perception"], *MME["cognition"]]):
            raise UserError(f"{file}: '{own.name}' is no category of MME; expected folders of {', '.join(known)}")
        lines = [line.strip() for line in decode(_content(str(file)), str(file)).split("\n") if line.strip()]
        pairs = [line.rsplit("\t", 1) for line in lines]
        if len(pairs) != 2 or any(len(pair) != 2 or pair[1] not in ("Yes", "No") for pair in pairs):
            raise UserError(f"{file}: expected two lines, each a question, a tab, and Yes or No; found {lines!r:.200}")
        beside = [parent / f"{name}{end}" for end in (".jpg", ".png")]
        image = next((each for each in beside if each.is_file()), beside[0]).relative_to(folder)
        for number, (text, truth) in enumerate(pairs):
            group = f"{own.name}/{name}"
            yield Question(f"{group}/{number}", str(image), text, (truth,), group=group, category=own.name)


def _mmbench(settings: HeldOut) -> Iterator[Question]:
    path = settings.data.path
    csv.field_size_limit(sys.maxsize)
    table = csv.DictReader(io.StringIO(decode(_content(path), path), newline=""), delimiter="\t")
    rows = [_Row(row, f"{path}, row {number}") for number, row in enumerate(table)]
    images = {row["index"]: row["image"] for row in rows}
    questions = []
    for row in rows:
        given = {letter: row[letter] for letter in "ABCDE" if row.get(letter) not in (None, "", "nan")}
        letters = ascii_uppercase[: len(given)]
        if [*given] != [*letters] or row["answer"] not in ("", *letters) or not row["index"].isdigit():
            raise UserError(
                f"{row.where}: expected a number as index, options from A on without a gap, and the letter of one as "
                f"answer; found '{row['index']}', {given}, '{row['answer']}'"
            )
        hint = "" if row["hint"] in (None, "", "nan") else f"{row['hint']} "
        image = images.get(row["image"], row.of("image", str))  # a number: that of another row
        try:
            content = base64.b64decode(image, validate=True)
        except binascii.Error as error:
            raise UserError(f"{row.where}: the image is neither base64 nor another row's index: {error}") from None
        group, text = str(int(row["index"]) % _ROLLED), f"{hint}{row['question']}"
        questions.append(Question(row["index"], content, text, (row["answer"],), tuple(given.values()), group))
    if len({question.group for question in questions}) == len(questions):  # a file without rolled rows
        questions = [_rolled(question, by) for question in questions for by in range(len(question.options))]
    for each in questions:
        lines = [f"{letter}. {option}" for letter, option in zip("ABCDE", each.options, strict=False)]
        yield replace(each, text="\n".join([f"{each.text} There are several options:", *lines]))


def _rolled(question: Question, by: int) -> Question:
    """The same question with its options moved on by so many letters, and its true letter with them."""
    count = len(question.options)
    options = tuple(question.options[(number - by) % count] for number in range(count))
    truth = question.truths[0] and "ABCDE"[("ABCDE".index(question.truths[0]) + by) % count]  # none: of no order
    return replace(question, id=str(int(question.id) + by * _ROLLED), options=options, truths=(truth,))


def _refcoco(settings: HeldOut) -> Iterator[Question]:
    refs = _of_split(list(_file(settings.data.path).rows("rows")), settings)
    coco = _answers(settings, "instances.json")
    images, boxes = ({row["id"]: row for row in coco.rows(key)} for key in ("images", "annotations"))
    lost = [ref["ref_id"] for ref in refs if ref["image_id"] not in images or ref["ann_id"] not in boxes]
    if lost:
        raise UserError(
            f"{coco.where}: {len(lost)} of {len(refs)} refs name an image or a box that is not in it; the first is "
            f"ref_id {lost[0]}"
        )
    for ref in refs:
        image, (x, y, width, height) = images[ref["image_id"]], boxes[ref["ann_id"]]["bbox"]
        sides = [image["width"], image["height"]] * 2
        box = [value / side for value, side in zip((x, y, x + width, y + height), sides, strict=True)]
        for sentence in ref.rows("sentences"):
            yield Question(str(sentence["sent_id"]), image["file_name"], sentence["sent"], (json.dumps(box),))


def _coco_captions(settings: HeldOut) -> Iterator[Question]:
    top = _file(settings.data.path)
    images, said = list(top.rows("images")), dict[Any, list[str]]()
    for note in top.rows("annotations"):
        said.setdefault(note["image_id"], []).append(note["caption"])
    rows = (_Row({"id": key}, top.where) for key in said)
    _by_id(rows, "id", f"{top.where}, annotations", [row["id"] for row in images], "images")
    for row in images:
        yield Question(str(row["id"]), row["file_name"], "", tuple(said[row["id"]]))


def _of_split(rows: list[_Row], settings: HeldOut) -> list[_Row]:
    counts = Counter(row["split"] for row in rows)
    if settings.split not in counts or counts.keys() - _SPLITS:
        raise UserError(
            f"{settings.data.path}: expected rows of split '{settings.split}', and no others than {sorted(_SPLITS)}; "
            f"found {dict(counts)}"
        )
    return [row for row in rows if row["split"] == settings.split]


def _usual(truths: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text, count in Counter(truths).most_common() for _ in range(count))


def _each(
    rows: Callable[[HeldOut], Iterator[_Row]], key: str, image: str, text: str, truths: Callable[[_Row], Any]
) -> Any:
    """A reader of files with a row for each question: fields of its id and text, form of its image, and its truths."""

    def read(settings: HeldOut) -> Iterator[Question]:
        for row in rows(settings):
            yield Question(str(row[key]), image.format_map(row), row.of(text, str), tuple(truths(row)))

    return read


@dataclass(frozen=True)
class Format:
    """How a benchmark's files are read, its metric, and what stands around a question."""

    read: Callable[[HeldOut], Iterator[Question]]
    metric: str
    prompt: str = _SHORT


FORMATS: Mapping[str, Format] = {
    "vqav2": Format(_each(_vqav2, "question_id", "{file}", "question", lambda row: _usual(row["answers"])), "vqa"),
    "gqa": Format(_each(_named, "id", "{imageId}.jpg", "question", lambda row: [row["answer"]]), "bare_match"),
    "textvqa": Format(
        _each(_textvqa, "question_id", "{image_id}.jpg", "question", lambda row: _usual(row.of("answers", list))),
        "textvqa",
    ),
    "scienceqa": Format(_scienceqa, "letter", _LETTER),
    "pope": Format(_each(_lines, "question_id", "{image}", "text", lambda row: [row["label"]]), "yes_no"),
    "mme": Format(_mme, "mme", "{question}"),  # which says how to answer
    "mmbench": Format(_mmbench, "mmbench", _LETTER),
    "refcoco": Format(_refcoco, "box_match", _BOX),
    "coco_captions": Format(_coco_captions, "cider_d", "Provide a one-sentence caption for the provided image."),
}


def benchmark_questions(name: str, settings: HeldOut) -> Questions:
    """The first questions of a benchmark's files, groups whole; ``note`` says how many the files hold.

    Raises:
        UserError: a file, a field, an answer or an image is missing, or ids do not match; the message counts them.
    """
    form, path = FORMATS[settings.format], settings.data.path
    every = list(form.read(settings))
    asked, bare = [each for each in every if each.image is not None], sum(each.image is None for each in every)
    if untrue := [each.id for each in asked if not each.truths or not all(map(_told, each.truths))]:
        raise UserError(f"{path}: {len(untrue)} of {len(asked)} questions have no answer; the first is {untrue[0]}")
    if FORMATS[settings.format].metric == "yes_no" and (
        odd := [q.truths[0] for q in asked if q.truths[0] not in ("yes", "no")]
    ):
        raise UserError(f"{path}: {len(odd)} of {len(asked)} truths are neither yes nor no; the first is '{odd[0]}'")
    if not asked:
        raise UserError(f"{path}: no questions about images in it (format {settings.format})")
    groups: dict[str, list[Question]] = {}
    for number, each in enumerate(asked):
        groups.setdefault(each.group or str(number), []).append(each)
    chosen: list[Question] = []
    for own in groups.values():
        if chosen and len(chosen) + len(own) > settings.items:
            break
        chosen += own
    folder = Path(settings.data.images or (path if os.path.isdir(path) else Path(path).parent))
    images = list(dict.fromkeys(each.image for each in chosen if each.image is not None))
    files = [find_file(folder, image) for image in images if isinstance(image, str)]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{path}: {len(missing)} of {len(images)} images are missing; the first is {missing[0]}")
    place, prompt = {image: at for at, image in enumerate(images)}, settings.prompt or form.prompt
    items = [
        Item(
            name, place[each.image], prompt.replace("{question}", each.text), each.truths[0],
            truths=each.truths, options=each.options, group=each.group, category=each.category,
        )
        for each in chosen
        if each.image is not None
    ]  # fmt: skip
    note = f"{name}: {len(items):,} of {len(asked):,} questions of {path}"
    note += f"; {bare:,} without an image are left out" if bare else ""

    def image(at: int) -> Any:
        found = images[at]
        return load_image(found if isinstance(found, bytes) else find_file(folder, found), f"{path}, image {at}")

    return replace(score(items, image, settings.metric or form.metric), note=note)


def _told(truth: Any) -> bool:
    return isinstance(truth, str) and bool(truth.strip())
