"""How well `sparsight plan --calibrate` forecasts the time of a step, on layouts that it was not calibrated on.

Each model is calibrated as the command does it; then short real runs with other layouts of Chain-of-Sight are timed:
loading, forward, backward and optimizer, from the run log.

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
from sparsight.counting import device_name
from sparsight.pipeline import CALIBRATED, calibrate_recipe, timed_steps

SCRATCH = {"hidden": 192, "layers": 4, "heads": 3, "intermediate": 512}
BRIDGE = {"width": 192, "heads": 3, "mlp_ratio": 2}
LAYOUTS = ("cos-32", "cos-48", "1:16,8:1", "cos-272", "cos-336-from-32")
MODELS: dict[str, dict[str, Any]] = {
    "scratch": {"language": SCRATCH, "batch_size": 16},
    "smollm2-135m, lora": {"language": "smollm2-135m", "batch_size": 2, "lora": {"rank": 16}},
}


def recipe_of(language: Any, **stage: Any) -> Recipe:
    rates = {"bridge": 1e-3, "language": 1e-3}
    values = {"name": "s", "bridge": {"kind": "chain_of_sight", **BRIDGE}, "learning_rate": rates, "samples": 1000}
    values |= {"cache_features": True}
    data = {"kind": "scenes", "scenes": 200, "cutouts": "shapes"}
    return Recipe.model_validate({"language": language, "data": data, "stages": [values | stage]})


def measure(recipe: Recipe, console: Console) -> list[dict[str, Any]]:
    found = calibrate_recipe(recipe, console)
    stage, rows = recipe.stages[0], []
    with tempfile.TemporaryDirectory() as folder:
        for layout in track(LAYOUTS, "timing other layouts", console=console):
            bridge = ChainOfSight(layout, **BRIDGE)
            timed = timed_steps(recipe, stage, bridge, Path(folder))
            attention = timed.flops["language_attention"]
            linear = sum(timed.flops.values()) - attention
            forecast = found["pass"] + found["linear"] * linear + found["attention"] * attention
            row = {"layout": layout, "tokens": bridge.scales.tokens, "forecast": forecast, "seconds": timed.seconds}
            rows.append(row | {"ratio": forecast / timed.seconds})
    return rows


def main() -> None:
    options, device = timing_options(__doc__)
    console = Console()
    result: dict[str, Any] = {"device": device_name(device), "calibrated_on": CALIBRATED, "models": {}}
    table = Table("model", "layout", "seconds", "forecast", "ratio")
    for name, values in MODELS.items():
        rows = measure(recipe_of(**values), console)
        result["models"][name] = rows
        for row in rows:
            figures = (f"{row['seconds']:.3f}", f"{row['forecast']:.3f}", f"{row['ratio']:.2f}")
            table.add_row(name, row["layout"], *figures)
    console.print(table)
    write_result("plan", result, options.out, console)


if __name__ == "__main__":
    main()
