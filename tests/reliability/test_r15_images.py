"""R15: bad images. Each is refused with file and reason, told beforehand, and costs a run no more than itself."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from small_runs import Crash, quiet, recipe_values, save_encoder, stage_values
from sparsight import cli
from sparsight.data import images
from sparsight.data.collate import TrainingSet
from sparsight.data.images import load_image
from sparsight.pipeline import check_data, run
from sparsight.reporting import read_run
from sparsight.settings.recipe import Recipe
from sparsight.training.quarantine import Quarantine
from tiny import make_image

UNREADABLE = "cannot be read as an image"
UNKNOWN = f"{UNREADABLE}: empty, or in no format that is known"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves() -> Image.Image:
    """40 x 20: red beside blue."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (20, 0, 40, 20))
    return image


def corpus() -> dict[str, bytes]:
    """The files of R15 by name, all but those that are not there."""
    turned, red, blue = Image.Exif(), Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue")
    turned[0x0112] = 6
    grey = Image.fromarray(np.full((20, 40), 257 * 100, np.uint16))
    return {
        "good.jpg": encoded(halves(), "JPEG"),
        "cmyk.jpg": encoded(halves().convert("CMYK"), "JPEG"),
        "palette.png": encoded(halves().quantize(4), transparency=1),
        "sixteen.png": encoded(grey),
        "animated.gif": encoded(red, "GIF", save_all=True, append_images=[blue]),
        "turned.jpg": encoded(halves(), "JPEG", exif=turned),
        "one.png": encoded(Image.new("RGB", (1, 1), "red")),
        "wrong.jpg": encoded(halves(), "PNG"),
        "cut.jpg": encoded(make_image(0, 64), "JPEG")[:700],
        "empty.jpg": b"",
        "bomb.png": bomb(13_000),
        "huge.png": bomb(20_000),
    }


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header says ``side`` x ``side`` pixels."""
    from struct import pack
    from zlib import compress, crc32

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", crc32(kind + data))

    header = pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compress(b"\0")) + chunk(b"IEND", b"")


# What is wrong with each bad one, from the file's name on.
BAD = {
    "cut.jpg": f"cut.jpg: {UNREADABLE}: image file is truncated (",
    "empty.jpg": f"empty.jpg: {UNKNOWN}",
    "bomb.png": f"bomb.png: {UNREADABLE}: 13000 x 13000 pixels, more than 150,000,000; make it smaller",
    "huge.png": f"huge.png: {UNREADABLE}: Image size (400000000 pixels) exceeds limit of (",  # Pillow's own
    "gone.png": "gone.png: there is no such file",
}
GOOD = [name for name in corpus() if name not in BAD]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def write(tmp_path: Path, encoder: Path) -> Callable[..., Recipe]:
    """`write(files, **recipe keys)`: the files, a data set with a row for each and for ``more``, and its recipe."""

    def make(files: dict[str, bytes], more: tuple[dict[str, Any], ...] = (), **changes: Any) -> Recipe:
        folder = tmp_path / "images"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        rows = [row(name) for name in files] + list(more)
        (tmp_path / "data.json").write_text(json.dumps(rows))
        data = {"kind": "json", "path": str(tmp_path / "data.json"), "images": str(folder)}
        stages = [stage_values(samples=len(rows))]
        values = {"data": data, "stages": stages, "evaluation": {"kind": "none"}, "on_bad_sample": "quarantine"}
        values = recipe_values(encoder, **(values | changes))
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return Recipe.model_validate(values)

    return make


def row(name: str, answer: str = "It is red.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return {"id": name.split(".")[0], "image": name, "conversations": turns}


def quarantined(out: Path) -> dict[tuple[int, str], str]:
    lines = (out / "quarantine.jsonl").read_text().splitlines() if (out / "quarantine.jsonl").exists() else []
    entries = [json.loads(line) for line in lines]
    found = {(entry["row"], entry["id"]): entry["reason"] for entry in entries}
    assert len(found) == len(entries), "a bad sample was written twice"
    return found


def listed(record: dict[str, Any]) -> dict[tuple[int, str], str]:
    return {(entry["row"], entry["id"]): entry["reason"] for entry in record["bad"]}


# ---------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("as_bytes", [False, True], ids=["file", "bytes"])
@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_each_of_the_corpus_is_read_or_refused_with_the_reason(tmp_path: Path, name: str, as_bytes: bool) -> None:
    data = corpus().get(name)
    if data is None and as_bytes:
        pytest.skip("a file that is not there has no bytes")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    arguments = (data, name) if as_bytes else (tmp_path / name,)
    if name in GOOD:
        read = load_image(*arguments)
        assert read.mode == "RGB" and read.size == {"one.png": (1, 1), "turned.jpg": (20, 40)}.get(name, (40, 20))
        first = read.getpixel((0, 0))
        expected = (100, 100, 100) if name == "sixteen.png" else (255, 0, 0)
        assert np.abs(np.array(first) - expected).max() <= 8
    else:
        with pytest.raises(ValueError) as caught:
            load_image(*arguments)
        said = str(caught.value).removeprefix(f"{tmp_path}/")
        assert said.startswith(BAD[name][:-1]) if BAD[name].endswith("(") else said == BAD[name]


@pytest.mark.parametrize("off", [False, True], ids=["Pillow's limit on", "Pillow's limit off"])
def test_the_limit_is_our_own_and_without_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, off: bool
) -> None:
    if off:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 799)
    with pytest.raises(ValueError, match=r"^a\.png: cannot be read as an image: 40 x 20 pixels, more than 799"):
        load_image(encoded(halves()), "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 800)
    if not off:  # Pillow would warn
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    assert load_image(encoded(halves())).size == (40, 20)
    assert len(recwarn) == 0


def test_an_opened_image_is_treated_like_its_file(tmp_path: Path) -> None:
    for name in GOOD:
        (tmp_path / name).write_bytes(corpus()[name])
        with Image.open(tmp_path / name) as opened:
            assert np.array_equal(load_image(opened), load_image(tmp_path / name))
    with pytest.raises(ValueError, match="^here: cannot be read as an image: 32-bit"):
        load_image(Image.new("F", (4, 4)), "here")


def test_links_in_the_folder_of_images_are_followed(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    """They are the user's own; a path comes from whoever wrote the data (tests/data/test_sources.py)."""
    recipe = write({}, (row("link.png"),), stages=[stage_values(samples=4)], on_bad_sample="error")
    (tmp_path / "far.png").write_bytes(encoded(halves()))
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "far.png")
    assert check_data(recipe, tmp_path / "check", 0, quiet())["bad"] == []


# ---------------------------------------------------------------------------------------- the same set everywhere

ROWS = (
    row("gone.png"),
    row("good.jpg", answer=""),
    row("good.jpg") | {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]},
    row("good.jpg") | {"image": ["good.jpg", "good.jpg"]},
    row("../good.jpg"),
    "no row",
)


def test_a_check_and_a_run_find_each_bad_sample_of_the_corpus_once(
    tmp_path: Path, write: Callable[..., Recipe]
) -> None:
    stages = [stage_values(samples=2 * len([*corpus(), *ROWS])), stage_values("again", samples=4)]
    recipe = write(corpus(), ROWS, max_bad=1, stages=stages)
    found = listed(check_data(recipe, tmp_path / "check", 2, quiet()))
    places = {name: place for place, name in enumerate(corpus())}
    rows = [places[name] for name in BAD if name in places] + list(range(len(places), len(places) + len(ROWS)))
    assert sorted(place for place, _ in found) == sorted(rows)
    for place, reason in found.items():
        assert place[0] >= len(places) or BAD[list(corpus())[place[0]]].rstrip("(") in reason
    wrong = list(found.values())[-5:]
    for reason, words in zip(
        wrong, ("empty", "last turn", "1 <image>, but", "inside the image", "mapping"), strict=True
    ):
        assert words in reason
    run(recipe, tmp_path / "run", quiet())
    assert quarantined(tmp_path / "run") == found
    logged = read_run(tmp_path / "run")
    assert logged.problems == []
    assert sum(step["replaced"] for step in logged.stages[0].steps) >= 2 * len(found)
    assert all(step["samples"] == 4 for stage in logged.stages for step in stage.steps[:-1])


def damaged(number: int) -> bytes:
    """A good file, cut, with flipped bytes, or with a stretch of zeros."""
    rng = np.random.default_rng(number)
    kind = ["JPEG", "PNG", "GIF", "WEBP"][number % 4]
    data = bytearray(encoded(make_image(number, 24), kind))
    at, length = (int(value) for value in rng.integers(0, len(data), 2))
    match rng.integers(3):
        case 0:
            del data[at:]
        case 1:
            for place in rng.integers(0, len(data), 1 + length % 8):
                data[place] ^= 1 + int(rng.integers(255))
        case _:
            data[at : at + length % 64] = bytes(len(data[at : at + length % 64]))
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_200_damaged_files(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    """No crash, and the same ones bad in the check and in the run. Measured: 121 of 200."""
    files = {f"{number}.img": damaged(number) for number in range(200)}
    recipe = write(files, max_bad=1, workers=2, stages=[stage_values(samples=200, batch_size=20, checkpoints=0)])
    record = check_data(recipe, tmp_path / "check", 2, quiet())
    assert record["samples"] == 200 and 20 < len(record["bad"]) < 180
    run(recipe, tmp_path / "run", quiet())
    assert quarantined(tmp_path / "run") == listed(record)
    assert sum(step["samples"] for step in read_run(tmp_path / "run").stages[0].steps) == 200


# ---------------------------------------------------------------------------------------- quarantine


def test_the_default_is_an_error_before_training_or_at_the_image(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    files = {"good.jpg": corpus()["good.jpg"], "empty.jpg": b""}
    recipe = write(files, on_bad_sample="error", workers=1)
    with pytest.raises(ValueError, match=rf"sample 'empty': .*empty\.jpg: {UNREADABLE}"):
        run(recipe, tmp_path / "run", quiet())
    (tmp_path / "data.json").write_text(json.dumps([row("good.jpg"), row("gone.png")]))
    with pytest.raises(ValueError, match="row 1 .*gone.png: there is no such file"):
        run(recipe, tmp_path / "other", quiet())
    assert not list(tmp_path.glob("*/quarantine.jsonl"))


def few_bad(bad: int, good: int) -> dict[str, bytes]:
    return {f"{n}.png": encoded(make_image(n, 16)) if n >= bad else b"x" for n in range(bad + good)}


def test_too_many_bad_samples_stop_the_run(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    recipe = write(few_bad(8, 8), max_bad=0.25)
    with pytest.raises(
        ValueError, match=r"(\d) of \d+ samples seen are bad, and max_bad is 0\.25; the last one: id "
    ) as e:
        run(recipe, tmp_path / "run", quiet())
    assert len(quarantined(tmp_path / "run")) == int(str(e.value).split(" of ")[0][-1]) > 5
    assert f"{tmp_path / 'run' / 'quarantine.jsonl'}" in str(e.value)


def test_where_all_are_bad_the_first_says_why(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match=f"{UNKNOWN}. 49 others, drawn in its place, are bad too"):
        run(write(few_bad(8, 0)), tmp_path / "run", quiet())


def test_what_stands_in_is_a_function_of_seed_and_place(tmp_path: Path, write: Callable[..., Recipe], tiny_vlm) -> None:
    from sparsight.data.sources import open_source

    recipe = write(few_bad(6, 10))
    source = open_source(recipe.data, 16, 64, strict=False)
    first, again, other = (TrainingSet(source, tiny_vlm()[1], 32, replace_bad=True, seed=seed) for seed in (0, 0, 1))
    items = [[data[index] for index in order] for data, order in ((first, range(32)), (again, range(31, -1, -1)))]
    assert [item["id"] for item in items[0]] == [item["id"] for item in items[1]][::-1]
    assert [item["id"] for item in items[0]] != [other[index]["id"] for index in range(32)]
    assert items[0][0]["id"] != items[0][16]["id"] or items[0][1]["id"] != items[0][17]["id"]
    for item, place in zip(items[0], range(32), strict=True):
        assert ("replaced" in item) == (place % 16 < 6)
        assert place % 16 >= 6 or item["replaced"][0]["row"] == place % 16
        assert int(item["id"]) >= 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_writes_and_computes_the_same(
    tmp_path: Path, write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    stages = [stage_values(samples=32, checkpoints=4)]
    recipe = write(few_bad(5, 11), max_bad=1, stages=stages, workers=workers)
    run(recipe, tmp_path / "whole", quiet())
    from sparsight.training import quarantine

    real = quarantine.Quarantine.add

    def dies(self: Any, entries: Any, step: int, samples: int) -> None:
        real(self, entries, step, samples)
        if step == 5:
            with self.file.open("a") as lines:
                lines.write('{"row": 1')
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(quarantine.Quarantine, "add", dies)
        with pytest.raises(Crash):
            run(recipe, tmp_path / "cut", quiet())
    run(recipe, tmp_path / "cut", quiet(), resume=True)
    texts = [(tmp_path / name / "quarantine.jsonl").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1] and len(quarantined(tmp_path / "whole")) == 5
    steps = [read_run(tmp_path / name).stages[0].steps for name in ("whole", "cut")]
    for key in ("loss", "replaced", "samples"):
        assert [step[key] for step in steps[0]] == [step[key] for step in steps[1]]


def test_a_run_that_a_bad_image_stopped_goes_on_without_it(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    files = {f"{n}.png": encoded(make_image(n, 16)) if n != 7 else b"x" for n in range(32)}
    strict = write(files, on_bad_sample="error", stages=[stage_values(samples=32, checkpoints=8)])
    lenient = strict.model_copy(update={"on_bad_sample": "quarantine", "max_bad": 1.0, "workers": 1})
    run(lenient, tmp_path / "whole", quiet())
    with pytest.raises(
        ValueError, match=r"7\.png: .*set on_bad_sample=quarantine; a run that has begun goes on with --res"
    ):
        run(strict, tmp_path / "stopped", quiet())
    assert len(read_run(tmp_path / "stopped").stages[0].steps) > 1
    run(lenient, tmp_path / "stopped", quiet(), resume=True)
    steps = [read_run(tmp_path / name).stages[0].steps for name in ("whole", "stopped")]
    assert len(steps[0]) == 8 and [step["loss"] for step in steps[0]] == [step["loss"] for step in steps[1]]


def test_a_mistake_in_the_code_is_no_bad_sample(
    tmp_path: Path, write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(few_bad(0, 4))
    monkeypatch.setattr(TrainingSet, "_text", lambda self, sample: sample.nothing)
    for call in (lambda: run(recipe, tmp_path / "r", quiet()), lambda: check_data(recipe, tmp_path / "c", 0, quiet())):
        with pytest.raises(AttributeError):
            call()


def test_quarantine_does_not_go_with_cached_features(encoder: Path) -> None:
    values = recipe_values(encoder, on_bad_sample="quarantine", stages=[stage_values(cache_features=True)])
    with pytest.raises(ValueError, match=r"quarantine.*\['pretrain'\] cache"):
        Recipe.model_validate(values)


# ---------------------------------------------------------------------------------------- the check


def test_the_check_on_the_command_line(
    tmp_path: Path, write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>alert(15)</script>"
    files = {"0.png": encoded(make_image(0, 16)), "1.png": b"x"}
    recipe = write(files, (row("0.png", evil), row(f"{evil}.png"), row("0.png", "long " * 600)))

    def check(*more: str) -> Any:
        arguments = ["sparsight", "data", "check", str(tmp_path / "recipe.yaml"), *more, "--out", str(tmp_path / "c")]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, capsys.readouterr().out

    code, text = check("--workers", "0")
    record = json.loads((tmp_path / "c" / "check.json").read_text())
    assert code == 1 and "bad samples" in text and "empty, or in no format" in text.replace("\n", " ")
    assert sorted(listed(record)) == [(1, "1"), (3, evil)]
    assert [entry["row"] for entry in record["too_long"]] == [4] and record["context"] == 512
    assert record["visual_tokens_per_image"] == 8 and record["images"] == 3 and record["visual_tokens"] == 24
    assert record["lengths"]["longest"] == record["too_long"][0]["text_tokens"] + 8
    assert sum(record["lengths"]["histogram"]["counts"]) == 3
    page = (tmp_path / "c" / "index.html").read_text()
    assert evil not in page and "&lt;script&gt;alert(15)" in page
    assert page.count("<img alt=") == 3
    assert 'src="http' not in page and recipe.name in page
    (tmp_path / "data.json").write_text(json.dumps([row("0.png")]))
    assert check()[0] == 0


def test_the_check_counts_what_training_sees(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    files = {f"{n}.png": encoded(make_image(n, 16)) for n in range(8)}
    recipe = write(files, (row("0.png", "A longer answer than that."),), stages=[stage_values(samples=9, batch_size=9)])
    record = check_data(recipe, tmp_path / "check", 0, quiet())
    run(recipe, tmp_path / "run", quiet())
    step = read_run(tmp_path / "run").stages[0].steps[0]
    assert (step["text_tokens"], step["visual_tokens"]) == (record["text_tokens"], record["visual_tokens"])
    assert record["bad"] == [] and record["lengths"]["longest_id"] == "0"


def test_bad_samples_of_other_data_do_not_count(tmp_path: Path) -> None:
    """What one file has too many of is no fault of the next, and rows of the same number are others there."""

    def of(stage, *same):
        return Quarantine(tmp_path / "quarantine.jsonl", 0.01, stage, same, 10_000)

    quarantine = of("a", "a", "c")
    bad = [{"row": row, "id": str(row), "reason": "cut", "dropped": False} for row in range(50)]
    quarantine.begin(0, 0)
    quarantine.add(bad, 1, 9_000)
    quarantine = of("b", "b")
    quarantine.begin(0, 0)
    quarantine.add(bad[7:8], 1, 32)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["row"]) for line in lines[-2:]] == [("a", 49), ("b", 7)] and len(lines) == 51
    quarantine = of("c", "a", "c")
    quarantine.begin(0, 9_000)  # the first data again: known ones are not written twice
    quarantine.add(bad[:1], 1, 32)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 51
    with pytest.raises(ValueError, match="stage 'c', step 2: 101 of "):
        quarantine.add([entry | {"row": 100 + entry["row"]} for entry in [*bad, bad[0] | {"row": 50}]], 2, 32)


def test_a_check_names_the_data_that_it_looked_at(tmp_path: Path, write: Callable[..., Recipe]) -> None:
    recipe = write(few_bad(0, 3))
    own = recipe.data.model_copy(update={"path": str(shutil.copy(recipe.data.path, tmp_path / "own.json"))})
    stages = [recipe.stages[0].model_copy(update={"name": "first"}), recipe.stages[0].model_copy(update={"data": own})]
    recipe = recipe.model_copy(update={"stages": tuple(stages)})
    assert check_data(recipe, tmp_path / "check", 0, quiet(), stages[1].name)["data"] == own.path
    with pytest.raises(ValueError, match=f"--stage nope: no such stage; expected one of first, {stages[1].name}"):
        check_data(recipe, tmp_path / "check", 0, quiet(), "nope")
    with pytest.raises(ValueError, match=r"stages have data of their own: name one of them, --stage first\|"):
        check_data(recipe, tmp_path / "check", 0, quiet())
