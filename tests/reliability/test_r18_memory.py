"""R18: the largest batch comes at once, where optimizer states exist too; if memory runs out, it says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_r19_waiting import captions, prepared

from small_runs import one_stage, train


@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_step_is_the_second(tmp_path: Path, tiny_vlm: Any, packing: bool) -> None:
    data = captions(tmp_path, 40, longest=23)
    recipe, stage = one_stage(data=data, samples=40, batch_size=4, micro_batch_size=2, packing=packing)
    model, processor = prepared(tiny_vlm, stage)
    log = train(model, processor, recipe, stage, tmp_path / "run")
    positions = [step["text_tokens"] + step["visual_tokens"] for step in log.steps().values()]
    assert len(positions) == 10 and positions[1] == max(positions)


def test_out_of_memory_says_what_to_do(tmp_path: Path, tiny_vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, stage = one_stage()
    model, processor = prepared(tiny_vlm, stage)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(
        ValueError, match=r"step 1: out of memory on \(4, \d+\) positions .*Lower micro_batch_size or batch_tokens"
    ):
        train(model, processor, recipe, stage, tmp_path / "run")
