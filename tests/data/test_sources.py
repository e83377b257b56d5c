"""Conversations from files: what is read, and what is said about each fault."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from pydantic import ValidationError

from sparsight.data.conversations import EXAMPLE
from sparsight.data.sources import ConversationSource, SceneSource, TableSource
from sparsight.settings.data import ConversationData, SceneData

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A dog."}
READ = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
]


def row(**changes: Any) -> dict[str, Any]:
    """A good row, with changes; None takes a key out."""
    values = {"id": "s-1", "image": "a.png", "conversations": [QUESTION, ANSWER]} | changes
    return {key: value for key, value in values.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def opened(folder: Path, *rows: Any, images: str | None = None, name: str = "data.json") -> ConversationSource:
    file = folder / name
    if name.endswith("l"):
        file.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in rows), encoding="utf-8")
    else:
        file.write_text(json.dumps(rows))
    return ConversationSource(ConversationData(path=str(file), images=images))


# ---------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava(folder: Path, name: str) -> None:
    source = opened(folder, row(), row(id=7, image="sub/b.png"), name=name)
    assert [source[0].id, source[1].id] == ["s-1", "7"]
    assert source[0].messages == READ
    assert (source[0].images, source[1].images) == (("a.png",), ("sub/b.png",))
    assert list(source.fingerprints()) == ["a.png", "sub/b.png"]
    assert source.image("sub/b.png").getpixel((0, 0)) == (255, 0, 0)
    assert source.size("sub/b.png") == (8, 8)
    assert len(source) == len(list(source)) == 2


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_messages_and_images(folder: Path, name: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    flat = [
        system,
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A dog."},
    ]
    source = opened(
        folder, {"messages": flat, "images": ["a.png"]}, {"messages": [system, *READ], "images": ["a.png"]}, name=name
    )
    assert source[0].messages == source[1].messages
    assert source[0].messages == [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *READ]
    assert [source[0].id, source[1].id] == ["0", "1"]  # without an id, the row's number


def test_several_images_stay_in_order(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image> and <image>\nSame?"}, {"from": "gpt", "value": "No."}]
    more = [{"from": "human", "value": "And this?\n<image>"}, {"from": "gpt", "value": "Yes."}]
    sample = opened(folder, row(image=["a.png", "sub/b.png", "a.png"], conversations=turns + more))[0]
    assert sample.images == ("a.png", "sub/b.png", "a.png")
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text", "image", "text"]
    assert [part["type"] for part in sample.messages[2]["content"]] == ["text", "image"]


def test_images_that_no_turn_mentions_come_first_and_text_alone_is_fine(folder: Path) -> None:
    silent = [{"from": "human", "value": "What is it?"}, ANSWER]
    source = opened(folder, row(conversations=silent), row(image=None, conversations=silent))
    assert source[0].messages == READ
    assert source[1].images == () and source[1].messages[0]["content"] == [{"type": "text", "text": "What is it?"}]


def test_images_may_lie_elsewhere(folder: Path) -> None:
    source = opened(folder, row(image="b.png"), images=str(folder / "sub"))
    assert source.image("b.png").size == (8, 8)


def test_jsonl_lines_end_at_newlines_alone(folder: Path) -> None:
    """U+2028 is a line end for str.splitlines, and an ordinary character in JSON."""
    answer = {"from": "gpt", "value": "A\u2028dog\x85."}
    source = opened(folder, row(conversations=[QUESTION, answer]), name="data.jsonl")
    assert source[0].messages[1]["content"][0]["text"] == "A\u2028dog\x85."


# ---------------------------------------------------------------------------------------- faults

FAULTS: dict[str, tuple[Any, list[str]]] = {
    "speaker": (
        row(conversations=[{"from": "robot", "value": "x"}, ANSWER]),
        ["id s-1", "conversations", "'robot'", "'human'"],
    ),
    "speaker missing": (row(conversations=[{"value": "x"}, ANSWER]), ["id s-1", "None", "'human'"]),
    "speaker not a word": (row(conversations=[{"from": ["human"], "value": "x"}]), ["id s-1", "['human']"]),
    "too few images": (
        row(conversations=[{"from": "human", "value": "<image><image>"}, ANSWER]),
        ["id s-1", "conversations", "2 <image>", "1 images", "a.png"],
    ),
    "too many images": (row(image=["a.png", "a.png"]), ["id s-1", "1 <image>", "2 images"]),
    "no images": (row(image=None), ["id s-1", "1 <image>", "0 images"]),
    "image nobody asks about": (row(conversations=[ANSWER]), ["id s-1", "0 <image>", "1 images"]),
    "image in an answer": (
        row(conversations=[QUESTION, {"from": "gpt", "value": "<image> a dog"}]),
        ["id s-1", "assistant", "<image>"],
    ),
    "answer missing": (
        row(conversations=[QUESTION, {"from": "gpt"}]),
        ["id s-1", "conversations", "assistant", "found None"],
    ),
    "answer empty": (row(conversations=[QUESTION, {"from": "gpt", "value": " \n"}]), ["id s-1", "empty"]),
    "question last": (row(conversations=[QUESTION, ANSWER, QUESTION]), ["id s-1", "last turn", "user"]),
    "no turns": (row(image=None, conversations=[]), ["id s-1", "last turn", "no turns"]),
    "turns not a list": (row(conversations="hello"), ["id s-1", "conversations", "list of turns", "'hello'"]),
    "a turn not a mapping": (row(conversations=["hello"]), ["id s-1", "list of turns", "hello"]),
    "no conversation": (row(conversations=None), ["id s-1", "'conversations'", "'messages'", "['id', 'image']"]),
    "not a mapping": ("hello", ["row 1", "mapping", "str"]),
    "images a number": (row(image=5), ["id s-1", "'image'", "int"]),
    "images of numbers": (row(image=[5]), ["id s-1", "'image'", "int"]),
    "unknown part": (
        row(conversations=None, messages=[{"role": "user", "content": [{"type": "point"}]}]),
        ["id s-1", "messages", "'video' or 'text'", "point"],
    ),
    "text part without text": (
        row(conversations=None, messages=[{"role": "user", "content": [{"type": "text", "text": None}]}]),
        ["id s-1", "messages", "None"],
    ),
    "image missing": (row(image="gone.png"), ["id s-1", "gone.png", "no such file", "1 of 2"]),
    "image above the folder": (row(image="../secret.png"), ["id s-1", "'image'", "'../secret.png'", "inside"]),
    "image above by a detour": (row(image="sub/../../secret.png"), ["id s-1", "'image'", "inside"]),
    "image by absolute path": (row(image="/etc/secret.png"), ["id s-1", "'image'", "'/etc/secret.png'", "inside"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_fault_is_told_with_file_row_id_field_found_and_expected(folder: Path, fault: str, name: str) -> None:
    wrong, words = FAULTS[fault]
    with pytest.raises(ValueError) as caught:
        opened(folder, row(id="good"), wrong, name=name)
    missing = [word for word in [str(folder / name), "row 1", *words] if word not in str(caught.value)]
    assert missing == [], str(caught.value)


def test_a_path_out_of_the_folder_is_refused_also_where_a_image_is(folder: Path) -> None:
    for path in ("../a.png", str(folder / "a.png")):
        with pytest.raises(ValueError, match="inside the image folder"):
            opened(folder, row(image=path), images=str(folder / "sub"))
    assert opened(folder, row(image="sub/../a.png"))[0].images == ("sub/../a.png",)  # a detour that stays inside


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("data.json", b"{", "data.json: not valid JSON"),
        ("data.jsonl", b"\n{", "data.jsonl, line 2: not valid JSON"),
        ("data.json", b'{"id": 1}', "data.json: expected a list of samples, found dict"),
        ("data.json", b"[]", "data.json: no samples"),
        ("data.json", b"[{},]", r"data.json: not valid JSON: .*line 1 column 5 \(char 4\)"),
        ("data.json", b"[{}\n{}]", r"data.json: not valid JSON: Expecting ',' delimiter: line 2 column 1 \(char 4\)"),
        ("data.json", b"[{}", "data.json: not valid JSON: Expecting ',' delimiter"),
        ("data.json", b"[{}] []", "data.json: not valid JSON: Extra data"),
        ("data.jsonl", b"\n", "data.jsonl: no samples"),
        ("data.json", b'["\xff"]', "data.json: .*UTF-8"),
        ("other.json", None, "other.json: there is no such file"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, text: bytes | None, expected: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=expected):
        ConversationSource(ConversationData(path=str(tmp_path / name)))


# ---------------------------------------------------------------------------------------- scenes

SHAPES = SceneData(scenes=5, cutouts="shapes")


def test_scenes_repeat_images_with_other_questions() -> None:
    source = SceneSource(SHAPES, 12, image_size=64)
    assert len(source) == 12 and list(source.fingerprints()) == [0, 1, 2, 3, 4]
    assert [source[i].images for i in (0, 5, 10)] == [(0,)] * 3
    assert any(source[i].messages != source[i + 5].messages for i in range(5))
    assert source.image(3).size == source.size(3) == (64, 64)


# ---------------------------------------------------------------------------------------- files in general


def test_lines_are_read_when_asked_for_and_travel_by_pickle(folder: Path) -> None:
    source = opened(folder, *(row(id=number) for number in range(300)), name="data.jsonl")
    content = pickle.dumps(source)
    assert len(content) < 300 * 24 + 1000  # three numbers for each line
    assert [pickle.loads(content)[i].id for i in (299, 0)] == ["299", "0"]
    (folder / "data.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"data.jsonl, offset \d+: expected \d+ bytes, found 0; is it cut short\?"):
        source[299]


def test_rows_of_a_list_are_read_when_asked_for_and_travel_by_pickle(folder: Path) -> None:
    """Of a list written over many lines too, and with characters of several bytes."""
    rows = [
        row(id=f"ü\u2028😀{number}", conversations=[QUESTION, {"from": "gpt", "value": "],\t[é"}])
        for number in range(300)
    ]
    text = json.dumps(rows, ensure_ascii=False, indent="\t").encode()
    (folder / "data.json").write_bytes(b"\xef\xbb\xbf \r\n" + text + b"\n")
    source = ConversationSource(ConversationData(path=str(folder / "data.json")))
    assert list(source.rows) == rows
    content = pickle.dumps(source)
    assert len(content) < 300 * 24 + 1000  # three numbers for each row
    assert [pickle.loads(content)[i].id for i in (299, 0)] == ["ü\u2028😀299", "ü\u2028😀0"]
    (folder / "data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"data.json, offset \d+: expected \d+ bytes, found 0; is it cut short\?"):
        source[299]


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"kind": "shards", "images": "x"}, "images 'x': images of shards lie in the shards; leave it out"),
        ({"index_folder": "x"}, "index_folder 'x': only shards have indices; leave it out"),
        ({"kind": "tables"}, "Input should be 'json', 'parquet', 'datasets' or 'shards'"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        ConversationData.model_validate({"path": "a"} | values)


# ---------------------------------------------------------------------------------------- tables


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of parquet are kept as Arrow files; not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


MESSAGES = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A dog."}]


def table(folder: Path, kind: str, columns: dict[str, list[Any]], features: Any = None) -> TableSource:
    data = datasets.Dataset.from_dict(columns, features=features)
    path = folder / ("table.parquet" if kind == "parquet" else "table")
    if kind == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)
    return TableSource(ConversationData(kind=kind, path=str(path), images=str(folder)))


KINDS = pytest.mark.parametrize("kind", ["parquet", "datasets"])


@KINDS
@pytest.mark.parametrize("form", ["path", "bytes", "both", "path in a mapping", "PIL"])
@pytest.mark.parametrize("field", ["image", "images"])
def test_images_of_a_table_in_every_form(folder: Path, kind: str, form: str, field: str) -> None:
    content = (folder / "a.png").read_bytes()
    cell: Any = {
        "path": "sub/b.png",
        "bytes": content,
        "both": {"bytes": content, "path": "x/gone.png"},
        "path in a mapping": {"bytes": None, "path": "sub/b.png"},
        "PIL": Image.new("RGB", (8, 8), "red"),
    }[form]
    columns = {"id": [3, 4], "messages": [MESSAGES] * 2, field: [cell if field == "image" else [cell]] * 2}
    source = table(folder, kind, columns)
    assert len(source) == 2 and source[1].id == "4" and source[1].messages == READ
    (key,) = source[1].images
    assert key == ("sub/b.png" if "path" in form else (1, 0))
    assert source.image(key).getpixel((0, 0)) == (255, 0, 0)
    assert source.size(key) == (8, 8)
    assert list(source.fingerprints()) == (["sub/b.png"] if "path" in form else [(0, 0), (1, 0)])


@KINDS
def test_llava_and_text_alone_in_a_table(folder: Path, kind: str) -> None:
    silent = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    source = table(folder, kind, {"conversations": [[QUESTION, ANSWER], silent], "image": ["a.png", None]})
    assert (source[0].messages, source[0].id, source[1].images) == (READ, "0", ())


@KINDS
def test_reading_a_row_decodes_no_image(folder: Path, kind: str) -> None:
    broken = {"bytes": b"no image", "path": None}
    features = {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]}
    features["image"] = datasets.Image()  # which datasets would decode
    source = table(folder, kind, {"messages": [MESSAGES], "image": [broken]}, datasets.Features(features))
    assert source[0].images == ((0, 0),)
    with pytest.raises(ValueError, match=r"table(.parquet)?, row 0, image 0: cannot be read as an image"):
        source.image((0, 0))


@KINDS
def test_faults_of_a_table(folder: Path, kind: str) -> None:
    where = folder / ("table.parquet" if kind == "parquet" else "table")

    def told(columns: dict[str, list[Any]]) -> str:
        with pytest.raises(ValueError) as caught:
            table(folder, kind, columns)[0]
        return str(caught.value)

    assert told({"text": ["x"], "image": ["a.png"]}) == (
        f"{where}: expected a column 'conversations' (LLaVA) or 'messages', found the columns ['text', 'image']"
    )
    assert told({"id": ["s"], "messages": [MESSAGES], "image": ["../a.png"]}) == (
        f"{where}, row 0 (id s), field 'image': expected a path inside the image folder, found '../a.png'"
    )
    assert told({"messages": [MESSAGES], "image": [5]}).endswith(
        "field 'image': expected a path, a data URI or bytes of an image, found int"
    )
    assert told({"messages": [None, MESSAGES], "image": ["a.png"] * 2}).endswith(
        "row 0 (id 0): expected 'conversations' (LLaVA) or 'messages', found the fields ['image']. A row looks like "
        + EXAMPLE
    )
    empty = datasets.Features({"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]})
    with pytest.raises(ValueError, match=f"{where}: cannot be read as {kind}: "):
        table(folder, kind, {"messages": []}, empty)


def test_parquet_of_a_folder_in_order_and_what_is_none(folder: Path) -> None:
    for number in (1, 0):
        data = datasets.Dataset.from_dict({"id": [f"{number}{i}" for i in range(3)], "messages": [MESSAGES] * 3})
        data.to_parquet(folder / "sub" / f"{number}.parquet")
    source = TableSource(ConversationData(kind="parquet", path=str(folder / "sub")))
    assert len(source) == 6 and source.rows["id"].to_pylist() == ["00", "01", "02", "10", "11", "12"]
    (folder / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    for name, words in {"broken.parquet": "cannot be read as parquet: ", "gone": "found no files; expected a "}.items():
        with pytest.raises(ValueError, match=f"{name}: {words}"):
            TableSource(ConversationData(kind="parquet", path=str(folder / name)))


def test_a_folder_that_is_no_dataset_or_has_splits(folder: Path) -> None:
    with pytest.raises(ValueError, match="sub: cannot be read as datasets: "):
        TableSource(ConversationData(kind="datasets", path=str(folder / "sub")))
    part = datasets.Dataset.from_dict({"messages": [MESSAGES]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(folder / "splits")
    with pytest.raises(ValueError, match=r"expected one Dataset, found the splits \['test', 'train'\]; give"):
        TableSource(ConversationData(kind="datasets", path=str(folder / "splits")))


def test_without_the_package_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'parquet' need the package datasets.*pip install 'sparsight\[data\]'"):
        TableSource(ConversationData(kind="parquet", path=str(folder)))


def test_lines_of_windows_and_the_mark_of_its_editors_are_not_learnt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\r\nWhat is it?\r\n"}, {"from": "gpt", "value": "A dog.\r\n"}]
    text = json.dumps([row(conversations=turns)]).encode()
    for name, content in (
        ("a.json", text),
        ("b.json", b"\xef\xbb\xbf" + text),
        ("c.jsonl", b"\xef\xbb\xbf" + text[1:-1]),
    ):
        (tmp_path / name).write_bytes(content)
        assert ConversationSource(ConversationData(path=str(tmp_path / name)))[0].messages == READ


@pytest.mark.parametrize("images", [None, []])
def test_an_empty_column_does_not_hide_the_image(folder: Path, images: Any) -> None:
    """Tables written as JSON have all columns in every row."""
    filled = row() | {"images": images, "messages": None}
    sample = opened(folder, filled, row(image=None) | {"images": images, "conversations": [
        {"from": "human", "value": "Why?"}, ANSWER]})  # fmt: skip
    assert (sample[0].images, sample[0].messages) == (("a.png",), READ)
    assert sample[1].images == ()


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_half_of_a_character_is_told(folder: Path, name: str) -> None:
    """A caption cut in the middle of an emoji is valid JSON, and no tokenizer takes it."""
    cut = row(conversations=[QUESTION, {"from": "gpt", "value": "nice \ud83d"}])
    (folder / name).write_text(json.dumps([cut]) if name == "data.json" else json.dumps(cut))
    with pytest.raises(ValueError, match=r"the assistant's turn holds half of a character, '\\ud83d'"):
        ConversationSource(ConversationData(path=str(folder / name)))[0]


def test_a_row_too_deep_to_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON: maximum recursion depth"):
        ConversationSource(ConversationData(path=str(tmp_path / "a.json")))
