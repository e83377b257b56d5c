"""R18: the largest batch comes at once, where optimizer states exist too; if memory runs out, it says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_r19_waiting import captions, prepared

from small_runs import one_stage, train
from sparsight.data.batching import plan_steps


@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_step_is_the_second(tmp_path: Path, tiny_vlm: Any, packing: bool) -> None:
    data = captions(tmp_path, 40, longest=23)
    recipe, stage = one_stage(data=data, samples=40, batch_size=4, micro_batch_size=2, packing=packing)
    model, processor = prepared(tiny_vlm, stage)
    log = train(model, processor, recipe, stage, tmp_path / "run")
    positions = [step["text_tokens"] + step["visual_tokens"] for step in log.steps().values()]
    assert len(positions) == 10 and positions[1] == max(positions)


@pytest.mark.parametrize(
    "method",
    [
        {"compressor": {"keep": 0.25, "final": 1.0}},
        {"compressor": {"keep": 0.25, "dense_every": 5}},
        {"skipper": {"alpha": 0.9, "epsilon": 0.0}},
    ],
)
def test_methods_are_at_their_largest_there(tmp_path: Path, tiny_vlm: Any, method: dict[str, Any]) -> None:
    data = captions(tmp_path, 40, longest=23)
    recipe, stage = one_stage(data=data, samples=40, batch_size=4, checkpoints=0, **method)
    model, processor = prepared(tiny_vlm, stage)
    steps = train(model, processor, recipe, stage, tmp_path / "run").steps()
    language = {n: sum(f for part, f in s["flops_by_part"].items() if "language" in part) for n, s in steps.items()}
    assert max(language, key=language.__getitem__) == 2
    for largest in (2, 3):
        assert steps[largest]["visual_tokens_kept"] == steps[largest]["visual_tokens"]
        assert steps[largest]["layers_run"] == steps[largest]["layers"]
    assert any(s["visual_tokens_kept"] < s["visual_tokens"] or s["layers_run"] < s["layers"] for s in steps.values())


@pytest.mark.parametrize("batches", [{"batch_size": 16}, {"batch_tokens": 4096}])
def test_the_step_with_most_images_is_the_third(batches: dict[str, int]) -> None:
    draw = np.random.default_rng(0)
    images = draw.choice([0, 1, 8], 640, p=[0.3, 0.6, 0.1])
    text = np.where(images == 0, draw.integers(200, 2000, 640), draw.integers(10, 60, 640))
    sizes = np.stack([text + 16 * images, images], 1)
    steps = plan_steps(640, 0, 1, sizes, largest_first=True, **batches)
    counts = [sum(int(images[batch].sum()) for batch in step) for step in steps]
    positions = [max(len(batch) * int(sizes[batch, 0].max()) for batch in step) for step in steps]
    longest = [max(int(sizes[batch, 0].max()) for batch in step) for step in steps]
    assert sorted(index for step in steps for batch in step for index in batch) == [*range(640)]
    assert counts[2] == max(counts) or counts[1] == max(counts)
    assert positions[1] == max(positions) if "batch_tokens" in batches else longest[1] == max(longest)


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
