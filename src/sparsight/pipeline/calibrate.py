"""Short real runs that tell `sparsight plan` how fast this computer is."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from sparsight.config import ChainOfSight, Evaluation, Recipe, Resampler, Stage
from sparsight.console import Console
from sparsight.cost.devices import keep_measurement, measurements
from sparsight.cost.forecast import calibration_key, forecast, inner_sizes
from sparsight.counting import default_device, device_name, precision_on
from sparsight.pipeline.train import run
from sparsight.reporting import read_run
from sparsight.reporting.runlog import step_seconds
from sparsight.training.calibrate import fit

CALIBRATION_STEPS = 12


CALIBRATED = ("1:16", "1:16,4:4", "1:16,2:16,8:1", "1:16,2:16,16:1")  # layouts for `plan --calibrate`


def calibrate_recipe(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Time real steps of a recipe's costliest stage at a few numbers of tokens, for `sparsight plan`.

    Returns:
        What is kept: seconds of a pass and of a FLOP, see ``cost.forecast.calibrated``.
    """
    device = default_device()
    recipe = recipe.model_copy(update={"precision": precision_on(device, recipe.precision)})
    cost = max(forecast(recipe), key=lambda cost: sum(cost.flops.values()))
    own, most = inner_sizes(cost.stage.bridge), max(each.tokens for each in forecast(recipe))
    bridges: list[Any] = [Resampler(tokens=n, **own) for n in sorted({16, most // 3 + 1, 2 * most // 3 + 1, most})]
    if isinstance(cost.stage.bridge, ChainOfSight):
        bridges = [ChainOfSight(layout, **own) for layout in CALIBRATED]
    with tempfile.TemporaryDirectory() as name:
        done = [
            timed_steps(recipe, cost.stage, bridge, Path(name))
            for bridge in track(bridges, f"calibrating on stage {cost.stage.name}", console=console)
        ]
    passes = cost.batch // cost.micro_batch
    parts = [{part: value / passes for part, value in each.flops.items()} for each in done]
    found: dict[str, Any] = fit(parts, [each.seconds / passes for each in done])
    found |= {"encoder": done[0].encoder or found["linear"], "device": device_name(device)}
    before = measurements().get("calibrations", {})
    kept = before | {calibration_key(recipe): found}
    file = keep_measurement(calibrations=kept, auto=precision_on(device, "auto"))
    console.print(f"calibrated on [bold]{found['device']}[/]; kept in {file}")
    return found


@dataclass(frozen=True)
class TimedSteps:
    """Medians of an optimizer step: FLOPs by part, seconds. ``encoder``: seconds of a cached encoder's FLOP, or 0."""

    flops: dict[str, float]
    seconds: float
    encoder: float


def timed_steps(recipe: Recipe, stage: Stage, bridge: Any, folder: str | Path) -> TimedSteps:
    """A short real run of one stage, with another bridge and every token and layer. ``folder`` keeps its features."""
    samples = CALIBRATION_STEPS * (stage.batch_size if stage.batch_tokens is None else stage.batch_tokens // 64 + 1)
    plain = dict.fromkeys(("compressor", "skipper", "places_of")) | {"proportional_attention": False, "bridge": bridge}
    plain |= {"samples": samples, "checkpoints": 0}
    update = {"stages": (stage.model_copy(update=plain),), "evaluation": Evaluation(kind="none"), "report_to": ()}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run(recipe.model_copy(update=update), Path(out), Console(quiet=True), cache_root=Path(folder, "cache"))
        logged = read_run(Path(out))
    steps = logged.stages[0].steps[2:]  # the first ones warm up
    flops = {
        part: statistics.median(step["flops_by_part"][part] for step in steps) for part in steps[0]["flops_by_part"]
    }
    encoder = next((cache["seconds"] / cache["flops"] for cache in logged.caches.values()), 0.0)
    return TimedSteps(flops, statistics.median(map(step_seconds, steps)), encoder)
