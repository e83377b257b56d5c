"""R19: how long training waits for data is told; each sample is decoded once an epoch over all ranks."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from small_runs import one_stage, recipe_values, save_encoder, stage_values, train, training_set
from sparsight.data.batching import RankBatches, plan_steps
from sparsight.data.sources import ConversationSource
from sparsight.pipeline import run
from sparsight.settings.recipe import Recipe
from sparsight.training.stages import select_trainable


def captions(folder: Path, rows: int, longest: int = 0) -> dict[str, Any]:
    """A JSON of captions of 1 to 9 words, one of them of 30; its recipe key."""
    found = []
    for number in range(rows):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
        words = "apples " * (30 if number == longest else 1 + number % 9)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": words}]
        found.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(found))
    return {"kind": "json", "path": str(folder / "data.json")}


def prepared(tiny_vlm: Any, stage: Any) -> tuple[Any, Any]:
    model, processor = tiny_vlm()
    select_trainable(model, stage)
    return model, processor


def test_each_sample_is_decoded_once_an_epoch_over_all_ranks(tmp_path: Path, tiny_vlm: Any, monkeypatch: Any) -> None:
    recipe, stage = one_stage(data=captions(tmp_path, 32), samples=64, batch_size=8, micro_batch_size=2)
    _, processor = prepared(tiny_vlm, stage)
    data = training_set(processor, recipe, stage)
    decoded: Counter[str] = Counter()
    real = ConversationSource.image
    monkeypatch.setattr(ConversationSource, "image", lambda self, key: decoded.update([key]) or real(self, key))
    plan = plan_steps(len(data), recipe.seed, 2, data.sizes(tmp_path / "sizes.npy"), batch_size=8, micro_batch_size=2)
    assert not decoded  # to measure samples no image is read
    for rank in (0, 1):
        for batch in RankBatches(plan, rank, 2):
            for index in batch:
                data[index]
    assert decoded == {f"{number}.png": 2 for number in range(32)}  # two epochs


def test_the_share_of_waiting_is_logged_and_told(tmp_path: Path, tiny_vlm: Any, monkeypatch: Any) -> None:
    recipe, stage = one_stage(workers=1)
    model, processor = prepared(tiny_vlm, stage)
    log = train(model, processor, recipe, stage, tmp_path / "run")
    assert all(step["seconds"]["data"] > 0 for step in log.steps().values())
    values = recipe_values(save_encoder(tmp_path / "encoder"), stages=[stage_values()], evaluation={"kind": "none"})
    said = io.StringIO()
    run(Recipe.model_validate(values), tmp_path / "told", Console(file=said, width=200))
    assert "of the time waiting for data" in said.getvalue()
    end = [json.loads(line) for line in (tmp_path / "told" / "run.jsonl").read_text().splitlines()][-1]
    assert end["type"] == "stage_end" and 0 < end["data_wait"] < 1
