"""The curve of a checkpoint that was asked in several ways (`sparsight eval --layouts`), as a table and as a page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.text import Text

from sparsight.reporting.page import folded, line, plot, plots, section, shown_table, write_page
from sparsight.reporting.tables import Cell, Column, Table, human, percent, write_atomic

_HINT = (
    "Mean of the tasks with its 95% interval; points: difference from the first row, of the same questions, coloured "
    "where the interval excludes 0 and p, raised for the number of rows (Holm), is below 0.05. Shuffled: with other "
    "images. Times of a question in a batch of {rows}: encoder and bridge, prompt up to the first token, each token "
    "behind it; FLOPs of the first two. Cache: keys and values of a question behind its prompt; peak: of a batch, on "
    "a GPU. Every row is the same checkpoint."
)
_TIMES = {"encode_seconds": "encode", "prefill_seconds": "prefill", "decode_seconds": "decode a token"}
_BYTES = {"cache_bytes": "cache", "peak_bytes": "peak"}


def _half(low: float, high: float) -> str:
    return f"±{50 * (high - low):.1f}"


def curve_table(curve: Mapping[str, Any]) -> Table:
    """A row for each way: visual tokens, score, difference from the first row, costs, and scores by task."""
    points, tasks = curve["points"], list(curve["points"][0]["scores"])
    sizes = [key for key in _BYTES if key in points[0]]
    wide = ["shuffled", "encode", "FLOPs", "peak", *tasks]
    costs = [*_TIMES.values(), "FLOPs", *(_BYTES[key] for key in sizes)]
    heads = ["kept", "tokens", "score", "points", "shuffled", *costs, *tasks]
    columns = [Column("layout", left=True), *(Column(head, wide=head in wide) for head in heads)]
    rows: list[list[str | Cell]] = []
    for point in points:
        change = Cell("")
        if "difference" in point:
            low, high = point["difference_interval"]
            sign = (low > 0) - (high < 0) if point["p_value"] < 0.05 else 0
            change = Cell(f"{100 * point['difference']:+z.1f}", _half(low, high), ("quiet", "good", "bad")[sign])
        row: list[str | Cell] = [point["layout"] or "its own", f"{point['keep']:.0%}", str(point["visual_tokens"])]
        row += [Cell(percent(point["score"]), _half(*point["interval"])), change]
        row += [percent(fmean(point["shuffled"].values())), *(f"{1e3 * point[key]:.2f} ms" for key in _TIMES)]
        row += [human(point["flops"], "FLOP"), *(human(point[key], "B") for key in sizes)]
        rows.append([*row, *(percent(point["scores"][task]) for task in tasks)])
    title = f"{curve['model']}: {curve['asked']}, {curve['precision']}"
    return Table(columns, rows, title, _HINT.format(rows=curve["rows"]))


def write_curve(curve: Mapping[str, Any], out: str | Path, console: Console) -> None:
    """Print the table, and write ``curve.json`` and the page: scores and times against visual tokens."""
    out = Path(out)
    write_atomic(out / "curve.json", json.dumps(curve, indent=1) + "\n")
    points = sorted(curve["points"], key=lambda point: point["visual_tokens"])

    def trace(name: str, index: int, values: list[float], unit: str, **more: Any) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": html.escape(name),
            "line": line(index),
        }
        shown |= {"x": [each["visual_tokens"] for each in points], "y": values}
        shown["text"] = [html.escape(f"{each['layout'] or 'its own'}, {each['keep']:.0%}") for each in points]
        return shown | {"hovertemplate": f"%{{text}}: %{{y:.3~r}} {unit}<extra>%{{fullData.name}}</extra>"} | more

    ends = [[100 * abs(each["interval"][end] - each["score"]) for each in points] for end in (0, 1)]
    bars: dict[str, Any] = {"type": "data", "symmetric": False, "arrayminus": ends[0], "array": ends[1]}
    scores = [trace("mean", 1, [100 * each["score"] for each in points], "%", error_y=bars)]
    for number, task in enumerate(points[0]["scores"], start=2):
        thin = {"line": line(number, width=1), "opacity": 0.7}
        scores.append(trace(task, number, [100 * each["scores"][task] for each in points], "%", **thin))
    named = enumerate(_TIMES.items(), start=1)
    times = [trace(name, number, [1e3 * each[key] for each in points], "ms") for number, (key, name) in named]
    x = {"title": {"text": "visual tokens an image"}, "rangemode": "tozero"}
    figures = plots(
        ("Score", plot("scores", scores, x, {"title": {"text": "%"}, "rangemode": "tozero"})),
        ("Time of a question", plot("times", times, x, {"title": {"text": "ms"}, "rangemode": "tozero"})),
    )
    told, lead = curve_table(curve), f"One checkpoint, {len(points)} ways to ask it: {curve['asked']}."
    about = folded("Environment", json.dumps(curve["env"], indent=2))
    sections = [
        section("Scores and costs", "", figures, shown_table(told)),
        section("How it was run", "", about),
    ]
    write_page(out / "curve.html", "curve of visual tokens", (curve["model"], "by visual tokens"), lead, sections)
    console.print(told)
    console.print(Text(f"wrote {out / 'curve.html'} and curve.json"), soft_wrap=True)
