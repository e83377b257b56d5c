"""The terminal's border: names, ids and errors may come from anybody's files, so they are shown and never obeyed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

import rich.console
import rich.progress
from rich.segment import Segment
from rich.text import Text

# All control characters but tab and newline; marks that turn the direction of writing; line separators; and halves of
# characters, which file names that are no UTF-8 hold and no terminal can be sent.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""A text with its control characters as they are written in Python, such as ``\x1b``."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


class Console(rich.console.Console):
    """A console that sends no control characters but its own. Every command prints through one."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Texts are made printable before they are laid out, and what else is drawn afterwards."""
        whole = self._printable(renderable) if isinstance(renderable, Text) else renderable
        for segment in super().render(whole, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def _printable(self, text: Text) -> Text:
        shown, start = text.blank_copy(), 0
        for found in _UNSAFE.finditer(text.plain):
            style = text.get_style_at_offset(self, found.start())
            shown.append_text(text[start : found.start()]).append(printable(found[0]), style)
            start = found.end()
        return shown.append_text(text[start:]) if start else text


class Progress(rich.progress.Progress):
    """rich's bars; where there is no terminal to draw them on, a line a minute."""

    EVERY = 60.0  # seconds

    def __init__(self, *, console: Console) -> None:
        super().__init__(console=console)
        self._told = time.monotonic()

    def update(self, task_id: rich.progress.TaskID, **values: Any) -> None:
        super().update(task_id, **values)
        if self.console.is_terminal or time.monotonic() - self._told < self.EVERY:
            return
        self._told = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        line = f"{task.description}: {task.completed:,.0f}"
        line += "" if task.total is None else f" of {task.total:,.0f}"
        left = task.time_remaining
        line += "" if left is None else f", about {-(-left // 60):.0f} min left"
        self.console.print(Text(line), soft_wrap=True)
