"""A comparison in the terminal and as a page, from the same tables."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from sparsight.errors import UserError
from sparsight.layouts import Layout
from sparsight.reporting.comparison import Comparison, compare, score_rows, trusted, verdict, write_comparison
from sparsight.reporting.page import examples, folded, line, marker, plot, plots, section, shown_table, write_page
from sparsight.reporting.runlog import Number, Run, StageRun, example_key, read_runs, running_mean
from sparsight.reporting.tables import (
    COSTS,
    Cell,
    Column,
    Table,
    decimals,
    duration,
    human,
    percent,
    said,
    share,
    speed_up,
    times,
)

_POINTS = 1500  # the most points in a curve
_FREE_TEXT = 4  # a truth of that many words or numbers is a description or a box: equality cannot judge it
_WINDOWS = 64  # per side; more are no lines but a grey
_IMAGE = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_LOSSES = "The same losses against the time spent and against the samples seen. Bold: running mean; faint: every step."
_COST = (
    "The speed-up stands next to the one that the executed FLOPs allow: the gap is time that did not shrink with the "
    "work. Memory is that of the GPU, or on a CPU of the process, less its memory at the start. CPU: the "
    "process's own seconds."
)
_SCORES = (
    "In %. Shuffled: the same questions with other images, so no image helped there. Points: difference "
    "from {base}; ± is the 95% interval that the number of items leaves; seeds would add to it. Coloured where the "
    "interval excludes 0. {tested}The first sentence names only tasks whose difference remains after Holm's correction."
)
_DURING = "Few questions, and of scenes the validation split's: to watch, not to report."
_GRADES = (
    "Points: difference from {base}, with its 95% interval. Steps: to the answer. Size: of the smallest thing asked "
    "about, in % of the side. Clutter: what else is there, and 1 for noise. Of many groups some differ by chance."
)
_TESTED = "p: paired permutation test on the same items, whole images changing sides; of each task by itself. "


def report(paths: Sequence[str | Path], out: str | Path, console: Console) -> Comparison:
    """Read run logs, compare them, print the tables, and write ``comparison.json`` and ``report.html`` into ``out``.

    The first run is the baseline. Raises as `read_runs` and `compare` do.
    """
    out, runs = Path(out), read_runs(paths)
    comparison = compare(runs, runs[0].name)
    write_comparison(comparison, out / "comparison.json")
    write_report(comparison, runs, out / "report.html")
    render_table(comparison, console)
    page, figures = (escape(str(out / name)) for name in ("report.html", "comparison.json"))
    console.print(f"Report: [bold]{page}[/], figures: {figures}")
    return comparison


def render_table(comparison: Comparison, console: Console) -> None:
    """Print cost by stage, time to the baseline's loss, scores by task, what differs, the verdict, and the warnings."""
    shown = [cost_table(comparison)]
    if len(comparison["runs"]) > 1:
        shown.append(loss_table(comparison))
    if any(run["during"] for run in comparison["runs"]):
        shown.append(during_table(comparison))
    if any(run["scores"] for run in comparison["runs"]):
        shown.append(score_table(comparison))
    if comparison["by_grade"]:
        shown.append(grade_table(comparison))
    if comparison["differences"]:
        shown.append(difference_table(comparison))
    for each in shown:
        console.print(each)
    console.print(Text(verdict(comparison), style="bold"))
    for text in comparison["warnings"]:
        console.print(Text(f"! {text}", style="yellow"))


def cost_table(comparison: Comparison) -> Table:
    """Figures of each stage and run, then each run's total."""
    runs, ratios = comparison["runs"], comparison["ratios"]
    names = dict.fromkeys(stage["name"] for run in runs for stage in run["stages"])
    entries = [(name, run, stage) for name in names for run in runs for stage in run["stages"] if stage["name"] == name]
    entries += [("total", run, run) for run in runs]
    rows: list[list[str | Cell]] = []
    sections, previous = set(), None
    for name, run, costs in entries:
        own = ratios.get(run["name"], {}).get(name)
        had, _, possible = speed_up(own).removesuffix(" possible").partition(" ")
        if name != previous and rows:
            sections.add(len(rows))
        rows.append(
            [
                "" if name == previous else name,
                Cell(run["name"], kind="run"),
                said(costs.get("visual_tokens"), otherwise=""),
                Cell(costs.get("layout") or "", kind="quiet"),
                said(costs.get("samples"), "g", otherwise=""),
                duration(costs["seconds"]),
                human(costs["executed_flops"], "FLOP"),
                *(times(own[cost]) if own else "" for cost in COSTS),
                "-" if costs["cpu_seconds"] is None else duration(costs["cpu_seconds"]),
                human(costs["peak_memory_bytes"], "B"),
                share(costs["data_wait"]) if "data_wait" in costs else "",
                decimals(costs["loss"]) if "loss" in costs else "",
                Cell(had, possible),
            ]
        )
        previous = name
    columns = [
        Column("stage", left=True),
        Column("run", left=True),
        Column("tokens"),
        Column("layout", left=True, wide=True),
    ]
    columns += [Column("samples", wide=True), Column("time"), Column("FLOPs")]
    columns += [Column(head, wide=True) for head in ("x time", "x FLOPs", "CPU", "memory", "data wait", "loss")]
    hint = f"speed-up: over {runs[0]['name']}, of what executed FLOPs allow"
    for name, own in ((each["name"], each["encoding_seconds"]) for each in runs[0]["stages"]):
        if own:
            hint += f"; {duration(own)} of {name} are for encoding images: done once by a command, counted in each run"
    return Table([*columns, Column("speed-up")], rows, "Training cost", hint, sections)


def loss_table(comparison: Comparison) -> Table:
    """Seconds until each run had the baseline's last loss, by stage."""
    runs = comparison["runs"]
    rows: list[list[str | Cell]] = []
    for name, found in comparison["to_loss"].items():
        pairs = zip(found["seconds"], found["samples"], strict=True)
        reached = ("not reached" if s is None else Cell(duration(s), f"{n:.0f} samples") for s, n in pairs)
        rows.append([name, decimals(found["loss"]), *reached])
    columns = [Column("stage", left=True), Column("loss"), *(Column(run["name"], run=True) for run in runs)]
    hint = f"time until the loss was first that low; the loss is the last one of {runs[0]['name']}"
    return Table(columns, rows, "Time to the same loss", hint)


def during_table(comparison: Comparison) -> Table:
    """Scores of a subset during training, by run and step."""
    scored = [(run["name"], each) for run in comparison["runs"] for each in run["during"]]
    tasks = list(dict.fromkeys(task for _, each in scored for task in each["scores"]))
    columns = [Column("run", left=True), Column("stage", left=True), *map(Column, ("step", "samples", "items", "mean"))]
    rows: list[list[str | Cell]] = []
    for name, each in scored:
        figures = [str(each["step"]), said(each["samples"], ".0f"), str(each["items"]), percent(each["mean"])]
        own = (percent(each["scores"].get(task)) for task in tasks)
        rows.append([Cell(name, kind="run"), each["stage"], *figures, *own])
    columns += [Column(task, wide=True) for task in tasks]
    return Table(columns, rows, "Scores of a subset during training, in %", _DURING)


def difference_table(comparison: Comparison) -> Table:
    """Keys of the recipes that are not alike."""
    columns = [Column("key", left=True), *(Column(run["name"], left=True, run=True) for run in comparison["runs"])]
    rows = [[key, *(said(value, otherwise="") for value in own)] for key, own in comparison["differences"].items()]
    return Table(columns, rows, "What differs in the recipes")


def grade_table(comparison: Comparison) -> Table:
    """Scores by grade; beside each run's own its difference from the baseline."""
    of = score_table(comparison, comparison["by_grade"])
    kept = [n for n, column in enumerate(of.columns) if column.run or column.head not in ("chance", "p", "shuffled")]
    rows = [[row[n] for n in kept] for row in of.rows]
    columns = [Column("grade", left=True), *(of.columns[n] for n in kept[1:])]
    return Table(columns, rows, "Scores by grade, in %", of.hint.partition(";")[0])


def score_table(comparison: Comparison, rows: Sequence[Mapping[str, Any]] = ()) -> Table:
    """Scores by task; beside each run's own its difference from the baseline, and the paired test's p."""
    runs, rows = comparison["runs"], rows or score_rows(comparison)
    few = len(runs) <= 3  # more get no room
    tested = few and any(comparison["tests"].values())
    columns, cells = [Column("task", left=True), Column("items", wide=True), Column("chance")], []
    for number, run in enumerate(runs):
        columns.append(Column(run["name"], run=True))
        columns += [Column("points"), *([Column("p")] if tested else [])] if number else []
    columns += [Column("shuffled", wide=not few)]
    for row in rows:
        own: list[str | Cell] = [row["task"], said(row["items"], otherwise=""), Cell(percent(row["chance"]))]
        for number, score in enumerate(row["scores"]):
            own.append(percent(score))
            if number:
                interval = row["interval"][number] if few else None
                note = "" if interval is None or row["points"][number] is None else f"±{interval:.1f}"
                kind = ("quiet", "good", "bad")[row["told"][number]]
                own.append(Cell(said(row["points"][number], "+z.1f"), note, kind))
                p = row["p_value"][number]
                own += [Cell("<0.001" if p is not None and p < 0.001 else decimals(p), kind="quiet")] if tested else []
        cells.append([*own, Cell(" / ".join(percent(value) for value in row["shuffled"]), kind="quiet")])
    hint = "points: difference from the baseline" + (", with its 95% interval" if few else "")
    hint += "; shuffled: with wrong images, in the same order; coloured where the interval excludes 0"
    hint += "; p: paired test on the same items, of each task by itself" if tested else ""
    last = {len(rows) - 1} if rows and rows[-1]["task"] == "mean" else set()
    return Table(columns, cells, "Scores, in %", hint, last)


def write_report(comparison: Comparison, runs: Iterable[Run], path: str | Path, max_examples: int = 24) -> None:
    """Write the page, atomically. `runs` are those compared, in any order: for curves, examples and recipes.

    Raises `UserError` if a run of the comparison is not among `runs`.
    """
    by_name = {run.name: run for run in runs}
    names = [entry["name"] for entry in comparison["runs"]]
    if missing := [name for name in names if name not in by_name]:
        raise UserError(f"write_report needs the runs of the comparison; missing: {missing}")
    ordered = [by_name[name] for name in names]
    base, *others = names
    losses = loss_table(comparison)
    sections = [
        section("Cost of each stage", _COST, _cost_plots(comparison), shown_table(cost_table(comparison))),
        section("Loss", _LOSSES, _loss_plots(ordered), shown_table(losses) if losses.rows and others else None),
        section(
            "Tokens and layers",
            "As the language model computed them, by step. Bold: running mean.",
            _work_plots(ordered),
        ),
    ]
    if any(run["during"] for run in comparison["runs"]):
        curves = plots(("Mean of the tasks", _during_plot(comparison)), beside=during_table(comparison))
        sections.append(section("Scores during training", _DURING, curves))
    if rows := score_rows(comparison):
        hint = _SCORES.format(base=base, tested=_TESTED if any(comparison["tests"].values()) else "")
        sections.append(
            section("Scores", hint, plots(("", _score_plot(comparison, rows)), beside=score_table(comparison)))
        )
    if others and comparison["by_grade"]:
        figure = plots(("", _grade_plot(comparison)), beside=grade_table(comparison))
        sections.append(section("Scores by content and depth", _GRADES.format(base=base), figure))
    if found := _examples(ordered):
        hint = "✓ is right, ✗ is wrong; free text, and a caption that is right in part, is not judged."
        if len(found) > max_examples:
            hint += f" {len(found) - max_examples} more are in the run logs."
        sections.append(section("Examples", hint, examples(found[:max_examples], _windows(ordered))))
    differences = difference_table(comparison)
    blocks = [shown_table(differences, foldable=True) if differences.rows else None]
    blocks += [folded(f"Environment of {base}", json.dumps(comparison["env"], indent=2))]
    blocks += [folded(f"Recipe of {run.name}", json.dumps(run.recipe, indent=2)) for run in ordered]
    sections.append(section("How it was run", "Everything needed to check or repeat it.", *blocks))
    heading = (", ".join(others) or base, f"against {base}" if others else "")
    extras: dict[str, Any] = {"warnings": comparison["warnings"], "cards": _cards(comparison, rows), "runs": names}
    write_page(path, "comparison of runs", heading, verdict(comparison), sections, **extras)


def _cards(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The big figures: four for each run that is not the baseline."""
    base, *others = comparison["runs"]
    cards = []
    for index, run in enumerate(others, start=1):
        costs, busy = trusted(comparison, run["name"]), run["name"] in comparison["busy"]
        mean = next((row for row in rows if row["task"] == "mean" and row["points"][index] is not None), None)
        ours, theirs = (
            " → ".join(
                count for count, _ in groupby(said(stage["visual_tokens"], otherwise="?") for stage in each["stages"])
            )
            for each in (run, base)
        )
        had, _, possible = speed_up(costs).partition(" ")
        seconds = f"{possible}; {duration(run['seconds'])} instead of {duration(base['seconds'])}"
        flops = f"{human(run['executed_flops'], 'FLOP')} instead of {human(base['executed_flops'], 'FLOP')}"
        for label, value, note, kind in (
            ("Speed-up, by CPU time" if busy else "Speed-up", had, seconds, ""),
            ("Executed FLOPs", times(costs["executed_flops"]), flops, ""),
            ("Visual tokens an image", ours, f"by stage; {base['name']}: {theirs}", ""),
            ("Score", *_score_card(mean, index)),
        ):
            label = f"{run['name']}: {label}" if len(others) > 1 else label
            cards.append({"label": label, "value": value, "note": note, "kind": kind})
    return cards


def _score_card(mean: Mapping[str, Any] | None, index: int) -> tuple[str, str, str]:
    """Value, note and kind, from the mean's row: a difference is coloured only if it can be told."""
    if mean is None:
        return "-", "not comparable", ""
    interval, told = mean["interval"][index], mean["told"][index]
    note = f"points{'' if interval is None else f' ±{interval:.1f}'}, mean of the tasks"
    note += "" if told else ": no difference could be told"
    return f"{mean['points'][index]:+z.1f}", note, ("quiet", "", "bad")[told]


def _cost_plots(comparison: Comparison) -> dict[str, Any]:
    waited = {"tickformat": ".0%", "range": [0, 1]}
    return plots(
        ("Time", _bars(comparison, "seconds", lambda value: duration(value or 0.0), "seconds")),
        ("Executed FLOPs", _bars(comparison, "executed_flops", lambda value: human(value, "FLOP"), "executed FLOPs")),
        ("Share of time waiting for data", _bars(comparison, "data_wait", share, "share of the steps' time", waited)),
        ("Peak memory", _bars(comparison, "peak_memory_bytes", lambda value: human(value, "B"), "bytes")),
    )


def _loss_plots(runs: list[Run]) -> dict[str, Any]:
    return plots(
        *(
            (f"Against {x}", _curves(f"loss-{x}", x, "loss", runs, lambda s: s.curve.loss, {}))
            for x in ("seconds", "samples")
        )
    )


def _during_plot(comparison: Comparison) -> dict[str, Any]:
    """Mean score of the subset against the samples seen, a curve a run."""
    traces = []
    for index, run in enumerate(comparison["runs"]):
        drawn = {"type": "scatter", "mode": "lines+markers", "name": html.escape(run["name"]), "line": line(index)}
        drawn |= {"x": [each["samples"] for each in run["during"]], "y": [100 * each["mean"] for each in run["during"]]}
        texts = [html.escape(f"{each['stage']}, step {each['step']}") for each in run["during"]]
        hover = "%{text}: %{y:.1f}%<extra>%{fullData.name}</extra>"
        traces.append(drawn | {"text": texts, "hovertemplate": hover})
    up = {"title": {"text": "%"}, "rangemode": "tozero"}
    return plot("during", traces, {"title": {"text": "samples"}, "rangemode": "tozero"}, up)


def _work_plots(runs: list[Run]) -> dict[str, Any]:
    def tokens(stage: StageRun) -> list[Number]:  # older logs have no visual_tokens_kept
        return [
            _part(step.get("visual_tokens_kept", step.get("visual_tokens")), step.get("samples"))
            for step in stage.steps
        ]

    def layers(stage: StageRun) -> list[Number]:
        return [_part(step.get("layers_run"), step.get("layers")) for step in stage.steps]

    zero = {"rangemode": "tozero"}
    return plots(
        ("Visual tokens a sample", _curves("tokens", "samples", "visual tokens a sample", runs, tokens, zero)),
        ("Active layers", _curves("layers", "samples", "active layers", runs, layers, zero | {"tickformat": ".0%"})),
    )


def _part(part: Number, whole: Number) -> Number:
    return part / whole if part is not None and whole else None


def _bar(index: int, run: Mapping[str, Any], hover: str, **fields: object) -> dict[str, Any]:
    """A trace of horizontal bars. Names are escaped because plotly reads tags in its texts."""
    hover = f"{hover}<extra>%{{fullData.name}}</extra>"
    shown = {"name": html.escape(run["name"]), "marker": marker(index), "hovertemplate": hover}
    return {"type": "bar", "orientation": "h"} | shown | fields


def _bars(
    comparison: Comparison, key: str, say: Callable[[Number], str], unit: str, axis: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One group of bars a stage, one bar a run."""
    traces = []
    for index, run in enumerate(comparison["runs"]):
        names, values = [html.escape(stage["name"]) for stage in run["stages"]], [stage[key] for stage in run["stages"]]
        traces.append(_bar(index, run, "%{y}: %{text}", y=names, x=values, text=[say(value) for value in values]))
    across = {"title": {"text": unit}, "tickformat": "~s", "fixedrange": True, **(axis or {})}
    height = 110 + 38 * sum(len(run["stages"]) for run in comparison["runs"])
    up = {"autorange": "reversed", "fixedrange": True}
    return plot(f"bars-{key}", traces, across, up, height, bargap=0.3, bargroupgap=0.08)


def _curves(
    name: str,
    along: str,
    title: str,
    runs: list[Run],
    values: Callable[[StageRun], list[Number]],
    axis: Mapping[str, Any],
) -> dict[str, Any]:
    """Values of steps, all stages in a row with a gap between them: as logged (faint), and their running mean.

    Args:
        along: "seconds" or "samples", from the run's start.
        values: of a stage, one a step.
    """
    traces = []
    for index, run in enumerate(runs):
        points, of = _points(run, along, values), html.escape(run.name)
        curve: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": of, "legendgroup": str(index)}
        curve["x"] = [x for x, *_ in points]
        hover = f"%{{text}}<br>{title} %{{y:.4~r}} at %{{x:.4~s}} {along}<extra>{of}</extra>"
        faint = {"opacity": 0.28, "line": line(index, width=1), "hoverinfo": "skip"}
        bold = {"line": line(index, width=2.5), "hovertemplate": hover}
        traces.append(curve | faint | {"y": [y for _, y, *_ in points], "showlegend": False})
        traces.append(curve | bold | {"y": [y for *_, y, _ in points], "text": [text for *_, text in points]})
    return plot(name, traces, {"title": {"text": along}, "rangemode": "tozero"}, {"title": {"text": title}, **axis})


def _points(
    run: Run, along: str, values: Callable[[StageRun], list[Number]]
) -> list[tuple[Number, Number, Number, str]]:
    """(x, value, running mean, label) of at most `_POINTS` steps and a few, and a gap behind each stage."""
    points: list[tuple[Number, Number, Number, str]] = []
    start, stride = 0.0, max(1, -(-sum(len(stage.steps) for stage in run.stages) // _POINTS))
    for stage in run.stages:
        xs, raw = getattr(stage.curve, along), values(stage)
        for number, (x, value, mean) in enumerate(zip(xs, raw, running_mean(raw), strict=True)):
            if number % stride == 0 or value is None or number == len(raw) - 1:
                points.append(
                    (start + x, value, mean, html.escape(f"{stage.name}, step {stage.steps[number]['step']}"))
                )
        points.append((None, None, None, ""))
        start += stage.seconds if along == "seconds" else xs[-1] if xs else 0.0
    return points


def _score_plot(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bars by task, a line through each group at chance, and one through each bar at its shuffled control."""
    count = len(comparison["runs"])
    width, traces = 0.76 / count, []
    tasks = [html.escape(row["task"]) for row in rows]
    shuffled: list[tuple[Number, float, float]] = []  # share, centre and half length of a line
    for index, run in enumerate(comparison["runs"]):
        centres = [number + width * (index - (count - 1) / 2) for number in range(len(rows))]
        values = [None if row["scores"][index] is None else 100 * row["scores"][index] for row in rows]
        bar = {"y": centres, "x": values, "width": width * 0.92, "customdata": tasks}
        traces.append(_bar(index, run, "%{customdata}: %{x:.1f}%", **bar))
        shuffled += [(row["shuffled"][index], centre, width * 0.46) for row, centre in zip(rows, centres, strict=True)]
    chance = [(row["chance"], float(number), 0.44) for number, row in enumerate(rows)]
    traces += [_marks("shuffled images", shuffled, 2.5, "solid"), _marks("chance", chance, 1.5, "2px,2px")]
    ticks = {"tickvals": list(range(len(rows))), "ticktext": tasks}
    up = {"range": [len(rows) - 0.4, -0.6], "fixedrange": True, "showgrid": False}
    across = {"title": {"text": "%"}, "range": [0, 102], "fixedrange": True}
    return plot("scores", traces, across, ticks | up, 120 + len(rows) * (16 + 18 * count), barmode="overlay")


def _grade_plot(comparison: Comparison) -> dict[str, Any]:
    """Bars of the difference from the baseline by group, with its interval."""
    rows, runs, traces = comparison["by_grade"], comparison["runs"], []
    for index, run in enumerate(runs[1:], start=1):
        error = {"array": [row["interval"][index] for row in rows], "color": {"$css": "--text"}, "thickness": 1.2}
        bar = {"x": [row["points"][index] for row in rows], "y": [row["task"] for row in rows], "error_x": error}
        traces.append(_bar(index, run, "%{y}: %{x:+.1f}", **bar))
    across = {"title": {"text": f"points from {html.escape(runs[0]['name'])}"}, "fixedrange": True, "zeroline": True}
    up = {"autorange": "reversed", "fixedrange": True, "showgrid": False}
    return plot("grades", traces, across | {"zerolinecolor": {"$css": "--text"}}, up, 120 + len(rows) * 14 * len(runs))


def _marks(name: str, found: Iterable[tuple[Number, float, float]], width: float, dash: str) -> dict[str, Any]:
    """Short vertical lines at given shares, as one trace with gaps."""
    x: list[Number] = []
    y: list[Number] = []
    for value, centre, reach in found:
        if value is not None:
            x += [100 * value, 100 * value, None]
            y += [centre - reach, centre + reach, None]
    trace: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y}
    trace["line"] = {"color": {"$css": "--text"}, "width": width, "dash": dash}
    return trace | {"hovertemplate": "%{x:.1f}%<extra>%{fullData.name}</extra>"}


def _examples(runs: list[Run]) -> list[dict[str, Any]]:
    """The examples that any run has, with each run's answer, marked where it can be judged."""
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in runs:
        for record in run.examples:
            texts = {"tag": record.get("task", ""), "text": record.get("question", ""), "image": None}
            lines = [("truth", Cell(record.get("truth", "")))]
            example = merged.setdefault(example_key(record), texts | {"lines": lines})
            if _IMAGE.fullmatch(image := record.get("image_png_base64") or ""):
                example["image"] = image
            mark, kind = {True: ("✓ ", "good"), False: ("✗ ", "bad"), None: ("", "")}[_right(record)]
            example["lines"].append((run.name, Cell(mark + record.get("answer", ""), kind=kind)))
    return list(merged.values())


def _right(record: Mapping[str, Any]) -> bool | None:
    """The record's own `correct`, else whether answer and truth are alike but for case and punctuation; None: free."""
    if "correct" in record:
        return record["correct"]
    answer, truth = (re.findall(r"\w+", record.get(key, "").casefold()) for key in ("answer", "truth"))
    return True if answer == truth else None if len(truth) >= _FREE_TEXT else False


def _windows(runs: list[Run]) -> dict[int, str]:
    """Windows per side -> which runs cut the images of their last stage like that. Empty if a run pads or crops."""
    if any(run.recipe.get("resize") in ("pad", "crop") for run in runs):
        return {}  # the encoder sees other images than those logged
    found: dict[int, list[str]] = {}
    for run in runs:
        with suppress(UserError):  # no layout, or a bridge without windows
            for scale in Layout.parse(run.stages[-1].layout or "" if run.stages else "").scales:
                found.setdefault(scale.grid, []).append(f"{run.name} ({scale.queries} each)")
    return {grid: ", ".join(names) for grid, names in sorted(found.items()) if 1 < grid <= _WINDOWS}
