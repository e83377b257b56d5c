"""A run from shards and JSON, mixed and packed, on one rank or two, run by test_r22_streams.py.

streams.py FOLDER RUN ...: what each rank learns from goes to FOLDER/RUN/learnt-RANK.jsonl, what it decodes to
FOLDER/RUN/decoded. In RUN:STEP the process kills itself in that step, and RUN:resume goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from small_runs import quiet, recipe_values, stage_values
from sparsight.data import sources
from sparsight.pipeline import run
from sparsight.settings.recipe import Recipe
from sparsight.training.trainer import SparsightTrainer

RANK = os.environ.get("RANK", "0")


def recipe(folder: Path) -> Recipe:
    """Two epochs and a half of 24 samples, four checkpoints."""
    parts = [
        {"name": "tars", "weight": 2, "data": {"kind": "shards", "path": str(folder / "shards")}},
        {"name": "rows", "weight": 1, "data": {"kind": "json", "path": str(folder / "data.json")}},
    ]
    stage = stage_values(samples=60, batch_size=6, packing=True, checkpoints=5)
    return Recipe.model_validate(
        recipe_values(
            folder / "encoder",
            data={"kind": "mixture", "parts": parts},
            stages=[stage],
            workers=2,
            evaluation={"kind": "none"},
        )
    )


def main(folder: Path, name: str, how: str) -> None:
    out = folder / name
    out.mkdir(exist_ok=True)
    step, load = SparsightTrainer.training_step, sources.load_image

    def noted(self: SparsightTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if str(self.state.global_step) == how:
            os.kill(os.getpid(), signal.SIGKILL)
        with (out / f"learnt-{RANK}.jsonl").open("a") as file:
            file.write(json.dumps([self.state.global_step, inputs["info"]["ids"]]) + "\n")
        return step(self, model, inputs, *args, **kwargs)

    def decoded(content: bytes, name: str) -> Image.Image:
        with (out / "decoded").open("a") as file:  # of every loading process: a short line is written whole
            file.write(name + "\n")
        return load(content, name)

    SparsightTrainer.training_step, sources.load_image = noted, decoded  # type: ignore[method-assign, assignment]
    try:
        run(recipe(folder), out / "run", quiet(), resume=how == "resume")
    finally:
        SparsightTrainer.training_step, sources.load_image = step, load  # type: ignore[method-assign]


if __name__ == "__main__":
    for asked in sys.argv[2:]:
        main(Path(sys.argv[1]), asked.partition(":")[0], asked.partition(":")[2])
