"""How well `sparsight plan --calibrate` forecasts the time of a step, on layouts that it was not calibrated on.

Short real runs from the recipe on, timed by the run log: loading, forward, backward and optimizer. The layouts that the
command calibrates with and others take turns, so that what else the machine does weighs on all.

    python benchmarks/plan.py [--device cpu] [--rounds 1] [--out FILE]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import timing_options, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparsight.config import ChainOfSight, Recipe
from sparsight.cost.forecast import pass_seconds
from sparsight.counting import device_name
from sparsight.pipeline import CALIBRATED, TimedSteps, timed_steps
from sparsight.training.calibrate import fit

SCRATCH = {"hidden": 192, "layers": 4, "heads": 3, "intermediate": 512}
BRIDGE = {"width": 192, "heads": 3, "mlp_ratio": 2}
LAYOUTS = ("cos-32", "cos-48", "1:16,8:1", "cos-272", "cos-336-from-32")
MODELS: dict[str, dict[str, Any]] = {
    "scratch": {"language": SCRATCH, "batch_size": 16},
    "smollm2-135m, lora": {"language": "smollm2-135m", "batch_size": 2, "lora": {"rank": 16}},
}
ROUNDS = {"scratch": 2, "smollm2-135m, lora": 1}


def recipe_of(language: Any, **stage: Any) -> Recipe:
    rates = {"bridge": 1e-3, "language": 1e-3}
    values = {"name": "s", "bridge": {"kind": "chain_of_sight", **BRIDGE}, "learning_rate": rates, "samples": 1000}
    values |= {"cache_features": True}
    data = {"kind": "scenes", "scenes": 200, "cutouts": "shapes"}
    return Recipe.model_validate({"language": language, "data": data, "stages": [values | stage]})


def measure(recipe: Recipe, rounds: int, console: Console) -> list[dict[str, Any]]:
    """As `calibrate_recipe`, with other layouts in turn; of the rounds, the quickest of each."""
    layouts = sorted({*CALIBRATED, *LAYOUTS}, key=lambda layout: ChainOfSight(layout).scales.tokens)
    best: dict[str, TimedSteps] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in track(layouts * rounds, "timing", console=console):
            timed = timed_steps(recipe, recipe.stages[0], ChainOfSight(layout, **BRIDGE), Path(folder))
            if layout not in best or timed.seconds < best[layout].seconds:
                best[layout] = timed
    seen = [best[layout] for layout in CALIBRATED]
    found, rows = fit([each.flops for each in seen], [each.seconds for each in seen]), []
    for layout in LAYOUTS:
        forecast = pass_seconds(found, best[layout].flops)
        row = {"layout": layout, "forecast": forecast, "seconds": best[layout].seconds}
        rows.append(row | {"ratio": forecast / best[layout].seconds})
    return rows


def main() -> None:
    options, device = timing_options(__doc__)
    console = Console()
    result: dict[str, Any] = {
        "device": device_name(device),
        "calibrated_on": CALIBRATED,
        "rounds": ROUNDS,
        "models": {},
    }
    table = Table("model", "layout", "seconds", "forecast", "ratio")
    for name, values in MODELS.items():
        rows = measure(recipe_of(**values), ROUNDS[name], console)
        result["models"][name] = rows
        for row in rows:
            figures = (f"{row['seconds']:.3f}", f"{row['forecast']:.3f}", f"{row['ratio']:.2f}")
            table.add_row(name, row["layout"], *figures)
    console.print(table)
    write_result("plan", result, options.out, console)


if __name__ == "__main__":
    main()
