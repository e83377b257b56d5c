"""A page in one self-contained file: it requests nothing, and nothing of the data becomes markup; and tables.

Plots are plotly's JSON. A colour in them is {"$css": variable}, which the page looks up to follow its theme.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsight.reporting.comparison import write_atomic

COLOURS = 8  # --run-0 (grey: the baseline) ... --run-7 in page.html.j2


def slot(index: int) -> int:
    """Number of the colour of a series; behind the last one they come again, but for the baseline's grey."""
    return index if index < COLOURS else 1 + (index - 1) % (COLOURS - 1)


def line(index: int, **fields: Any) -> dict[str, Any]:
    """Colour of a curve, dashed where the colours come again."""
    dash = ("solid", "dash", "dot", "dashdot")[_round(index)]
    return {"color": {"$css": f"--run-{slot(index)}"}, "dash": dash} | fields


def marker(index: int) -> dict[str, Any]:
    """Colour of a series of bars, with a pattern where the colours come again."""
    return {"color": {"$css": f"--run-{slot(index)}"}, "pattern": {"shape": ("", "/", "x", ".")[_round(index)]}}


def _round(index: int) -> int:
    """How often all colours have come before this series, up to three times."""
    return min(3, max(0, index - 1) // (COLOURS - 1))


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> Table:
    """A table for the terminal, its first ``left`` columns ranged left; nothing in it is read as markup."""
    built = Table(title=Text(title) if title else None, title_justify="left")
    for number, head in enumerate(heads):
        built.add_column(Text(head, overflow="fold"), justify="right" if number >= left else "left")
    for row in rows:
        built.add_row(*(Text(str(cell)) for cell in row))
    return built


def plot(
    name: str, data: list[dict[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any], height: int = 360, **layout: Any
) -> dict[str, Any]:
    """A figure for `write_page`: its place's id, its traces, and its axes."""
    return {"id": name, "data": data, "layout": {"xaxis": x, "yaxis": y, "height": height, **layout}}


def write_page(
    path: str | Path,
    template: str,
    figures: Sequence[Mapping[str, Any]],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> None:
    """Render a template that extends ``page.html.j2``, and write it, atomically.

    Args:
        figures: from `plot`; a page without any is a page without scripts.
        values: what the template shows, escaped. Texts in figures are escaped by who makes them: plotly reads tags.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    loader = PackageLoader("sparsight.reporting", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"slot": slot, **(filters or {})}
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    nonce = hashlib.sha256(data.encode()).hexdigest()[:32]
    values |= {"colours": COLOURS, "figures": data, "plotly": get_plotlyjs() if figures else "", "nonce": nonce}
    write_atomic(path, environment.get_template(template).render(values))
