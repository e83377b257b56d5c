"""One self-contained HTML page for a comparison, as `page` makes them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from sparsight.reporting import comparison as figures_of
from sparsight.reporting.comparison import Comparison, duration, human, score_rows, signed, times
from sparsight.reporting.page import write_page
from sparsight.reporting.runlog import Run, example_key, number_in, step_seconds

_COLOURS = 5  # --run-0 (the baseline) ... --run-4 in the template
_POINTS = 1500  # the most points in a curve
_FREE_TEXT = 4  # a truth of that many words or numbers is a description or a box: equality cannot judge it
_PICTURE = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def write_report(comparison: Comparison, runs: Iterable[Run], path: str | Path, max_examples: int = 24) -> None:
    """Write the page, atomically. `runs` are those compared, in any order: for curves, examples and recipes.

    Raises `ValueError` if a run of the comparison is not among `runs`.
    """
    by_name = {run.name: run for run in runs}
    if missing := [entry["name"] for entry in comparison["runs"] if entry["name"] not in by_name]:
        raise ValueError(f"write_report needs the runs of the comparison; missing: {missing}")
    ordered = [by_name[entry["name"]] for entry in comparison["runs"]]
    examples = _examples(ordered)
    filters = ("human", "duration", "times", "speed_up", "percent", "signed")
    write_page(
        path,
        "report.html.j2",
        _figures(comparison, ordered),
        {name: getattr(figures_of, name) for name in filters},
        comparison=comparison,
        names=[run.name for run in ordered],
        verdict=figures_of.verdict(comparison),
        cards=_cards(comparison),
        stages=figures_of.stage_rows(comparison),
        scores=score_rows(comparison),
        examples=examples[:max_examples],
        examples_left_out=max(0, len(examples) - max_examples),
        details=_details(comparison, ordered),
    )


def _colour(index: int) -> dict[str, str]:
    return {"$css": f"--run-{index if index < _COLOURS else 1 + (index - 1) % (_COLOURS - 1)}"}


def _cards(comparison: Comparison) -> list[dict[str, str]]:
    """Label, value, note and CSS class of the big figures: four for each run that is not the baseline."""
    base, *others = comparison["runs"]
    rows = score_rows(comparison)
    cards = []
    for index, run in enumerate(others, start=1):
        total = comparison["ratios"][run["name"]]["total"]
        points = {row["task"]: row["points"][index] for row in rows if row["points"][index] is not None}
        mean = points.pop("mean", None)
        lower = sum(round(value, 1) < 0 for value in points.values())
        ours, theirs = (
            " → ".join(count for count, _ in groupby(str(stage["visual_tokens"] or "?") for stage in each["stages"]))
            for each in (run, base)
        )
        saved = f"{duration(run['seconds'])} instead of {duration(base['seconds'])}"
        flops = f"{human(run['executed_flops'], 'FLOP')} instead of {human(base['executed_flops'], 'FLOP')}"
        scored = "not comparable" if mean is None else f"points, mean of {len(points)} tasks; lower on {lower}"
        for label, value, note in (
            ("Training time", times(total["seconds"]), saved),
            ("Executed FLOPs", times(total["executed_flops"]), flops),
            ("Visual tokens an image", ours, f"by stage; {base['name']}: {theirs}"),
            ("Score", signed(mean, None), scored),
        ):
            kind = "bad" if label == "Score" and mean is not None and round(mean, 1) < 0 else ""
            label = f"{run['name']}: {label}" if len(others) > 1 else label
            cards.append({"label": label, "value": value, "note": note, "kind": kind})
    return cards


def _figures(comparison: Comparison, runs: list[Run]) -> list[dict[str, Any]]:
    """The plots, as {id, data, layout}. Names are escaped because plotly reads tags in its texts."""
    figures = [
        _bars(comparison, "seconds", duration, "seconds"),
        _bars(comparison, "executed_flops", lambda value: human(value, "FLOP"), "executed FLOPs"),
    ]
    for horizontal in ("seconds", "samples"):
        traces = [trace for index, run in enumerate(runs) for trace in _curve(run, index, horizontal)]
        axes = {axis: {"title": {"text": text}} for axis, text in (("xaxis", horizontal), ("yaxis", "loss"))}
        figures.append({"id": f"loss-{horizontal}", "data": traces, "layout": axes | {"height": 360}})
    return [*figures, _scores(comparison)] if score_rows(comparison) else figures


def _bar(index: int, run: Mapping[str, Any], hover: str, **fields: object) -> dict[str, Any]:
    shown = {"name": html.escape(run["name"]), "marker": {"color": _colour(index)}}
    return (
        {"type": "bar", "orientation": "h", "hovertemplate": f"{hover}<extra>%{{fullData.name}}</extra>"}
        | shown
        | fields
    )


def _bars(comparison: Comparison, key: str, say: Callable[[float], str], unit: str) -> dict[str, Any]:
    """Horizontal bars: one group a stage, one bar a run."""
    traces = []
    for index, run in enumerate(comparison["runs"]):
        names, values = [html.escape(stage["name"]) for stage in run["stages"]], [stage[key] for stage in run["stages"]]
        traces.append(_bar(index, run, "%{y}: %{text}", y=names, x=values, text=[say(value) for value in values]))
    horizontal = {"title": {"text": unit}, "tickformat": "~s", "fixedrange": True}
    axes = {"xaxis": horizontal, "yaxis": {"autorange": "reversed", "fixedrange": True}}
    height = 110 + 38 * sum(len(run["stages"]) for run in comparison["runs"])
    layout = axes | {"bargap": 0.3, "bargroupgap": 0.08, "height": height}
    return {"id": f"bars-{key}", "data": traces, "layout": layout}


def _curve(run: Run, index: int, horizontal: str) -> list[dict[str, Any]]:
    """The loss of all stages in a row, a gap between them: as logged (faint), and its running mean."""
    x: list[float | None] = []
    raw: list[float | None] = []
    smooth: list[float | None] = []
    texts: list[str] = []
    position = 0.0
    stride = -(-sum(len(stage.steps) for stage in run.stages) // _POINTS)
    for stage in run.stages:
        losses = [number_in(step, "loss") for step in stage.steps]
        reach = min(25, len(losses) // 40)
        for number, step in enumerate(stage.steps):
            position += step_seconds(step) if horizontal == "seconds" else number_in(step, "samples") or 0
            if number % stride == 0 or losses[number] is None or number == len(losses) - 1:
                around = losses[max(0, number - reach) : number + reach + 1]
                known = [loss for loss in around if loss is not None]
                x.append(position)
                raw.append(losses[number])
                smooth.append(None if losses[number] is None else fmean(known))
                texts.append(html.escape(f"{stage.name}, step {step['step']}"))
        for values in (x, raw, smooth):
            values.append(None)
        texts.append("")
    colour, name = _colour(index), html.escape(run.name)
    common = {"type": "scatter", "mode": "lines", "name": name, "x": x, "legendgroup": name}
    faint = {"y": raw, "opacity": 0.28, "line": {"color": colour, "width": 1}, "hoverinfo": "skip"}
    hover = f"%{{text}}<br>loss %{{y:.3f}} at %{{x:.4~s}} {horizontal}<extra>{name}</extra>"
    bold = {"y": smooth, "line": {"color": colour, "width": 2.5}, "text": texts, "hovertemplate": hover}
    return [common | faint | {"showlegend": False}, common | bold]


def _scores(comparison: Comparison) -> dict[str, Any]:
    """Bars by task, a line through each group at chance, and one through each bar at its shuffled control."""
    rows = score_rows(comparison)
    count = len(comparison["runs"])
    width = 0.76 / count
    traces = []
    shuffled, chance = _Marks(), _Marks()
    for index, run in enumerate(comparison["runs"]):
        centres = [place + width * (index - (count - 1) / 2) for place in range(len(rows))]
        values = [None if row["scores"][index] is None else 100 * row["scores"][index] for row in rows]
        tasks = [html.escape(row["task"]) for row in rows]
        bar = {"y": centres, "x": values, "width": width * 0.92, "customdata": tasks}
        traces.append(_bar(index, run, "%{customdata}: %{x:.1f}%", **bar))
        for row, centre in zip(rows, centres, strict=True):
            shuffled.add(row["shuffled"][index], centre, width * 0.46)
    for place, row in enumerate(rows):
        chance.add(row["chance"], place, 0.44)
    traces += [shuffled.trace("shuffled pictures", 2.5, "solid"), chance.trace("chance", 1.5, "2px,2px")]
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [html.escape(row["task"]) for row in rows]}
    vertical = {"range": [len(rows) - 0.4, -0.6], "fixedrange": True, "showgrid": False}
    horizontal = {"title": {"text": "%"}, "range": [0, 102], "fixedrange": True}
    layout = {"xaxis": horizontal, "yaxis": ticks | vertical, "barmode": "overlay"}
    return {"id": "scores", "data": traces, "layout": layout | {"height": 120 + len(rows) * (16 + 18 * count)}}


class _Marks:
    """Short vertical lines at given values, as one trace with gaps."""

    def __init__(self) -> None:
        self.x: list[float | None] = []
        self.y: list[float | None] = []

    def add(self, value: float | None, centre: float, reach: float) -> None:
        if value is not None:
            self.x += [100 * value, 100 * value, None]
            self.y += [centre - reach, centre + reach, None]

    def trace(self, name: str, width: float, dash: str) -> dict[str, Any]:
        line = {"color": {"$css": "--text"}, "width": width, "dash": dash}
        hover = "%{x:.1f}%<extra>%{fullData.name}</extra>"
        return {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": self.x,
            "y": self.y,
            "line": line,
            "hovertemplate": hover,
        }


def _examples(runs: list[Run]) -> list[dict[str, Any]]:
    """The examples that any run has, with each run's answer and whether it is right (None: not judged)."""
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in runs:
        for record in run.examples:
            texts = {key: str(record.get(key, "")) for key in ("id", "task", "question", "truth")}
            example = merged.setdefault(example_key(record), texts | {"picture": None, "answers": []})
            picture = record.get("image_png_base64")
            if isinstance(picture, str) and _PICTURE.fullmatch(picture):
                example["picture"] = picture
            text = str(record.get("answer", ""))
            example["answers"].append({"run": run.name, "text": text, "right": _right(record)})
    return list(merged.values())


def _right(record: Mapping[str, Any]) -> bool | None:
    """The record's own `correct`, else whether the answer is the truth, up to case and punctuation."""
    if isinstance(record.get("correct"), bool):
        return bool(record["correct"])
    answer, truth = (re.findall(r"\w+", str(record.get(key, "")).casefold()) for key in ("answer", "truth"))
    return True if answer == truth else None if len(truth) >= _FREE_TEXT else False


def _details(comparison: Comparison, runs: list[Run]) -> list[tuple[str, str]]:
    """Title and text of the blocks that are folded away."""
    blocks = [(f"Environment of {runs[0].name}", json.dumps(comparison["env"], indent=2))]
    for run in runs:
        keys = ("name", "bridge", "layout", "visual_tokens", "image_size", "samples", "finished")
        stages = [{key: getattr(stage, key) for key in keys} for stage in run.stages]
        text = json.dumps([stages, run.header.get("recipe")], indent=2)
        blocks.append((f"Stages and recipe of {run.name}", text))
    return blocks
