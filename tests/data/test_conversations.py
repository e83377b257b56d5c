"""The forms in which rows come: read, or refused with what was expected."""

from __future__ import annotations

import base64
import gzip
import io
import json
import multiprocessing
import unicodedata
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from sparsight.data.sources import ConversationSource, ShardSource, TableSource
from sparsight.settings.data import ConversationData

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A dog."}
TEXT = {"from": "human", "value": "What is it?"}
SAYS = {"role": "assistant", "content": "A dog."}
READ = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
]
ASK = {"type": "text", "text": "What is it?"}


def _png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


BASE64 = base64.b64encode(_png()).decode()
URI = f"data:image/png;base64,{BASE64}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.png").write_bytes(_png())
    return tmp_path


def opened(folder: Path, *rows: Any) -> ConversationSource:
    (folder / "data.json").write_text(json.dumps(rows))
    return ConversationSource(ConversationData(path=str(folder / "data.json")))


def refused(folder: Path, row: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        opened(folder, {"conversations": [TEXT, ANSWER]}, {"id": "s-1"} | row)
    assert f"{folder / 'data.json'}, row 1 (id s-1)" in str(caught.value)
    return str(caught.value)


def parts(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, SAYS]}


def llava(image: Any) -> dict[str, Any]:
    return {"image": image, "conversations": [QUESTION, ANSWER]}


PATH = "sub/a b.png"
FORMS = {
    "part of Hugging Face": parts({"type": "image", "image": PATH}, ASK),
    "part with a path": parts({"type": "image", "path": PATH}, ASK),
    "part with a url": parts({"type": "image", "url": URI}, ASK),
    "part with base64": parts({"type": "image", "base64": BASE64}, ASK),
    "part of a table": parts(
        {"type": "image", "image": {"bytes": None, "path": PATH}, "text": None}, ASK | {"image": None}
    ),
    "part of OpenAI with a path": parts({"type": "image_url", "image_url": {"url": PATH}}, ASK),
    "part of OpenAI with data": parts({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, ASK),
    "part of OpenAI's responses": parts({"type": "input_image", "image_url": URI}, ASK | {"type": "input_text"}),
    "parts without a type": parts({"image": PATH}, {"text": "What is it?"}),
    "parts and a field that agree": parts({"image": PATH}, ASK) | {"images": [PATH]},
    "backslashes": llava("sub\\a b.png"),
    "percent": llava("sub/a%20b.png"),
    "mapping with a path": llava([{"path": PATH}]),
    "mapping with a url": llava({"url": PATH}),
    "mapping with bytes": llava([{"bytes": BASE64, "path": "gone.png"}]),
    "data": llava(URI),
    "roles in conversations": {
        "image": PATH,
        "conversations": [{"role": "user", "content": "<image>\nWhat is it?"}, SAYS],
    },
    "ms-swift": {"query": "<image>What is it?", "response": "A dog.", "images": [PATH]},
    "Alpaca": {"instruction": "What is it?", "input": "", "output": "A dog.", "image": PATH},
}


@pytest.mark.parametrize("form", FORMS)
def test_F17_forms_that_are_read(folder: Path, form: str) -> None:
    source = opened(folder, FORMS[form])
    assert source[0].messages == READ
    (key,) = source[0].images
    assert source.image(key).getpixel((0, 0)) == (255, 0, 0)
    assert source.size(key) == (8, 8)
    assert list(source.fingerprints()) == [key]


@pytest.mark.parametrize("empty", ["", None, [], [""], [None], {"bytes": None, "path": None}])
@pytest.mark.parametrize("field", ["image", "images"])
def test_F17_an_empty_image_is_a_row_of_text(folder: Path, field: str, empty: Any) -> None:
    assert opened(folder, {field: empty, "conversations": [TEXT, ANSWER]})[0].images == ()


def test_F17_history_and_input_are_read(folder: Path) -> None:
    source = opened(
        folder,
        {"query": "And?", "response": "Two.", "history": [["Hello", "Hi."]], "system": "Be brief."},
        {"instruction": "Translate.", "input": "Hund", "output": "dog"},
    )
    said = [[(m["role"], m["content"][0]["text"]) for m in sample.messages] for sample in source]
    before = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi.")]
    assert said[0] == [*before, ("user", "And?"), ("assistant", "Two.")]
    assert said[1] == [("user", "Translate.\nHund"), ("assistant", "dog")]


@pytest.mark.parametrize("stored, asked", [("NFC", "NFD"), ("NFD", "NFC")])
def test_F17_names_in_another_unicode_form_are_found(folder: Path, stored: str, asked: str) -> None:
    place = folder / unicodedata.normalize(stored, "é")
    place.mkdir()
    (place / unicodedata.normalize(stored, "ü.png")).write_bytes(_png("blue"))
    source = opened(folder, llava(unicodedata.normalize(asked, "é/ü.png")))
    assert source.image(source[0].images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert source.size(source[0].images[0]) == (8, 8)


def test_F17_a_name_that_is_there_as_written_comes_first(folder: Path) -> None:
    for name in ("a%20b.png", "sub\\a b.png"):
        (folder / name).write_bytes(_png("blue"))
        (folder / "a b.png").write_bytes(_png())
        source = opened(folder, llava(name))
        assert source.image(source[0].images[0]).getpixel((0, 0)) == (0, 0, 255)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "url": (llava("https://a.org//b.png?x=1"), ["'https://a.org//b.png?x=1'", "never fetched", "Download", "'image'"]),
    "url in a part": (parts({"type": "image_url", "image_url": {"url": "http://a.org/b.png"}}, ASK), ["never fetched"]),
    "bucket": (llava("s3://a/b.png"), ["'s3://a/b.png'", "never fetched"]),
    "above, with backslashes": (llava("..\\secret.png"), ["inside the image folder"]),
    "above, with percent": (llava("%2e%2e/secret.png"), ["no such file"]),
    "above, all of it with percent": (llava("sub%2f..%2f..%2fsecret.png"), ["no such file"]),
    "a drive": (llava("C:\\images\\a.png"), ["inside the image folder", "C:\\images\\a.png"]),
    "a file's url": (llava("file:///etc/a.png"), ["inside the image folder"]),
    "a long name": (llava("x" * 300), ["no such file", "1 of 1"]),
    "data that is none": (llava("data:image/png;base64,@@"), ["base64"]),
    "data of another kind": (llava("data:image/png,abc"), ["base64"]),
    "mapping of something else": (llava([{"file": "a.png"}]), ["'file'", "{'path': 'images/a.png'}"]),
    "number": ({"conversations": [TEXT, {"from": "gpt", "value": 3}]}, ["found 3", 'as text, "3"']),
    "number in a part": (parts({"text": 3}), ["found 3", 'as text, "3"']),
    "number in a flat row": ({"query": "?", "response": 3}, ["'response'", "found 3", 'as text, "3"']),
    "flat without an answer": ({"query": "What?"}, ["'conversations'", "found the fields ['id', 'query']"]),
    "own form": ({"question": "What?", "answer": "A"}, ["'question'", '"from": "human"']),
    "history": ({"query": "?", "response": "A", "history": ["x"]}, ["'history'", "[question, answer]", "'x'"]),
    "one part with, one without": (parts({"image": PATH}, {"type": "image"}, ASK), ["2 <image>", "1"]),
    "parts and a field that disagree": (parts({"image": PATH}, ASK) | {"images": ["a.png"]}, ["'images'", "a.png"]),
    "two in one part": (parts({"image": PATH, "text": "What?"}), ["'video' or 'text'"]),
    "kind that is no word": (parts({"type": ["image"]}), ["'video' or 'text'"]),
    "tools": ({"tools": '[{"name": "f"}]', "conversations": [TEXT, ANSWER]}, ["'tools'", "not trained on"]),
    "two systems": (
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be long."}, TEXT, ANSWER]},
        ["'system'", "Be brief.", "system turn"],
    ),
    "system not text": ({"system": ["x"], "conversations": [TEXT, ANSWER]}, ["system", "'x'"]),
}
REFUSED |= {
    "audio": ({"audio": "a.mp3", "conversations": [TEXT, ANSWER]}, ["'audio'", "not trained on"]),
    "audios": ({"audios": ["a.mp3"], "conversations": [TEXT, ANSWER]}, ["'audios'", "not trained on"]),
    "<audio>": (
        {"conversations": [{"from": "human", "value": "<audio>\nWhat?"}, ANSWER]},
        ["<audio>", "not trained on"],
    ),
    "audio part": (parts({"type": "audio_url", "audio_url": "a"}, ASK), ["audio", "not trained on"]),
    "audio part without a type": (parts({"audio": "a"}, ASK), ["audio", "not trained on"]),
    "no video": ({"conversations": [{"from": "human", "value": "<video>\nWhat?"}, ANSWER]}, ["1 <video>", "0 videos"]),
    "no video in a part": (parts({"type": "video"}, ASK), ["1 <video>", "0 videos"]),
    "two videos in one list": (
        {"videos": ["a.mp4", "b.mp4"], "conversations": [{"from": "human", "value": "<video>\nWhat?"}, ANSWER]},
        ["1 <video>", "2 videos"],
    ),
    "a frame that is none": ({"video": ["a.png", ""], "conversations": [TEXT, ANSWER]}, ["'video'", "its frames"]),
    "video on the web": (parts({"type": "video", "video": "https://x/a.mp4"}, ASK), ["is a URL", "x/a.mp4"]),
    "video outside": ({"video": "../a.mp4", "conversations": [TEXT, ANSWER]}, ["inside", "../a.mp4"]),
    "image and video in one part": (parts({"type": "image", "image": PATH, "video": "a.mp4"}), ["'video' or 'text'"]),
}


@pytest.mark.parametrize("form", REFUSED)
def test_F17_F31_forms_that_are_refused_say_what_is_expected(folder: Path, form: str) -> None:
    (folder.parent / "secret.png").write_bytes(_png())
    row, words = REFUSED[form]
    said = refused(folder, row)
    assert [word for word in words if word not in said] == [], said
    assert len(said) < 1000


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json.gz"])
def test_F17_gzip_is_read_also_in_other_processes(folder: Path, name: str) -> None:
    rows = [llava(PATH) | {"id": f"ü{number}"} for number in range(50)]
    text = json.dumps(rows) if name == "data.json.gz" else "\n".join(json.dumps(row) for row in rows)
    (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0))
    source = ConversationSource(ConversationData(path=str(folder / name)))
    assert source[49].messages == READ and len(source) == 50
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert [sample.id for sample in pool.map(source.__getitem__, (49, 0))] == ["ü49", "ü0"]
    assert sorted(file.name for file in folder.iterdir()) == sorted([name, "sub"])  # nothing is left beside it


@pytest.mark.parametrize("content", [b"[]", gzip.compress(b"[" + b" " * 1000, mtime=0)[:-10], b""])
def test_F17_gzip_that_is_none_is_told(folder: Path, content: bytes) -> None:
    (folder / "a.json.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json\.gz: "):
        ConversationSource(ConversationData(path=str(folder / "a.json.gz")))


def test_F17_parts_with_images_in_tables_and_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tarfile

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    content = [
        {"type": "image", "image": {"bytes": _png("blue"), "path": None}, "text": None},
        {"type": "text", "image": None, "text": "What is it?"},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [
        {"type": "text", "image": None, "text": "A dog."}]}]  # fmt: skip
    datasets.Dataset.from_dict({"messages": [turns], "system": ["Be brief."]}).to_parquet(folder / "a.parquet")
    table = TableSource(ConversationData(kind="parquet", path=str(folder / "a.parquet")))
    assert table[0].messages[1:] == READ and table[0].messages[0]["role"] == "system"
    assert table.image(table[0].images[0]).getpixel((0, 0)) == (0, 0, 255)

    with tarfile.open(folder / "a.tar", "w") as tar:
        row = json.dumps(parts({"image": "k.1.png"}, ASK)).encode()
        for name, data in (("k.json", row), ("k.0.png", _png()), ("k.1.png", _png("blue"))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shards = ShardSource(ConversationData(kind="shards", path=str(folder / "a.tar")))
    assert shards[0].messages == READ and len(shards[0].images) == 1
    assert shards.image(shards[0].images[0]).getpixel((0, 0)) == (0, 0, 255)


def test_F31_a_system_prompt_beside_the_turns_is_read(folder: Path) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    source = opened(
        folder,
        {"system": "Be brief.", "conversations": [TEXT, ANSWER]},
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, TEXT, ANSWER]},
        {"system": "", "tools": "[]", "video": "", "conversations": [TEXT, ANSWER]},
    )
    assert [sample.messages[0] == system for sample in source] == [True, True, False]
    assert [len(sample.messages) for sample in source] == [3, 3, 2]


def test_F31_tags_of_html_are_words(folder: Path) -> None:
    code = "Why does <video><source src='a'></video> not play?"
    turns = [{"from": "human", "value": code}, {"from": "gpt", "value": "<video> needs controls."}]
    assert opened(folder, {"conversations": turns})[0].messages[0]["content"][0]["text"] == code


def test_F31_fields_that_are_not_used_are_named_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"id": 1, "source": "web", "dataset": "x", "conversations": [TEXT, ANSWER]}
    rows = [good | {"bbox": [1]}, good | {"bbox": [2], "hint": "h", "output": "x"}, good | {"hint": None}]
    with pytest.warns(UserWarning, match="not use") as told:
        opened(folder, *rows)
    assert [str(each.message) for each in told] == [
        f"{folder / 'data.json'}: fields of rows that training does not use: 'bbox' (2 of 3 rows), "
        "'hint' (1 of 3 rows), 'output' (1 of 3 rows)"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(folder, good)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    datasets.Dataset.from_dict({"conversations": [[TEXT, ANSWER]], "bbox": [1], "source": ["x"]}).to_parquet(
        folder / "a.parquet"
    )
    with pytest.warns(UserWarning, match=r"a.parquet: fields .* not use: 'bbox' \(1 of 1 rows\)$"):
        table = TableSource(ConversationData(kind="parquet", path=str(folder / "a.parquet")))
    assert table[0].unused == ("bbox",)


def test_F31_data_check_counts_fields_that_are_not_used(folder: Path, tiny_vlm: Any) -> None:
    from sparsight.data.check import check_rows
    from sparsight.data.collate import TrainingSet

    rows = [llava(PATH) | {"bbox": [1]}, llava(PATH), {"conversations": [TEXT], "hint": "x"}]
    (folder / "data.json").write_text(json.dumps(rows))
    source = ConversationSource(ConversationData(path=str(folder / "data.json")), strict=False)
    found = check_rows(TrainingSet(source, tiny_vlm()[1], len(source)))
    assert found.record(None)["unused_fields"] == {"bbox": 1}
    assert [len(found.rows), len(found.bad), "unused" in found.rows[0]] == [2, 1, False]


@pytest.mark.parametrize("row", [{"instruction": 7, "input": "x"}, {"instruction": "Add.", "input": 7}])
def test_an_instruction_that_is_no_text_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "data.json").write_text(json.dumps([row | {"output": "8"}]))
    with pytest.raises(ValueError, match="expected (a )?text.*found 7"):
        ConversationSource(ConversationData(path=str(tmp_path / "data.json")))[0]
