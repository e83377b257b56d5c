"""A page in one self-contained file: it requests nothing, and nothing of the data becomes markup.

A page is a list of sections, each a title, a hint and blocks; a block is made by one of the functions here. Plots are
plotly's JSON. A colour in them is {"$css": variable}, which the page looks up to follow its theme.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sparsight.reporting.tables import Table, write_atomic

COLOURS = 8  # --run-0 (grey: the baseline) ... --run-7 in page.html.j2
Block = dict[str, Any]


def section(title: str, hint: str = "", *blocks: Block | None) -> dict[str, Any]:
    """A part of a page; blocks that are None are left out."""
    return {"title": title, "hint": hint, "blocks": [block for block in blocks if block is not None]}


def shown_table(table: Table, foldable: bool = False) -> Block:
    """A table; ``foldable``: it can be folded away, under its title."""
    return {"kind": "table", "table": table, "foldable": foldable}


def plots(*named: tuple[str, dict[str, Any]], beside: Table | None = None) -> Block:
    """Titles and figures from `plot`, two in a row; ``beside``: a table that stands with them."""
    return {"kind": "plots", "plots": named, "table": beside}


def examples(found: Sequence[Mapping[str, Any]], windows: Mapping[int, str] | None = None) -> Block:
    """Cards of `image` (PNG in base64), `tag`, `text`, `lines` of (label, `Cell`). ``windows``: per side, and whose."""
    return {"kind": "examples", "examples": found, "windows": windows or {}}


def sheet(png: bytes, width: int, alt: str) -> Block:
    """An image, shown ``width`` pixels wide."""
    return {"kind": "sheet", "image": base64.b64encode(png).decode(), "width": width, "alt": alt}


def folded(title: str, text: str) -> Block:
    return {"kind": "folded", "title": title, "text": text}


def slot(index: int) -> int:
    """Number of the colour of a series; behind the last one they come again, but for the baseline's grey."""
    return index if index < COLOURS else 1 + (index - 1) % (COLOURS - 1)


def _round(index: int) -> int:
    """How often all colours have come before this series, up to three times."""
    return min(3, max(0, index - 1) // (COLOURS - 1))


def line(index: int, **fields: Any) -> dict[str, Any]:
    """Colour of a curve, dashed where the colours come again."""
    return {
        "color": {"$css": f"--run-{slot(index)}"},
        "dash": ("solid", "dash", "dot", "dashdot")[_round(index)],
    } | fields


def marker(index: int) -> dict[str, Any]:
    """Colour of a series of bars, with a pattern where the colours come again."""
    return {"color": {"$css": f"--run-{slot(index)}"}, "pattern": {"shape": ("", "/", "x", ".")[_round(index)]}}


def plot(
    name: str, data: list[dict[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any], height: int = 360, **layout: Any
) -> dict[str, Any]:
    """A figure: the id of its element, its traces, and its axes."""
    return {"id": name, "data": data, "layout": {"xaxis": x, "yaxis": y, "height": height, **layout}}


def write_page(
    path: str | Path,
    subject: str,
    heading: tuple[str, str],
    lead: str,
    sections: Sequence[Mapping[str, Any]],
    *,
    warnings: Sequence[str] = (),
    cards: Sequence[Mapping[str, str]] = (),
    runs: Sequence[str] = (),
) -> None:
    """Write a page, atomically.

    Args:
        subject: the kind of page; ``heading`` and a smaller text behind it; ``lead``: the headline in a sentence.
        cards: big figures, each `label`, `value`, `note` and `kind` (good, bad, quiet or "").
        runs: names that have a colour. Texts in figures are escaped by who makes them: plotly reads tags.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    blocks = [block for each in sections for block in each["blocks"]]
    figures = [figure for block in blocks if block["kind"] == "plots" for _, figure in block["plots"]]
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    source = resources.files("sparsight.reporting").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = Environment(**options).from_string(source)  # type: ignore[arg-type]
    text = page.render(
        subject=subject,
        heading=heading,
        lead=lead,
        sections=sections,
        warnings=warnings,
        cards=cards,
        slots={name: slot(index) for index, name in enumerate(runs)},
        windows=sorted({grid for block in blocks for grid in block.get("windows", ())}),
        colours=COLOURS,
        figures=data,
        plotly=get_plotlyjs() if figures else "",
        nonce=hashlib.sha256(data.encode()).hexdigest()[:32],
    )
    write_atomic(path, text)
