"""Compare runs by what their logs say, against one of them, the baseline. Imports no torch.

Ratios are run / baseline: below 1 is cheaper. The ratio of executed FLOPs is the ratio of seconds that a perfect
machine would reach, so the speed-up had is shown next to the one possible; a stage that is not finished has no ratio.
Losses are running means (`Curve`). Scores are fractions of 1; differences are in points (hundredths), with the half
width of the 95% interval that the number of items leaves. Where both logs hold the points of the same items, it is that
of a paired bootstrap, and a paired permutation test stands beside it. A difference is called
one, and coloured, only where its interval excludes zero; the verdict names the tasks that Holm's correction leaves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import copysign, erfc
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsight.errors import UserError
from sparsight.evaluation.significance import holm, paired_test
from sparsight.reporting.runlog import Run, StageRun, step_seconds

Comparison = dict[str, Any]
_COSTS = ("seconds", "executed_flops")
_LEVEL = 0.05  # a difference that chance alone makes less often is called one
_ITEMS = 20  # fewer tell nothing, where no items are paired
_BUSY = 1.25  # clock and CPU time that differ by this factor from run to run: something else was running
_BEYOND = 0.75  # of the ratio of FLOPs: a ratio of seconds below that is hard to believe


def compare(runs: list[Run], baseline: str | None = None) -> Comparison:
    """Figures of all runs, the baseline first, as plain JSON values.

    The baseline is the run of that name; without one, "standard" if there is such a run, else the first. Raises
    `ValueError` for no runs, an unknown baseline, two runs of one name, a stage named "total" or "score", or a
    task named "mean": those names are ours.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise UserError(f"comparing takes runs of different names, got {names}")
    if baseline is None:
        baseline = "standard" if "standard" in names else names[0]
    if baseline not in names:
        raise UserError(f"no run is named {baseline!r}; there are {names}")
    if taken := {stage.name for run in runs for stage in run.stages} & {"total", "score"}:
        raise UserError(f"a stage cannot be named {taken.pop()!r}")
    if any("mean" in run.scores for run in runs):
        raise UserError("a task cannot be named 'mean'")
    base, *others = sorted(runs, key=lambda run: run.name != baseline)
    entries = [_entry(run) for run in (base, *others)]
    ratios = {entry["name"]: _ratios(entry, entries[0]) for entry in entries[1:]}
    for run in others:
        if not (run.trained and base.trained):  # a stage that has not begun is not among its stages
            ratios[run.name]["total"] = dict.fromkeys(_COSTS)
    busy = {run.name: found for run in others if (found := _busy(run, base, ratios[run.name]["total"]))}
    return {
        "runs": entries,
        "chance": {task: value for run in (*others, base) for task, value in run.chance.items()},
        "items": {task: count for run in (*others, base) for task, count in run.items.items()},
        "ratios": ratios,
        "busy": busy,
        "tests": {run.name: _tests(run, base, _common([base, *others])) for run in others},
        "to_loss": _to_loss([base, *others]),
        "differences": _differences([base, *others]),
        "warnings": [text for run in (base, *others) for text in _own_warnings(run)]
        + [text for run in others for text in _pair_warnings(run, base)]
        + list(_too_fast({name: own for name, own in ratios.items() if name not in busy})),
        "env": _environment(base),
    }


def _entry(run: Run) -> dict[str, Any]:
    stages = [_stage_entry(stage) for stage in run.stages]
    return {
        "name": run.name,
        "stages": stages,
        "scores": run.scores,
        "shuffled": run.shuffled,
        "seconds": sum(stage.seconds for stage in run.stages),
        "executed_flops": sum(stage.executed_flops for stage in run.stages),
        "cpu_seconds": _sum([each["cpu_seconds"] for each in stages]),
        "peak_memory_bytes": max((each["peak_memory_bytes"] or 0 for each in stages), default=0) or None,
    }


def _stage_entry(stage: StageRun) -> dict[str, Any]:
    keys = ("name", "seconds", "executed_flops", "visual_tokens", "samples", "bridge", "layout", "finished")
    return {key: getattr(stage, key) for key in keys} | {
        "peak_memory_bytes": stage.highest("memory_bytes"),
        "data_wait": stage.data_wait,
        "cpu_seconds": stage.cpu_seconds,
        "loss": stage.curve.final,
    }


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _busy(run: Run, base: Run, total: Mapping[str, float | None]) -> dict[str, float] | None:
    """Ratios of the steps' seconds by the clock and of their CPU seconds, where these disagree; not on a GPU."""
    if None in total.values() or any(_mapped(_environment(each), "hardware").get("gpus") for each in (run, base)):
        return None
    cpu = [_sum([stage.cpu_seconds for stage in each.stages]) for each in (run, base)]
    clock = [sum(step_seconds(step) for stage in each.stages for step in stage.steps) for each in (run, base)]
    if not all(cpu) or not all(clock):
        return None
    found = {"clock": clock[0] / clock[1], "cpu": cpu[0] / cpu[1]}  # type: ignore[operator]
    return None if 1 / _BUSY <= found["clock"] / found["cpu"] <= _BUSY else found


def _mapped(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def trusted(comparison: Comparison, name: str) -> dict[str, float | None]:
    """Ratios of a run's costs in all; ``seconds`` are CPU seconds where the clock tells of other work."""
    total: dict[str, float | None] = comparison["ratios"][name]["total"]
    busy = comparison["busy"].get(name)
    return total | ({"seconds": busy["cpu"]} if busy else {})


def _to_loss(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """For each stage the baseline's last loss, and after how many seconds and samples each run first had it.

    `seconds` and `samples` hold one value a run, the baseline first; None where it was not reached.
    """
    found = {}
    for stage in runs[0].stages:
        curves = [next((own.curve for own in run.stages if own.name == stage.name), None) for run in runs]
        loss = stage.curve.final
        if loss is not None:
            reached = [curve.reaches(loss) if curve else None for curve in curves]
            places = {
                key: [each and each[place] for each in reached] for place, key in enumerate(("seconds", "samples"))
            }
            found[stage.name] = {"loss": loss} | places
    return found


def _differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Keys of the recipes, dotted, that are not alike in all runs: one value a run, the baseline first."""
    recipes = [dict(_flat("", run.header.get("recipe"))) for run in runs]
    keys = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if key != "name"]
    parts = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    keys.sort(key=lambda key: parts.index(key.rpartition(".")[0]))  # what only a later run has stands with the rest
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; items of a list go by their names, where they have some."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        value = {str(number if item["name"] is None else item["name"]): item for number, item in enumerate(value)}
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _flat(f"{path}.{key}" if path else key, item)


def _ratios(entry: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    stages = {stage["name"]: stage for stage in base["stages"]}
    pairs = [(stage["name"], stage, stages[stage["name"]]) for stage in entry["stages"] if stage["name"] in stages]
    ratios: dict[str, Any] = {
        name: {cost: _ratio(ours[cost], theirs[cost]) if _whole(ours) and _whole(theirs) else None for cost in _COSTS}
        for name, ours, theirs in (*pairs, ("total", entry, base))
    }
    common = entry["scores"].keys() & base["scores"].keys()
    means = [fmean(each["scores"][task] for task in common) if common else None for each in (entry, base)]
    return ratios | {"score": _ratio(*means)}


def _common(runs: list[Run]) -> list[str]:
    """The tasks that all runs have, in the first one's order."""
    return [task for task in runs[0].scores if all(task in run.scores for run in runs)]


def _tests(run: Run, base: Run, common: list[str]) -> dict[str, dict[str, Any]]:
    """Paired tests by task, where both runs have points of the same items; "mean" if so for all tasks in common.

    `difference` and `interval` (95%) are in points, run minus baseline. Images are what is resampled.
    """
    same = [
        task
        for task, points in run.points.items()
        if task in base.points and points[1:] == base.points[task][1:]  # images and questions
    ]
    groups = {task: [task] for task in same} | ({"mean": common} if common and set(common) <= set(same) else {})
    tests = {}
    for name, tasks in groups.items():
        ours, theirs = ([score for task in tasks for score in each.points[task].scores] for each in (run, base))
        images = [image for task in tasks for image in base.points[task].images]
        labels = [task for task in tasks for _ in base.points[task].scores]
        found = paired_test(ours, theirs, images, labels)
        interval = [100 * found.low, 100 * found.high]
        tests[name] = {"difference": 100 * found.difference, "interval": interval, "p_value": found.p_value}
    return tests


def _whole(entry: dict[str, Any]) -> bool:
    """Whether a stage is finished, or a run has stages and all are."""
    stages = entry.get("stages", [entry])
    return bool(stages) and all(stage["finished"] for stage in stages)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if base and value is not None else None


def _environment(run: Run) -> dict[str, Any]:
    environment = run.header.get("environment")
    return environment if isinstance(environment, dict) else {}


def _own_warnings(run: Run) -> Iterator[str]:
    yield from (f"{run.name}: {problem}" for problem in run.problems)
    yield from (f"{run.name}: stage {stage.name} is not finished" for stage in run.stages if not stage.finished)
    if not run.stages:
        yield f"{run.name}: has no stages"
    if not run.scores:
        yield f"{run.name}: has not been evaluated"
    if _environment(run).get("dirty"):
        yield f"{run.name}: its code had changes that are not committed"


def _pair_warnings(run: Run, base: Run) -> Iterator[str]:
    """What makes it unfair to compare `run` with `base`."""

    def differences(what: str, ours: object, theirs: object) -> Iterator[str]:
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            for key in dict.fromkeys([*theirs, *ours]):
                yield from differences(f"{what} {key}".strip(), ours.get(key), theirs.get(key))
        elif ours != theirs:
            yield f"{run.name}: {what} is {_said(ours)}, but {_said(theirs)} in {base.name}"

    yield from differences("samples hash", run.header.get("samples_hash"), base.header.get("samples_hash"))
    precisions = [dict(_flat("", each.header.get("recipe"))).get("precision") for each in (run, base)]
    yield from differences("precision", *precisions)
    ours, theirs = (_environment(each) for each in (run, base))
    for key in ("commit", "versions", "hardware", "platform"):
        yield from differences("" if key in ("versions", "hardware") else key, ours.get(key, {}), theirs.get(key, {}))
    seen = [{stage.name: stage.samples for stage in each.stages} for each in (run, base)]
    yield from differences("samples in stage", *seen)
    tasks = [{task: "scored" for task in each.scores} for each in (run, base)]
    yield from differences("task", *tasks)
    yield from differences("items of task", run.items, base.items)
    yield from differences("chance of task", run.chance, base.chance)
    asked = [{task: each.points[task].questions for task in run.points if task in base.points} for each in (run, base)]
    yield from differences("questions of task", *asked)


def _too_fast(ratios: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Stages that saved much more time than work: then something else took the baseline's time, or the run's FLOPs."""
    for name, stages in ratios.items():
        for stage, costs in stages.items():
            if stage in ("total", "score") or None in costs.values():
                continue
            if costs["seconds"] >= _BEYOND * costs["executed_flops"]:
                continue
            yield (
                f"{name}: speed-up of stage {stage} is {speed_up(costs)}: more than the work that was saved. Was the "
                "machine busy with something else?"
            )


def _said(value: object) -> str:
    return "missing" if value is None else str(value)


def stage_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each stage and run, then each run's total: figures and `ratios` (None for the baseline)."""
    runs = comparison["runs"]
    rows = []
    for name in dict.fromkeys(stage["name"] for run in runs for stage in run["stages"]):
        for run in runs:
            ratios = comparison["ratios"].get(run["name"], {}).get(name)
            rows += [stage | {"run": run["name"], "ratios": ratios} for stage in run["stages"] if stage["name"] == name]
    for run in runs:
        ratios = comparison["ratios"].get(run["name"], {}).get("total")
        costs = {key: run[key] for key in (*_COSTS, "cpu_seconds", "peak_memory_bytes")}
        rows.append({"name": "total", "run": run["name"], "ratios": ratios} | costs)
    return rows


def score_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each task, then the mean over the tasks that all runs have.

    `scores`, `shuffled`, `points` (difference from the baseline), `interval` (its 95% half width in points: half the
    paired interval, or from the number of items; seeds would add to it), `p_value` (of the paired test), `told` (the
    sign of a difference whose interval excludes zero, by itself) and `named` (of one that Holm's correction for the
    number of tasks leaves) hold one value a run, the baseline first, None where there is none.
    """
    runs, chance, items = comparison["runs"], comparison["chance"], comparison["items"]
    tests = [comparison["tests"].get(run["name"], {}) for run in runs]
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(task for run in runs for task in run["scores"]):
        scores = [run["scores"].get(task) for run in runs]
        shuffled = [run["shuffled"].get(task) for run in runs]
        count = items.get(task)
        spread = [None if p is None or not count else _variance(p, count) for p in scores]
        rows.append({"task": task, "items": count, "chance": chance.get(task), "scores": scores, "shuffled": shuffled})
        rows[-1]["variance"] = spread
    common = [row for row in rows if None not in row["scores"]]
    if common:
        mean: dict[str, Any] = {"task": "mean", "items": sum(row["items"] or 0 for row in common) or None}
        mean["chance"] = _mean([row["chance"] for row in common])
        for key in ("scores", "shuffled", "variance"):
            mean[key] = [_mean([row[key][index] for row in common]) for index in range(len(runs))]
        mean["variance"] = [None if each is None else each / len(common) for each in mean["variance"]]
        rows.append(mean)
    for row in rows:  # the mean last
        spread = row.pop("variance")
        row["points"] = [_points(score, row["scores"][0]) for score in row["scores"]]
        row["interval"] = [None if None in (v, spread[0]) else 196 * (v + spread[0]) ** 0.5 for v in spread]
        row["p_value"] = [own.get(row["task"], {}).get("p_value") for own in tests]
        for index, own in enumerate(tests):
            if row["task"] in own:
                low, high = own[row["task"]]["interval"]
                row["interval"][index] = (high - low) / 2
    tasks = [row for row in rows if row["task"] != "mean"]
    raised = [holm([_p_value(row, index) for row in tasks]) for index in range(len(runs))]
    for number, row in enumerate(rows):
        row["told"] = [_sign(row, index, own.get(row["task"], {})) for index, own in enumerate(tests)]
        row["named"] = [
            sign if row not in tasks or raised[index][number] < _LEVEL else 0 for index, sign in enumerate(row["told"])
        ]
    return rows


def _variance(p: float, count: int) -> float:
    """Of the mean of so many items: p(1-p) is the largest variance that a score within [0, 1] of mean p can have. All
    right or all wrong is not certain: one item more could be otherwise."""
    p = min(max(p, 1 / (count + 2)), 1 - 1 / (count + 2))
    return p * (1 - p) / count


def _p_value(row: Mapping[str, Any], index: int) -> float:
    """Of the paired test, else of two independent means; 1 where nothing can be told."""
    points, interval, paired = (row[key][index] for key in ("points", "interval", "p_value"))
    if paired is not None:
        return float(paired)
    if points is None or not interval or row["items"] < _ITEMS:
        return 1.0
    return erfc(1.96 * abs(points) / interval / 2**0.5)


def _sign(row: Mapping[str, Any], index: int, test: Mapping[str, Any]) -> int:
    """1 or -1 where a run differs from the baseline by itself: its interval excludes zero, and chance is small."""
    points = row["points"][index]
    if not index or points is None or _p_value(row, index) >= _LEVEL:
        return 0
    low, high = test.get("interval", (points - row["interval"][index], points + row["interval"][index]))
    return int(copysign(1, points)) if low > 0 or high < 0 else 0


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _points(score: float | None, base: float | None) -> float | None:
    return None if score is None or base is None else 100 * (score - base)


def verdict(comparison: Comparison) -> str:
    """What the numbers say, good and bad: one sentence for each run that is not the baseline."""
    runs, rows = comparison["runs"], score_rows(comparison)
    said = []
    for index, run in enumerate(runs[1:], start=1):
        total, busy = trusted(comparison, run["name"]), comparison["busy"].get(run["name"])
        text = (
            f"{run['name']} took {times(total['seconds'])} of the {'CPU ' if busy else ''}time of {runs[0]['name']}: "
        )
        text += f"speed-up {speed_up(total)}; "
        if busy:
            text = (
                f"The machine had other work while one of {run['name']} and {runs[0]['name']} trained: the clock gives "
                f"{times(busy['clock'])}, the process's own CPU time {times(busy['cpu'])}, which is taken here. {text}"
            )
        said.append(text + scored(rows, index))
    if count := len(comparison["warnings"]):
        said.append(f"{count} warning{'s' if count > 1 else ''}: the comparison may not be fair")
    return ". ".join(said or ["one run: nothing to compare it with"]) + "."


def scored(rows: list[dict[str, Any]], index: int) -> str:
    """The scores of a run beside the baseline's, from `score_rows`: what differs, as far as that can be told."""
    shown = {row["task"]: row for row in rows if row["points"][index] is not None}
    if (mean := shown.pop("mean", None)) is None:
        return "no scores to compare"
    points, told = mean["points"][index], mean["told"][index]
    text = f"score {points:+z.1f} points on average" + ("" if told else ", within what chance allows")
    named = 0
    for word, sign in (("worse", -1), ("better", 1)):
        tasks = [f"{task} ({row['points'][index]:+z.1f})" for task, row in shown.items() if row["named"][index] == sign]
        named += len(tasks)
        text += f"; {word} on: {', '.join(tasks)}" if tasks else ""
    if named < len(shown):
        text += f"; no difference could be told on {'the other tasks' if named else 'any task'}"
    return text


def decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def times(ratio: float | None) -> str:
    return "?" if ratio is None else f"{ratio:.2f}x"


def speed_up(ratios: Mapping[str, float | None] | None) -> str:
    """Such as "3.6x of 4.1x possible", from ratios of seconds and of executed FLOPs."""
    if not ratios:
        return ""
    had, possible = (f"{1 / ratios[cost]:.1f}x" if ratios.get(cost) else "?" for cost in _COSTS)  # type: ignore[operator]
    return f"{had} of {possible} possible"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 600:
        return f"{minutes / 60:,.0f} h"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def human(value: float | None, unit: str = "") -> str:
    """Three digits and an SI prefix: 1.2e14, "FLOP" -> "120 TFLOP"."""
    if value is None:
        return "-"
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def share(value: float | None) -> str:
    """A fraction as per cent."""
    return "-" if value is None else f"{100 * value:.1f}%"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def signed(points: float | None, interval: float | None) -> str:
    shown = "-" if points is None else f"{points:+z.1f}"
    return shown if points is None or interval is None else f"{shown} ±{interval:.1f}"


def p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"


def render_table(comparison: Comparison, console: Console) -> None:
    """Print cost by stage, time to the baseline's loss, scores by task, what differs, the verdict, and the warnings."""
    wide = console.width >= 150
    console.print(_cost_table(comparison, wide))
    if len(comparison["runs"]) > 1:
        console.print(_loss_table(comparison))
    if any(run["scores"] for run in comparison["runs"]):
        console.print(_score_table(comparison, wide))
    if comparison["differences"]:
        console.print(_difference_table(comparison))
    console.print(Text(verdict(comparison), style="bold"))
    for text in comparison["warnings"]:
        console.print(Text(f"! {text}", style="yellow"))


def _cost_table(comparison: Comparison, wide: bool) -> Table:
    base = comparison["runs"][0]["name"]
    table = Table("stage", title="Training cost", title_justify="left")
    table.add_column("run", overflow="fold")
    extra = ("x time", "x FLOPs", "CPU", "memory", "data wait", "loss") if wide else ()
    for heading in ("tokens", "samples", "time", "FLOPs", *extra, "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = f"speed-up: over {base}, of what executed FLOPs allow"
    previous = None
    for row in stage_rows(comparison):
        if row["name"] != previous and previous is not None:
            table.add_section()
        ratios = row["ratios"]
        cells = [row["name"] if row["name"] != previous else "", row["run"]]
        cells += [_said(row[key]) if key in row else "" for key in ("visual_tokens", "samples")]
        cells += [duration(row["seconds"]), human(row["executed_flops"], "FLOP" if wide else "")]
        if wide:
            cells += [times(ratios[cost]) if ratios else "" for cost in _COSTS]
            cells.append("-" if row["cpu_seconds"] is None else duration(row["cpu_seconds"]))
            cells.append(human(row["peak_memory_bytes"], "B"))
            cells += [share(row["data_wait"]), decimals(row["loss"])] if "loss" in row else ["", ""]
        cells.append(speed_up(ratios).removesuffix(" possible"))
        table.add_row(*map(Text, cells))
        previous = row["name"]
    return table


def _loss_table(comparison: Comparison) -> Table:
    table = Table("stage", title="Time to the same loss", title_justify="left")
    table.caption = (
        f"seconds until the loss was first that low; the loss is the last one of {comparison['runs'][0]['name']}"
    )
    for heading in ("loss", *(run["name"] for run in comparison["runs"])):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for name, found in comparison["to_loss"].items():
        reached = ("not reached" if seconds is None else duration(seconds) for seconds in found["seconds"])
        table.add_row(*map(Text, (name, decimals(found["loss"]), *reached)))
    return table


def _difference_table(comparison: Comparison) -> Table:
    table = Table("key", title="What differs in the recipes", title_justify="left")
    for run in comparison["runs"]:
        table.add_column(Text(run["name"]), overflow="fold")
    for key, values in comparison["differences"].items():
        table.add_row(Text(key), *(Text(_said(value)) for value in values))
    return table


def _score_table(comparison: Comparison, wide: bool) -> Table:
    names = [run["name"] for run in comparison["runs"]]
    few = len(names) <= 3  # else only the page has room
    table = Table(title="Scores, in %", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.caption = "points: difference from the baseline" + (
        ", with its 95% interval; shuffled: with wrong images, in the same order" if few else ""
    )
    table.caption += "; coloured where the interval excludes 0"
    tested = few and any(comparison["tests"].values())
    if tested:
        table.caption += "; p: paired test on the same items, of each task by itself"
    compared = [heading for name in names[1:] for heading in (name, "points", *(["p"] if tested else []))]
    for heading in [*(["items"] if wide else []), "chance", names[0], *compared, *(["shuffled"] if few else [])]:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in score_rows(comparison):
        if row["task"] == "mean":
            table.add_section()
        cells = [Text(row["task"]), *([Text(_said(row["items"]))] if wide else []), Text(percent(row["chance"]))]
        for index, score in enumerate(row["scores"]):
            cells.append(Text(percent(score)))
            if index:
                points = row["points"][index]
                style = ("", "green", "bold red")[row["told"][index]]
                cells.append(Text(signed(points, row["interval"][index] if few else None), style=style))
                cells += [Text(p_value(row["p_value"][index]))] if tested else []
        if few:
            cells.append(Text(" / ".join(percent(value) for value in row["shuffled"]), style="dim"))
        table.add_row(*cells)
    return table


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the comparison as JSON, atomically."""
    write_atomic(path, json.dumps(comparison, indent=2, allow_nan=False) + "\n")
