"""One checkpoint, many layouts: each is the scaled checkpoint, at its own cost, and the model on disk stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.test_any_model import conversations
from small_runs import quiet
from sparsight.errors import UserError
from sparsight.modeling.scaling import scale_checkpoint
from sparsight.pipeline import evaluate_checkpoint, ways
from sparsight.pipeline.ways import Way, ways_of
from sparsight.schedules import kept_tokens
from sparsight.settings.recipe import HeldOut, held_out_file
from tiny import make_vlm

LAYOUTS = {"1:4,2:1": 8, "1:4": 4, "1:4,2:1,4:1": 24}  # the model's own, a coarser and a finer one
ITEMS = 3
HELD, LENGTH = 2 * 2 * 32 * 4, 8  # bytes that a token has in the cache (2 layers, fp32); tokens of the median text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "model"
    model, processor = make_vlm()
    model.lm_head.weight.data.mul_(40)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vlm() -> Any:
    return make_vlm()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    held_out = held_out_file(conversations(tmp_path_factory.mktemp("data")), None, "exact_match", ITEMS)
    assert held_out is not None
    return held_out


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def short_clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "ROUNDS", 1)
        patch.setattr(ways, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def curve(folder: Path, asked: HeldOut, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out, before = tmp_path_factory.mktemp("out"), files(folder)
    results = evaluate_checkpoint(
        folder, ITEMS, "test", quiet(), asked, layouts=";".join(LAYOUTS), keep="1,0.5", out=out
    )
    assert files(folder) == before
    page = (out / "curve.html").read_text()
    assert "1:4,2:1,4:1" in page and 'src="http' not in page
    return json.loads((out / "curve.json").read_text()) | {"results": results, "out": out}


def test_each_layout_is_the_scaled_checkpoint(
    folder: Path, asked: HeldOut, curve: dict[str, Any], tmp_path: Path
) -> None:
    said = []
    for index, layout in enumerate(LAYOUTS):
        scale_checkpoint(folder, tmp_path / str(index), layout)
        (scaled,) = evaluate_checkpoint(tmp_path / str(index), ITEMS, "test", quiet(), asked)
        found = curve["results"][2 * index]
        assert found.answers == scaled.answers and found.shuffled_points == scaled.shuffled_points
        assert found.answers != curve["results"][2 * index + 1].answers  # half of the tokens say something else
        said.append(tuple(text for _, text in found.answers))
    assert len(set(said)) == len(LAYOUTS)


def test_tokens_and_bytes_are_those_that_are_left(curve: dict[str, Any]) -> None:
    points = curve["points"]
    assert [(point["layout"], point["keep"]) for point in points] == [(own, k) for own in LAYOUTS for k in (1, 0.5)]
    assert [point["visual_tokens"] for point in points] == [
        kept_tokens(n, k) for n in LAYOUTS.values() for k in (1, 0.5)
    ]
    text = {point["cache_bytes"] / HELD - point["visual_tokens"] for point in points}
    assert text == {LENGTH}  # the rest of the prompt
    assert all(point[f"{part}_seconds"] > 0 for point in points for part in ("encode", "prefill"))
    flops = [point["flops"] for point in sorted(points, key=lambda point: (point["keep"], point["visual_tokens"]))]
    assert flops[:3] == sorted(flops[:3]) and flops[3:] == sorted(flops[3:])


def test_the_first_way_is_what_the_others_are_told_from(curve: dict[str, Any]) -> None:
    first, *rest = curve["points"]
    assert "difference" not in first
    for point in rest:
        low, high = point["difference_interval"]
        assert point["difference"] == pytest.approx(point["score"] - first["score"]) and low <= high
        assert 0 < point["p_value"] <= 1
    assert all(point["interval"][0] <= point["score"] <= point["interval"][1] for point in curve["points"])


def test_a_curve_goes_on_from_its_answers(
    folder: Path, asked: HeldOut, curve: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked again, but for what is timed; other questions are."""
    count: list[int] = []
    from sparsight.evaluation import ask as evaluation

    real = evaluation.answer

    def counted(*rest: Any, **options: Any) -> Any:
        count.append(len(rest[2]))
        return real(*rest, **options)

    monkeypatch.setattr(evaluation, "answer", counted)
    again = evaluate_checkpoint(folder, ITEMS, "test", quiet(), asked, layouts="1:4", keep="0.5", out=curve["out"])
    assert count == [] and again[0].answers == curve["results"][3].answers
    fewer = asked.model_copy(update={"items": ITEMS - 1})
    evaluate_checkpoint(folder, ITEMS, "test", quiet(), fewer, layouts="1:4", out=curve["out"])
    assert sum(count) == 2 * (ITEMS - 1)


@pytest.mark.parametrize(
    "layouts, keep, method, said",
    [
        ("1:4;1:4,2:2", None, "uniform", "1:4,2:2: .*: scale 2:2 .* has no source .* with 2 queries per window"),
        ("1:4,16:1", None, "uniform", "a grid of 16 windows per side needs at least 16 patches per side"),
        ("cos-8o", None, "uniform", "unknown layout 'cos-8o'; did you mean 'cos-80'"),
        ("cos-32,1:4", None, "uniform", "cos-32,1:4: .*: unknown layout 'cos-32,1:4'"),
        (None, "1,half", "uniform", "--keep 1,half: expected shares between commas"),
        (None, "1.5", "uniform", "--keep: keep: expected 1.0 or less"),
        (None, "0.5", "best", "--keep: method: expected one of"),
    ],
)
def test_a_way_that_a_checkpoint_cannot_be_asked_in_is_refused(
    vlm: Any, layouts: str | None, keep: str | None, method: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        ways_of(*vlm, layouts, keep, method)


def test_nothing_is_asked_before_all_ways_are_known_to_work(folder: Path, asked: HeldOut, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scale 2:2"):
        evaluate_checkpoint(folder, 1, "test", quiet(), asked, layouts="1:4;1:4,2:2", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_transformers_has_no_layouts(vlm: Any) -> None:
    with pytest.raises(UserError, match="--layouts cos-80: a model of type 'sparsight' has no layout"):
        ways_of(vlm[0], object(), "cos-80", None, "uniform")  # by its processor


def test_the_model_is_as_before_also_after_an_error(vlm: Any) -> None:
    model, processor = vlm
    bridge, config, tokens = model.model.multi_modal_projector, model.config.to_dict(), processor.num_image_tokens
    with pytest.raises(KeyError), Way("1:4,2:1,4:1", 0.5).taken(model, processor):
        raise {24: KeyError}[model.config.num_image_tokens]
    assert model.model.multi_modal_projector is bridge and model.config.to_dict() == config
    assert processor.num_image_tokens == tokens and not hasattr(model, "_sparsight_handle")
