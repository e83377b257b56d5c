"""What `sparsight analyze` found, as a table and as a page. Both read the record of ``analysis.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsight.reporting.inspection import RAMP
from sparsight.reporting.page import plot, table, write_page

HEADINGS = ("layer", "similarity, visual", "similarity, text", "attention to visual", "if even", "importance")


def layer_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A row for each layer under `HEADINGS`: cosines, shares in %, 1 - similarity; empty where nothing was measured."""
    figures = [
        (layer["visual_similarity"], layer["text_similarity"], layer["attention"], layer["even_attention"], importance)
        for layer, importance in zip(record["analysis"]["layers"], record["suggestion"]["importance"], strict=True)
    ]
    return [
        [str(number), f"{visual:.3f}", f"{text:.3f}", _percent(share), _percent(even), f"{importance:.3f}"]
        for number, (visual, text, share, even, importance) in enumerate(figures)
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def layer_table(record: Mapping[str, Any]) -> Table:
    """`layer_rows` for the terminal."""
    seen = record["analysis"]
    counts = (f"{seen[key]} {key.replace('_', ' ')}" for key in ("samples", "images", "visual_tokens", "text_tokens"))
    return table(f"{record['model']}: {', '.join(counts)}", HEADINGS, layer_rows(record), left=0)


def write_analysis(record: Mapping[str, Any], path: str | Path) -> None:
    """Write the page, atomically.

    Args:
        record: ``model``, ``data``, ``environment``, ``analysis`` (fields of `Analysis`) and ``suggestion`` (those of
            `Suggestion`, and ``code`` and ``rules``), as in ``analysis.json``.
    """
    plots = _plots(record["analysis"])
    advice = record["suggestion"]
    chosen = {**advice["compressor"], **advice["skipper"]}
    write_page(
        path,
        "analysis.html.j2",
        plots,
        record=record,
        headings=HEADINGS,
        rows=layer_rows(record),
        settings=[(key, chosen[key], reason) for key, reason in advice["reasons"].items()],
        plots=[plot["id"] for plot in plots],
    )


def _plots(seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers = seen["layers"]
    similar = [
        _line(layers, "visual_similarity", "visual positions", "--run-1"),
        _line(layers, "text_similarity", "text positions", "--run-2"),
    ]
    plots = [_plot("similarity", "cosine similarity", similar)]
    if any(layer["attention"] is not None for layer in layers):
        shares = [
            _line(layers, "attention", "given", "--run-1"),
            _line(layers, "even_attention", "if even", "--run-0", dash="4px,4px"),
        ]
        plots.append(_plot("attention", "share of attention", shares, {"tickformat": ".0%", "rangemode": "tozero"}))
    if seen["redundancy_map"]:
        scale = [[place / (len(RAMP) - 1), f"rgb{colour}"] for place, colour in enumerate(RAMP)]
        heat = {"type": "heatmap", "z": seen["redundancy_map"], "colorscale": scale, "xgap": 1, "ygap": 1}
        heat |= {"hovertemplate": "row %{y}, column %{x}: %{z:.3f}<extra></extra>", "colorbar": {"thickness": 12}}
        square = {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain", "showgrid": False}
        wide = {"constrain": "domain", "showgrid": False, "dtick": 1}
        plots.append(plot("map", [heat], wide, square | {"dtick": 1}))
    return plots


def _plot(name: str, unit: str, lines: list[dict[str, Any]], axis: Mapping[str, Any] | None = None) -> dict[str, Any]:
    vertical = {"title": {"text": unit}, "fixedrange": True, **(axis or {})}
    return plot(name, lines, {"title": {"text": "layer"}, "fixedrange": True}, vertical)


def _line(layers: list[Mapping[str, Any]], key: str, name: str, colour: str, dash: str = "solid") -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "y": [layer[key] for layer in layers],
        "line": {"color": {"$css": colour}, "width": 2.5, "dash": dash},
        "hovertemplate": "layer %{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
    }
