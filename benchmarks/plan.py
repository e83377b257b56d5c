"""How well `sparsight plan --calibrate` forecasts the time of a step, on layouts that it was not calibrated on.

The model of a recipe is calibrated as the command does it, with single-scale resamplers. Chain-of-Sight's layouts take
turns with them in one process: forward and backward behind the encoder.

    python benchmarks/plan.py [--device cuda] [--rounds 2] [--out FILE]
"""

from __future__ import annotations

from typing import Any

import torch
from common import timing_options, write_result
from rich.console import Console
from rich.table import Table

from sparsight.config import ChainOfSight, Recipe, Resampler
from sparsight.cost.forecast import StageCost, pass_seconds
from sparsight.counting import device_name
from sparsight.pipeline import enter_stage
from sparsight.training.calibrate import SECONDS, fit, in_turn, ready

SCRATCH = {"hidden": 192, "layers": 4, "heads": 3, "intermediate": 512}
BRIDGE = {"width": 192, "heads": 3, "mlp_ratio": 2}
LAYOUTS = ("cos-32", "cos-48", "cos-80", "cos-144", "cos-272", "cos-336-from-32")
CALIBRATED = (16, 112, 224, 336)  # tokens of single-scale resamplers
MODELS: dict[str, dict[str, Any]] = {
    "scratch": {"language": SCRATCH, "batch_size": 16},
    "smollm2-135m, lora": {"language": "smollm2-135m", "batch_size": 2, "lora": {"rank": 16}},
}


def recipe_of(language: Any, **stage: Any) -> Recipe:
    rates = {"bridge": 1e-3, "language": 1e-3}
    values = {"name": "s", "bridge": {"kind": "chain_of_sight", **BRIDGE}, "learning_rate": rates, "samples": 1000}
    data = {"kind": "scenes", "scenes": 100, "cutouts": "shapes"}
    return Recipe.model_validate({"language": language, "data": data, "stages": [values | stage]})


def measure(recipe: Recipe, device: torch.device, seconds: float, console: Console) -> list[dict[str, Any]]:
    cost = StageCost(recipe, recipe.stages[0])
    model, _ = enter_stage(recipe, cost.stage, None, None, console)
    passes = ready(model.to(device), cost)
    bridges = [Resampler(tokens=tokens, **BRIDGE) for tokens in CALIBRATED]
    bridges += [ChainOfSight(layout, **BRIDGE) for layout in LAYOUTS]
    taken = in_turn(passes, bridges, seconds)
    found = fit(*zip(*taken[: len(CALIBRATED)], strict=True))
    rows = []
    for layout, (_, median) in zip(LAYOUTS, taken[len(CALIBRATED) :], strict=True):
        forecast = pass_seconds(found, passes.set_bridge(ChainOfSight(layout, **BRIDGE)))
        row = {"layout": layout, "tokens": ChainOfSight(layout).scales.tokens, "forecast": forecast, "seconds": median}
        rows.append(row | {"ratio": forecast / median})
    return rows


def main() -> None:
    options, device = timing_options(__doc__)
    console = Console()
    result: dict[str, Any] = {"device": device_name(device), "calibrated_on": CALIBRATED, "models": {}}
    table = Table("model", "layout", "seconds", "forecast", "ratio")
    for name, values in MODELS.items():
        rows = measure(recipe_of(**values), device, SECONDS * options.rounds, console)
        result["models"][name] = rows
        for row in rows:
            figures = (f"{row['seconds']:.3f}", f"{row['forecast']:.3f}", f"{row['ratio']:.2f}")
            table.add_row(name, row["layout"], *figures)
    console.print(table)
    write_result("plan", result, options.out, console)


if __name__ == "__main__":
    main()
