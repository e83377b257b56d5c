"""Compare runs by their logs, against one of them, the baseline. Imports no torch.

Ratios are run / baseline: below 1 is cheaper. The ratio of executed FLOPs is the ratio of seconds that a perfect
machine would reach, so a speed-up stands next to the one possible; an unfinished stage has no ratio. Losses are running
means (`Curve`). Scores are fractions of 1; differences are in points (hundredths), with the half width of their 95%
interval: of a paired bootstrap where both logs hold the points of the same items, else that which the number of items
leaves. A difference is coloured only where its interval excludes zero; the verdict names the tasks that Holm's
correction leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import copysign, erfc
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sparsight.errors import UserError
from sparsight.evaluation.significance import by_grade, holm, paired_test
from sparsight.reporting.runlog import Run, StageRun, step_seconds, total
from sparsight.reporting.tables import COSTS, said, speed_up, times, write_atomic

Comparison = dict[str, Any]
_LEVEL = 0.05  # a difference that chance alone makes less often is called one
_ITEMS = 20  # fewer tell nothing, where no items are paired
_BUSY = 1.25  # clock and CPU time that differ by this factor from run to run: something else was running
_BEYOND = 0.75  # of the ratio of FLOPs: a ratio of seconds below that is hard to believe


def compare(runs: list[Run], baseline: str | None = None) -> Comparison:
    """Figures of all runs, the baseline first, as plain JSON values.

    The baseline is the run of that name; without one, "standard" if there is such a run, else the first. Raises
    `UserError` for no runs, an unknown baseline, two runs of one name, a stage named "total" or "score", or a
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
    base, *others = ordered = sorted(runs, key=lambda run: run.name != baseline)
    entries = [_entry(run) for run in ordered]
    ratios = {entry["name"]: _ratios(entry, entries[0]) for entry in entries[1:]}
    for run in others:
        if not (run.trained and base.trained):  # a stage that has not begun is not among its stages
            ratios[run.name]["total"] = dict.fromkeys(COSTS)
    busy = {run.name: found for run in others if (found := _busy(run, base, ratios[run.name]["total"]))}
    common = [task for task in base.scores if all(task in run.scores for run in runs)]
    return {
        "runs": entries,
        "chance": {task: value for run in (*others, base) for task, value in run.chance.items()},
        "items": {task: count for run in (*others, base) for task, count in run.items.items()},
        "ratios": ratios,
        "busy": busy,
        "tests": {run.name: _tests(run, base, common) for run in others},
        "by_grade": _by_grade(ordered),
        "to_loss": _to_loss(ordered),
        "differences": _differences(ordered),
        "warnings": [text for run in ordered for text in _own_warnings(run)]
        + [text for run in others for text in _pair_warnings(run, base)]
        + list(_too_fast({name: own for name, own in ratios.items() if name not in busy})),
        "env": base.environment,
    }


def _entry(run: Run) -> dict[str, Any]:
    stages = [_stage_entry(stage) for stage in run.stages]
    return {
        "name": run.name,
        "stages": stages,
        "scores": run.scores,
        "shuffled": run.shuffled,
        "during": list(_during(run)),
        "seconds": sum(stage.seconds for stage in run.stages),
        "executed_flops": sum(stage.executed_flops for stage in run.stages),
        "cpu_seconds": total([each["cpu_seconds"] for each in stages]),
        "peak_memory_bytes": max((each["peak_memory_bytes"] or 0 for each in stages), default=0) or None,
    }


def _stage_entry(stage: StageRun) -> dict[str, Any]:
    costs = ("seconds", "encoding_seconds", "executed_flops", "data_wait", "cpu_seconds")
    keys = ("name", *costs, "visual_tokens", "samples", "bridge", "layout", "finished")
    peak, loss = stage.highest("memory_bytes"), stage.curve.final
    return {key: getattr(stage, key) for key in keys} | {"peak_memory_bytes": peak, "loss": loss}


def _during(run: Run) -> Iterator[dict[str, Any]]:
    """Scores of a subset during training, with the samples that the run had seen by then."""
    before = 0.0
    for stage in run.stages:
        seen = {step["step"]: before + own for step, own in zip(stage.steps, stage.curve.samples, strict=True)}
        for each in stage.scored:
            mean, items = fmean(each["scores"].values()), sum(each.get("items", {}).values())
            about = {"stage": stage.name, "step": each["step"], "samples": seen.get(each["step"]), "items": items}
            yield about | {"mean": mean, "scores": each["scores"]}
        before += stage.samples


def _busy(run: Run, base: Run, costs: Mapping[str, float | None]) -> dict[str, float] | None:
    """Ratios of the steps' seconds by the clock and of their CPU seconds, where these disagree; not on a GPU."""
    if None in costs.values() or any((each.environment.get("hardware") or {}).get("gpus") for each in (run, base)):
        return None
    cpu = [total([stage.cpu_seconds for stage in each.stages]) for each in (run, base)]
    clock = [sum(step_seconds(step) for stage in each.stages for step in stage.steps) for each in (run, base)]
    if not all(cpu) or not all(clock):
        return None
    found = {"clock": clock[0] / clock[1], "cpu": cpu[0] / cpu[1]}  # type: ignore[operator]
    return None if 1 / _BUSY <= found["clock"] / found["cpu"] <= _BUSY else found


def trusted(comparison: Comparison, name: str) -> dict[str, float | None]:
    """Ratios of a run's costs in all; ``seconds`` are CPU seconds where the clock tells of other work."""
    costs: dict[str, float | None] = comparison["ratios"][name]["total"]
    busy = comparison["busy"].get(name)
    return costs | ({"seconds": busy["cpu"]} if busy else {})


def _to_loss(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """For each stage the baseline's last loss, and after how many seconds and samples each run first had it.

    `seconds` and `samples` hold one value a run, the baseline first; None where it was not reached.
    """
    found = {}
    for stage in runs[0].stages:
        curves = [next((own.curve for own in run.stages if own.name == stage.name), None) for run in runs]
        if (loss := stage.curve.final) is not None:
            reached = [curve and curve.reaches(loss) for curve in curves]
            seconds, samples = ([each and each[index] for each in reached] for index in range(2))
            found[stage.name] = {"loss": loss, "seconds": seconds, "samples": samples}
    return found


def _differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Keys of the recipes, dotted, that are not alike in all runs: one value a run, the baseline first."""
    recipes = [dict(_flat("", run.recipe)) for run in runs]
    keys = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if key != "name"]
    parts = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    keys.sort(key=lambda key: parts.index(key.rpartition(".")[0]))  # keys of a later run alone stand with the rest
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
        name: {cost: _ratio(ours[cost], theirs[cost]) if _whole(ours) and _whole(theirs) else None for cost in COSTS}
        for name, ours, theirs in (*pairs, ("total", entry, base))
    }
    common = entry["scores"].keys() & base["scores"].keys()
    means = [fmean(each["scores"][task] for task in common) if common else None for each in (entry, base)]
    return ratios | {"score": _ratio(*means)}


def _tests(run: Run, base: Run, common: list[str]) -> dict[str, dict[str, Any]]:
    """Paired tests by task, where both runs have points of the same items; "mean" if so for all tasks in common.

    `difference` and `interval` (95%) are in points, run minus baseline. Images are resampled whole.
    """
    same = [task for task, own in run.points.items() if task in base.points and own[1:3] == base.points[task][1:3]]
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


def _by_grade(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows as of `score_rows`, but by grade, of the tasks of which all runs have points of the same items."""
    base = runs[0].points
    same = [each for each in base if all(each in r.points and r.points[each][1:3] == base[each][1:3] for r in runs)]
    parts = [{task: getattr(base[task], key) for task in same} for key in ("images", "grades")]
    points = [{task: run.points[task].scores for task in same} for run in runs]
    scores = [by_grade(own, *parts) for own in points]
    gaps = [by_grade({task: np.subtract(own[task], points[0][task]) for task in same}, *parts) for own in points]
    return [
        {
            "task": f"{own[0].grade}: {own[0].group}",
            **{"items": own[0].items, "chance": None, "shuffled": [None], "p_value": [None] * len(runs)},
            "scores": [each.score.mean for each in own],
            "points": [100 * each.score.mean for each in gap],
            "interval": [50 * (each.score.high - each.score.low) for each in gap],
            "told": [(each.score.low > 0) - (each.score.high < 0) for each in gap],
        }
        for own, gap in zip(zip(*scores, strict=True), zip(*gaps, strict=True), strict=True)
    ]


def _whole(entry: dict[str, Any]) -> bool:
    """Whether a stage is finished, or a run has stages and all are."""
    stages = entry.get("stages", [entry])
    return bool(stages) and all(stage["finished"] for stage in stages)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if base and value is not None else None


def _own_warnings(run: Run) -> Iterator[str]:
    yield from (f"{run.name}: {problem}" for problem in run.problems)
    yield from (f"{run.name}: stage {stage.name} is not finished" for stage in run.stages if not stage.finished)
    if not run.stages:
        yield f"{run.name}: has no stages"
    if not run.scores:
        yield f"{run.name}: has not been evaluated"
    if run.environment.get("dirty"):
        yield f"{run.name}: its code had changes that are not committed"


def _pair_warnings(run: Run, base: Run) -> Iterator[str]:
    """All that makes it unfair to compare `run` with `base`."""

    def seen(each: Run, other: Run) -> dict[str, Any]:
        environment = each.environment
        return {
            "samples hash": each.header.get("samples_hash"),
            "precision": dict(_flat("", each.recipe)).get("precision"),
            "commit": environment.get("commit"),
            "": (environment.get("versions") or {}) | (environment.get("hardware") or {}),
            "platform": environment.get("platform"),
            "samples in stage": {stage.name: stage.samples for stage in each.stages},
            "task": dict.fromkeys(each.scores, "scored"),
            "items of task": each.items,
            "chance of task": each.chance,
            "questions of task": {task: own.questions for task, own in each.points.items() if task in other.points},
        }

    def differences(key: str, ours: object, theirs: object) -> Iterator[str]:
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            for inner in dict.fromkeys([*theirs, *ours]):
                yield from differences(f"{key} {inner}".strip(), ours.get(inner), theirs.get(inner))
        elif ours != theirs:
            yield f"{run.name}: {key} is {_said(ours)}, but {_said(theirs)} in {base.name}"

    yield from differences("", seen(run, base), seen(base, run))


def _too_fast(ratios: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Stages that saved much more time than work: then something else took the baseline's time, or the run's FLOPs."""
    for name, stages in ratios.items():
        for stage, costs in stages.items():
            if stage in ("total", "score") or None in costs.values():
                continue
            if costs["seconds"] < _BEYOND * costs["executed_flops"]:
                yield (
                    f"{name}: speed-up of stage {stage} is {speed_up(costs)}: more than the work that was saved. Was "
                    "the machine busy with something else?"
                )


def _said(value: object) -> str:
    return said(value, otherwise="missing")


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
        scores, shuffled = ([run[key].get(task) for run in runs] for key in ("scores", "shuffled"))
        count = items.get(task)
        spread = [None if p is None or not count else _variance(p, count) for p in scores]
        row = {"task": task, "items": count, "chance": chance.get(task), "scores": scores, "shuffled": shuffled}
        rows.append(row | {"variance": spread})
    if common := [row for row in rows if None not in row["scores"]]:
        mean: dict[str, Any] = {"task": "mean", "items": sum(row["items"] or 0 for row in common) or None}
        mean["chance"] = _mean([row["chance"] for row in common])
        for key in ("scores", "shuffled", "variance"):
            mean[key] = [_mean([row[key][index] for row in common]) for index in range(len(runs))]
        mean["variance"] = [None if each is None else each / len(common) for each in mean["variance"]]
        rows.append(mean)
    for row in rows:  # the mean last
        spread, base = row.pop("variance"), row["scores"][0]
        row["points"] = [None if None in (score, base) else 100 * (score - base) for score in row["scores"]]
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
    return None if None in values else fmean(values)  # type: ignore[arg-type]


def verdict(comparison: Comparison) -> str:
    """The figures in words, good and bad: one sentence for each run that is not the baseline."""
    runs, rows = comparison["runs"], score_rows(comparison)
    texts = []
    for index, run in enumerate(runs[1:], start=1):
        costs, busy = trusted(comparison, run["name"]), comparison["busy"].get(run["name"])
        text = (
            f"{run['name']} took {times(costs['seconds'])} of the {'CPU ' if busy else ''}time of {runs[0]['name']}: "
        )
        text += f"speed-up {speed_up(costs)}; "
        if busy:
            text = (
                f"The machine had other work while one of {run['name']} and {runs[0]['name']} trained: the clock gives "
                f"{times(busy['clock'])}, the process's own CPU time {times(busy['cpu'])}, which is taken here. {text}"
            )
        texts.append(text + _scored(rows, index))
    if count := len(comparison["warnings"]):
        texts.append(f"{count} warning{'s' if count > 1 else ''}: the comparison may not be fair")
    return ". ".join(texts or ["one run: nothing to compare it with"]) + "."


def _scored(rows: list[dict[str, Any]], index: int) -> str:
    """The scores of a run beside the baseline's, and the differences that can be told."""
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


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the comparison as JSON, atomically."""
    write_atomic(path, json.dumps(comparison, indent=2, allow_nan=False) + "\n")
