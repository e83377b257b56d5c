"""A whole run of two stages on two ranks, under an engine of accelerate, run by test_engines.py.

engines.py FOLDER OUT CASE [resume]: the case's recipe, from the encoder in FOLDER, trained in OUT. The engine is in
the environment, as `accelerate launch` says it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from sharded import pretend

from small_runs import FINER, quiet, recipe_values, stage_values
from sparsight.pipeline import run
from sparsight.settings.recipe import Recipe

LORA = {"rank": 4, "dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LORA},
    "adapters": {"lora": LORA | {"keep": True}},
    "compressor": {"compressor": {"keep": 0.5}},
    "skipper": {"skipper": {"alpha": 0.5, "epsilon": 0.5, "schedule": "constant"}},
    "packing": {"packing": True},
    "checkpointing": {"gradient_checkpointing": True},
    "encoder": {"learning_rate": {"vision": 1e-3, "bridge": 2e-3, "language": 1e-3}},
    "cached": {"cache_features": True},
    "muon": {"optimizer": "muon"},
}


def recipe(folder: Path, case: str, **changes: Any) -> Recipe:
    """Few visual tokens, then more of them: tokens are scaled in between; four steps each, a checkpoint every two."""
    stages = [stage_values(checkpoints=2, **CASES[case]), stage_values("finetune", bridge=FINER, **CASES[case])]
    values = {"stages": stages, "evaluation": {"kind": "none"}} | changes
    return Recipe.model_validate(recipe_values(folder / "encoder", **values))


def main() -> None:
    folder, out, case = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if "ACCELERATE_USE_FSDP" in os.environ:
        pretend()
    run(recipe(folder, case), out, quiet(), resume="resume" in sys.argv)


if __name__ == "__main__":
    main()
