"""Figures as text, and tables that are made once and shown in the terminal and on a page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import table as rich_table
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

COSTS = ("seconds", "executed_flops")
_STYLES = {"good": "green", "bad": "bold red", "quiet": "dim"}


@dataclass(frozen=True)
class Cell:
    """Text of a table's cell; ``note`` stands behind it, smaller; ``kind``: good, bad, quiet, or run (a run's name)."""

    text: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """``left``: ranged left; ``wide``: shown only where there is room."""

    head: str
    left: bool = False
    wide: bool = False
    run: bool = False  # its head is the name of a run


@dataclass
class Table:
    """Rows of texts or cells under columns. ``sections``: rows below a line; ``hint``: how to read it."""

    columns: list[Column]
    rows: list[list[str | Cell]]
    title: str = ""
    hint: str = ""
    sections: set[int] = field(default_factory=set)

    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.in_terminal(console.width)

    def in_markdown(self) -> str:
        """The table in Markdown; no text in it ends a cell or begins a tag."""
        rows = [[column.head for column in self.columns], ["---"] * len(self.columns)]
        rows += [[cell.text for cell in cells] for cells in self.cells()]
        escaped = ([text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for text in row] for row in rows)
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)

    def in_terminal(self, width: int = 0) -> rich_table.Table:
        """The table for a terminal of ``width`` characters; nothing in it is read as markup."""
        shown = [number for number, column in enumerate(self.columns) if width >= 150 or not column.wide]
        built = rich_table.Table(title=Text(self.title) if self.title else None, title_justify="left")
        built.caption = Text(self.hint) if self.hint else None
        for number in shown:
            column = self.columns[number]
            built.add_column(Text(column.head, overflow="fold"), justify="left" if column.left else "right")
        for row, cells in enumerate(self.cells()):
            if row in self.sections:
                built.add_section()
            texts = (f"{cells[number].text} {cells[number].note}".strip() for number in shown)
            styles = (_STYLES.get(cells[number].kind, "") for number in shown)
            built.add_row(*(Text(text, style) for text, style in zip(texts, styles, strict=True)))
        return built


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> Table:
    """A table whose first ``left`` columns are ranged left."""
    columns = [Column(head, left=number < left) for number, head in enumerate(heads)]
    return Table(columns, [[str(cell) for cell in row] for row in rows], title)


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


def said(value: Any, form: str = "", otherwise: str = "-") -> str:
    """A value in a format such as ".1%"; ``otherwise`` for None."""
    return otherwise if value is None else f"{value:{form}}"


def decimals(value: float | None) -> str:
    return said(value, ".3f")


def share(value: float | None) -> str:
    """A fraction as per cent, with its sign."""
    return said(value, ".1%")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def times(ratio: float | None) -> str:
    return "?" if ratio is None else f"{ratio:.2f}x"


def speed_up(ratios: Mapping[str, float | None] | None) -> str:
    """Such as "3.6x of 4.1x possible", from ratios of seconds and of executed FLOPs."""
    if not ratios:
        return ""
    had, possible = (f"{1 / ratios[cost]:.1f}x" if ratios.get(cost) else "?" for cost in COSTS)  # type: ignore[operator]
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
