"""Conversations from files: what is read, and what is said about each fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sparsight.config import ConversationData, SceneData
from sparsight.data.sources import ConversationSource, SceneSource, open_source

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
    assert source.keys() == ["a.png", "sub/b.png"]
    assert source.picture("sub/b.png").getpixel((0, 0)) == (255, 0, 0)
    assert len(source) == 2 and source[2] == source[0]


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


def test_pictures_may_lie_elsewhere(folder: Path) -> None:
    source = opened(folder, row(image="b.png"), images=str(folder / "sub"))
    assert source.picture("b.png").size == (8, 8)


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
        ["id s-1", "answer", "<image>"],
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
    "images a number": (row(image=5), ["id s-1", "images", "int"]),
    "images of numbers": (row(image=[5]), ["id s-1", "images", "int"]),
    "unknown part": (
        row(conversations=None, messages=[{"role": "user", "content": [{"type": "video"}]}]),
        ["id s-1", "messages", "'image' or 'text'", "video"],
    ),
    "text part without text": (
        row(conversations=None, messages=[{"role": "user", "content": [{"type": "text", "text": None}]}]),
        ["id s-1", "messages", "None"],
    ),
    "picture missing": (row(image="gone.png"), ["id s-1", "images", "gone.png", "no such file", "1 of 2"]),
    "picture above the folder": (row(image="../secret.png"), ["id s-1", "images", "'../secret.png'", "inside"]),
    "picture above by a detour": (row(image="sub/../../secret.png"), ["id s-1", "images", "inside"]),
    "picture by absolute path": (row(image="/etc/secret.png"), ["id s-1", "images", "'/etc/secret.png'", "inside"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_fault_is_told_with_file_row_id_field_found_and_expected(folder: Path, fault: str, name: str) -> None:
    wrong, words = FAULTS[fault]
    with pytest.raises(ValueError) as caught:
        opened(folder, row(id="good"), wrong, name=name)
    missing = [word for word in [str(folder / name), "row 1", *words] if word not in str(caught.value)]
    assert missing == [], str(caught.value)


def test_a_path_out_of_the_folder_is_refused_also_where_a_picture_is(folder: Path) -> None:
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


def test_scenes_repeat_pictures_with_other_questions() -> None:
    source = SceneSource(SHAPES, 12, image_size=64)
    assert len(source) == 12 and list(source.keys()) == [0, 1, 2, 3, 4]
    assert [source[i].images for i in (0, 5, 10)] == [(0,)] * 3
    assert any(source[i].messages != source[i + 5].messages for i in range(5))
    assert source.picture(3).size == (64, 64)


def test_a_later_stage_goes_on_behind_the_earlier_ones() -> None:
    whole = open_source(SHAPES, 12, 64)
    second = open_source(SHAPES, 5, 64, offset=7)
    assert [second[i] for i in range(5)] == [whole[i] for i in range(7, 12)]
