"""R05 (trl #6617): text-only data leaves the vision tower trainable. What never gets a gradient is told by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from small_runs import Records, one_stage, recipe_values, save_encoder, stage_values, train
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import Sample
from sparsight.pipeline import run
from sparsight.reporting.runlog import read_run
from sparsight.settings.recipe import Recipe
from sparsight.training import idle
from sparsight.training.stages import add_lora, select_trainable
from tiny import ListSource, conversation

ALL = {"vision": 1e-4, "bridge": 1e-3, "language": 1e-3}


def notes(tmp_path: Path, tiny_vlm: Any, images: int | None, **changes: Any) -> tuple[list[str], Records]:
    """What a stage's log notes, over scenes, or over samples with so many images."""
    recipe, stage = one_stage(**({"learning_rate": ALL} | changes))
    model, processor = tiny_vlm()
    add_lora(model, stage.lora, seed=0)
    select_trainable(model, stage)
    data = None
    if images is not None:
        samples = [
            Sample(str(number), conversation(images=images), tuple(range(images))) for number in range(stage.samples)
        ]
        data = TrainingSet(ListSource(*samples), processor, stage.samples)
    log = train(model, processor, recipe, stage, tmp_path, data)
    return [record["text"] for record in log if record["type"] == "note"], log


def test_text_alone_is_told_in_terminal_and_log(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "apples " * (1 + number % 4)},
            ],
        }
        for number in range(8)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    values = recipe_values(
        save_encoder(tmp_path / "encoder"),
        data={"kind": "json", "path": str(tmp_path / "data.json")},
        stages=[stage_values(samples=8, learning_rate=ALL)],
        evaluation={"kind": "none"},
    )
    out = io.StringIO()
    run(Recipe.model_validate(values), tmp_path / "run", Console(file=out, width=1000))
    (told,) = [line for line in out.getvalue().splitlines() if "had no gradient" in line]
    assert told.startswith("stage 'pretrain', after 2 steps: ") and "language" not in told
    assert "vision: 71 of 71 (model.vision_tower." in told and "bridge: " in told
    assert told.endswith("leave out learning_rate.vision and learning_rate.bridge: that freezes them.")
    lines = map(json.loads, (tmp_path / "run" / "run.jsonl").read_text().splitlines())
    assert [line["text"] for line in lines if line["type"] == "note"] == [told]
    assert read_run(tmp_path / "run").problems == []


QUIET: dict[str, dict[str, Any]] = {
    "all train": {},
    "vision alone": {"learning_rate": {"vision": 1e-4}},
    "Muon": {"optimizer": "muon"},
    "LoRA": {"lora": {"rank": 4}},
    "LoRA, one step at a rate of 0": {"lora": {"rank": 4}, "samples": 4, "warmup": 1},
    "a layer is off": {"skipper": {"alpha": 1, "epsilon": 0, "schedule": "constant", "protected": [1, 0]}},
    "compressor": {"compressor": {"keep": 0.5}},
}


@pytest.mark.parametrize("name", QUIET)
def test_ordinary_data_is_not_told_of(tmp_path: Path, tiny_vlm: Any, name: str) -> None:
    """The encoder's last block, of which no feature level is taken, is idle in each of these."""
    assert notes(tmp_path, tiny_vlm, None, **QUIET[name])[0] == []


@pytest.mark.parametrize("name", ["all train", "Muon", "LoRA", "a layer is off"])
def test_text_alone_is_told_whatever_trains(tmp_path: Path, tiny_vlm: Any, name: str) -> None:
    (told,), _ = notes(tmp_path, tiny_vlm, 0, **QUIET[name])
    assert "vision: 71 of 71 (" in told and "bridge: " in told and "language" not in told


def test_text_alone_is_fine_where_language_alone_trains(tmp_path: Path, tiny_vlm: Any) -> None:
    assert notes(tmp_path, tiny_vlm, 0, learning_rate={"language": 1e-3})[0] == []


def test_it_is_told_once_and_early(tmp_path: Path, tiny_vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "AFTER", 2)
    (told,), log = notes(tmp_path, tiny_vlm, 0, samples=16)
    kinds = [record["type"] for record in log]
    assert kinds == ["step", "step", "note", "step", "step"] and "after 2 steps" in told
