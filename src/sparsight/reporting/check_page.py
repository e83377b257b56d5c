"""What `sparsight data check` found, as a table and as a page. Both read the record of ``check.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsight.reporting.page import plot, table, write_page

SHOWN = 500  # bad samples on the page; check.json has all


def figures_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) of a check, in the order to be read."""
    lengths = record["lengths"]
    middle, tail, far = (f"{lengths['quantiles'][share]:.0f}" for share in ("0.5", "0.9", "0.99"))
    ratio = record["text_to_visual"]
    return [
        ("samples", f"{record['samples']:,}"),
        ("bad samples", f"{len(record['bad']):,}"),
        ("longer than" + (f" {record['context']:,} tokens" if record["context"] else " the context"),
         f"{len(record['too_long']):,}" if record["context"] else "context not known"),
        ("tokens of a sample, mean", f"{lengths['mean']:.1f}"),
        ("tokens of a sample, quantiles 0.5, 0.9, 0.99", f"{middle}, {tail}, {far}"),
        ("longest sample", f"{lengths['longest']:,} tokens (id {lengths['longest_id']})"),
        ("images", f"{record['images']:,}"),
        ("visual tokens of a image", f"{record['visual_tokens_per_image']:,}"),
        ("text tokens : visual tokens", f"{record['text_tokens']:,} : {record['visual_tokens']:,}"
         + ("" if ratio is None else f" = {ratio:.3g}")),
    ]  # fmt: skip


def check_table(record: Mapping[str, Any]) -> Table:
    """`figures_of` for the terminal."""
    title = f"{record['data']}, as stage {record['stage']} of {record['recipe']} sees it"
    return table(title, ("", ""), figures_of(record))


def write_check(record: Mapping[str, Any], examples: Sequence[Mapping[str, str]], path: str | Path) -> None:
    """Write the page, atomically.

    Args:
        examples: ``id``, ``text`` and ``image`` (PNG in base64) of images to show.
    """
    histogram = record["lengths"]["histogram"]
    edges = histogram["edges"]
    bars = {
        "type": "bar",
        "name": "samples",
        "x": [(low + high) / 2 for low, high in pairwise(edges)],
        "width": [high - low for low, high in pairwise(edges)],
        "y": histogram["counts"],
        "marker": {"color": {"$css": "--run-1"}},
        "hovertemplate": "%{x:.0f} tokens: %{y} samples<extra></extra>",
    }
    across, up = ({"title": {"text": text}} for text in ("tokens of a sample", "samples"))
    write_page(
        path,
        "check.html.j2",
        [plot("lengths", [bars], across, up)],
        record=record,
        rows=figures_of(record),
        bad=record["bad"][:SHOWN],
        too_long=record["too_long"][:SHOWN],
        shown=SHOWN,
        examples=examples,
    )
