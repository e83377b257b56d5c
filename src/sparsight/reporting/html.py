"""One self-contained HTML page for a comparison, as `page` makes them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from sparsight.errors import UserError
from sparsight.layouts import Layout
from sparsight.reporting import comparison as figures_of
from sparsight.reporting.comparison import (
    Comparison,
    compare,
    duration,
    human,
    render_table,
    score_rows,
    share,
    signed,
    speed_up,
    times,
    write_comparison,
)
from sparsight.reporting.page import line, marker, plot, write_page
from sparsight.reporting.runlog import Run, StageRun, example_key, number_in, read_runs, running_mean

_POINTS = 1500  # the most points in a curve
_FREE_TEXT = 4  # a truth of that many words or numbers is a description or a box: equality cannot judge it
_WINDOWS = 64  # per side; more are no lines but a grey
_IMAGE = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def write_report(comparison: Comparison, runs: Iterable[Run], path: str | Path, max_examples: int = 24) -> None:
    """Write the page, atomically. `runs` are those compared, in any order: for curves, examples and recipes.

    Raises `UserError` if a run of the comparison is not among `runs`.
    """
    by_name = {run.name: run for run in runs}
    if missing := [entry["name"] for entry in comparison["runs"] if entry["name"] not in by_name]:
        raise UserError(f"write_report needs the runs of the comparison; missing: {missing}")
    ordered = [by_name[entry["name"]] for entry in comparison["runs"]]
    examples = _examples(ordered)
    filters = ("human", "duration", "times", "speed_up", "percent", "signed", "share", "decimals", "p_value")
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
        tested=any(comparison["tests"].values()),
        windows=_windows(ordered),
        examples=examples[:max_examples],
        examples_left_out=max(0, len(examples) - max_examples),
        details=_details(comparison, ordered),
    )


def report(paths: Sequence[str | Path], out: str | Path, console: Console) -> Comparison:
    """Read run logs, compare them, print the tables, and write ``comparison.json`` and ``report.html`` into ``out``.

    The first run is the baseline. Raises what `read_runs` and `compare` raise.
    """
    out, runs = Path(out), read_runs(paths)
    comparison = compare(runs, runs[0].name)
    write_comparison(comparison, out / "comparison.json")
    write_report(comparison, runs, out / "report.html")
    render_table(comparison, console)
    console.print(
        f"Report: [bold]{escape(str(out / 'report.html'))}[/], figures: {escape(str(out / 'comparison.json'))}"
    )
    return comparison


def _cards(comparison: Comparison) -> list[dict[str, str]]:
    """Label, value, note and CSS class of the big figures: four for each run that is not the baseline."""
    base, *others = comparison["runs"]
    rows = score_rows(comparison)
    cards = []
    for index, run in enumerate(others, start=1):
        total, busy = figures_of.trusted(comparison, run["name"]), run["name"] in comparison["busy"]
        mean = next((row for row in rows if row["task"] == "mean" and row["points"][index] is not None), None)
        ours, theirs = (
            " → ".join(count for count, _ in groupby(str(stage["visual_tokens"] or "?") for stage in each["stages"]))
            for each in (run, base)
        )
        saved = f"{duration(run['seconds'])} instead of {duration(base['seconds'])}"
        had, _, possible = speed_up(total).partition(" ")
        flops = f"{human(run['executed_flops'], 'FLOP')} instead of {human(base['executed_flops'], 'FLOP')}"
        for label, value, note, kind in (
            ("Speed-up, by CPU time" if busy else "Speed-up", had, f"{possible}; {saved}", ""),
            ("Executed FLOPs", times(total["executed_flops"]), flops, ""),
            ("Visual tokens an image", ours, f"by stage; {base['name']}: {theirs}", ""),
            ("Score", *_score_card(mean, index)),
        ):
            label = f"{run['name']}: {label}" if len(others) > 1 else label
            cards.append({"label": label, "value": value, "note": note, "kind": kind})
    return cards


def _score_card(mean: Mapping[str, Any] | None, index: int) -> tuple[str, str, str]:
    """Value, note and CSS class, from the mean's row: a difference is coloured only if it can be told."""
    if mean is None:
        return "-", "not comparable", ""
    interval, told = mean["interval"][index], mean["told"][index]
    note = "points, mean of the tasks" if interval is None else f"points ±{interval:.1f}, mean of the tasks"
    kind = ("quiet", "", "bad")[told]
    return signed(mean["points"][index], None), note if told else f"{note}: no difference could be told", kind


def _figures(comparison: Comparison, runs: list[Run]) -> list[dict[str, Any]]:
    """The plots, as {id, data, layout}. Names are escaped because plotly reads tags in its texts."""
    figures = [
        _bars(comparison, "seconds", lambda value: duration(value or 0.0), "seconds"),
        _bars(comparison, "executed_flops", lambda value: human(value, "FLOP"), "executed FLOPs"),
        _bars(comparison, "data_wait", share, "share of the steps' time", {"tickformat": ".0%", "range": [0, 1]}),
        _bars(comparison, "peak_memory_bytes", lambda value: human(value, "B"), "bytes"),
    ]
    for along in ("seconds", "samples"):
        figures.append(_plot(f"loss-{along}", along, "loss", runs, lambda stage: stage.curve.loss, {}))
    zero = {"rangemode": "tozero"}
    figures.append(_plot("tokens", "samples", "visual tokens a sample", runs, _tokens, zero))
    figures.append(_plot("layers", "samples", "layers run", runs, _layers, zero | {"tickformat": ".0%"}))
    return [*figures, _scores(comparison)] if score_rows(comparison) else figures


def _tokens(stage: StageRun) -> list[float | None]:
    """Visual tokens a sample that the language model's layers got, by step."""
    kept = [number_in(step, "visual_tokens_kept") for step in stage.steps]  # older logs do not have it
    seen = [number_in(step, "visual_tokens") for step in stage.steps]
    pairs = zip(kept, seen, stage.steps, strict=True)
    return [_share(seen if kept is None else kept, number_in(step, "samples")) for kept, seen, step in pairs]


def _layers(stage: StageRun) -> list[float | None]:
    """Share of the language model's layers that ran, by step."""
    return [_share(number_in(step, "layers_run"), number_in(step, "layers")) for step in stage.steps]


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _bar(index: int, run: Mapping[str, Any], hover: str, **fields: object) -> dict[str, Any]:
    shown = {"name": html.escape(run["name"]), "marker": marker(index)}
    hover = f"{hover}<extra>%{{fullData.name}}</extra>"
    return {"type": "bar", "orientation": "h", "hovertemplate": hover} | shown | fields


def _bars(
    comparison: Comparison,
    key: str,
    say: Callable[[float | None], str],
    unit: str,
    axis: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Horizontal bars: one group a stage, one bar a run."""
    traces = []
    for index, run in enumerate(comparison["runs"]):
        names, values = [html.escape(stage["name"]) for stage in run["stages"]], [stage[key] for stage in run["stages"]]
        traces.append(_bar(index, run, "%{y}: %{text}", y=names, x=values, text=[say(value) for value in values]))
    horizontal = {"title": {"text": unit}, "tickformat": "~s", "fixedrange": True, **(axis or {})}
    height = 110 + 38 * sum(len(run["stages"]) for run in comparison["runs"])
    vertical = {"autorange": "reversed", "fixedrange": True}
    return plot(f"bars-{key}", traces, horizontal, vertical, height, bargap=0.3, bargroupgap=0.08)


def _plot(
    name: str,
    along: str,
    title: str,
    runs: list[Run],
    values: Callable[[StageRun], list[float | None]],
    axis: Mapping[str, Any],
) -> dict[str, Any]:
    """What steps logged, all stages in a row with a gap between them: as logged (faint), and its running mean.

    Args:
        along: "seconds" or "samples", from the run's start.
        values: of a stage, one a step.
    """
    traces = []
    for index, run in enumerate(runs):
        points = _points(run, along, values)
        of = html.escape(run.name)
        curve: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": of, "legendgroup": str(index)}
        curve["x"] = [x for x, *_ in points]
        hover = f"%{{text}}<br>{title} %{{y:.4~r}} at %{{x:.4~s}} {along}<extra>{of}</extra>"
        faint = {"opacity": 0.28, "line": line(index, width=1), "hoverinfo": "skip"}
        bold = {"line": line(index, width=2.5), "hovertemplate": hover}
        traces.append(curve | faint | {"y": [y for _, y, *_ in points], "showlegend": False})
        traces.append(curve | bold | {"y": [y for *_, y, _ in points], "text": [text for *_, text in points]})
    return plot(name, traces, {"title": {"text": along}, "rangemode": "tozero"}, {"title": {"text": title}, **axis})


def _points(
    run: Run, along: str, values: Callable[[StageRun], list[float | None]]
) -> list[tuple[float | None, float | None, float | None, str]]:
    """(place, value, running mean, what it is) of at most `_POINTS` steps and a few, and a gap behind each stage."""
    points: list[tuple[float | None, float | None, float | None, str]] = []
    start = 0.0
    stride = max(1, -(-sum(len(stage.steps) for stage in run.stages) // _POINTS))
    for stage in run.stages:
        places = getattr(stage.curve, along)
        raw = values(stage)
        last = len(raw) - 1
        for number, (place, value, mean) in enumerate(zip(places, raw, running_mean(raw), strict=True)):
            if number % stride == 0 or value is None or number == last:
                text = html.escape(f"{stage.name}, step {stage.steps[number]['step']}")
                points.append((start + place, value, mean, text))
        points.append((None, None, None, ""))
        start += stage.seconds if along == "seconds" else places[-1] if places else 0.0
    return points


def _scores(comparison: Comparison) -> dict[str, Any]:
    """Bars by task, a line through each group at chance, and one through each bar at its shuffled control."""
    rows = score_rows(comparison)
    count = len(comparison["runs"])
    width = 0.76 / count
    traces = []
    shuffled: list[tuple[float | None, float, float]] = []  # share, centre and half length of a line
    for index, run in enumerate(comparison["runs"]):
        centres = [place + width * (index - (count - 1) / 2) for place in range(len(rows))]
        values = [None if row["scores"][index] is None else 100 * row["scores"][index] for row in rows]
        tasks = [html.escape(row["task"]) for row in rows]
        bar = {"y": centres, "x": values, "width": width * 0.92, "customdata": tasks}
        traces.append(_bar(index, run, "%{customdata}: %{x:.1f}%", **bar))
        for row, centre in zip(rows, centres, strict=True):
            shuffled.append((row["shuffled"][index], centre, width * 0.46))
    chance = [(row["chance"], float(place), 0.44) for place, row in enumerate(rows)]
    traces += [_marks("shuffled images", shuffled, 2.5, "solid"), _marks("chance", chance, 1.5, "2px,2px")]
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [html.escape(row["task"]) for row in rows]}
    vertical = {"range": [len(rows) - 0.4, -0.6], "fixedrange": True, "showgrid": False}
    horizontal = {"title": {"text": "%"}, "range": [0, 102], "fixedrange": True}
    height = 120 + len(rows) * (16 + 18 * count)
    return plot("scores", traces, horizontal, ticks | vertical, height, barmode="overlay")


def _marks(name: str, places: Iterable[tuple[float | None, float, float]], width: float, dash: str) -> dict[str, Any]:
    """Short vertical lines at given shares, as one trace with gaps."""
    x: list[float | None] = []
    y: list[float | None] = []
    for value, centre, reach in places:
        if value is not None:
            x += [100 * value, 100 * value, None]
            y += [centre - reach, centre + reach, None]
    line = {"color": {"$css": "--text"}, "width": width, "dash": dash}
    trace = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line}
    return trace | {"hovertemplate": "%{x:.1f}%<extra>%{fullData.name}</extra>"}


def _examples(runs: list[Run]) -> list[dict[str, Any]]:
    """The examples that any run has, with each run's answer and whether it is right (None: not judged)."""
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in runs:
        for record in run.examples:
            texts = {key: str(record.get(key, "")) for key in ("id", "task", "question", "truth")}
            example = merged.setdefault(example_key(record), texts | {"image": None, "answers": []})
            image = record.get("image_png_base64")
            if isinstance(image, str) and _IMAGE.fullmatch(image):
                example["image"] = image
            text = str(record.get("answer", ""))
            example["answers"].append({"run": run.name, "text": text, "right": _right(record)})
    return list(merged.values())


def _windows(runs: list[Run]) -> dict[int, str]:
    """Windows per side -> which runs cut the images of their last stage like that. Empty if a run pads or crops."""
    found: dict[int, list[str]] = {}
    for run in runs:
        recipe = run.header.get("recipe")
        if isinstance(recipe, dict) and recipe.get("resize") in ("pad", "crop"):
            return {}  # the logged images are not what the encoder sees
        try:
            layout = Layout.parse(str(run.stages[-1].layout)) if run.stages else None
        except ValueError:  # a bridge without windows
            continue
        for scale in layout.scales if layout else ():
            found.setdefault(scale.grid, []).append(f"{run.name} ({scale.queries} each)")
    return {grid: ", ".join(names) for grid, names in sorted(found.items()) if 1 < grid <= _WINDOWS}


def _right(record: Mapping[str, Any]) -> bool | None:
    """The record's own `correct`, else whether answer and truth are alike but for case and punctuation; None: free."""
    if "correct" in record:
        return record["correct"] if isinstance(record["correct"], bool) else None
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
