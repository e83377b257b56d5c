"""The terminal's border: what comes from files is shown, and never sent to the terminal as it is (D09)."""

from __future__ import annotations

import ast
import io
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
import rich.console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import sparsight
from sparsight import cli
from sparsight.console import Console, Progress, printable

# Sets the clipboard, the title, clears; C1's CSI; colours' reset; the direction of writing; half a character.
HOSTILE = "a\x1b]52;c;eA==\x07b\x1b]0;t\x07\x1b[2J\x9b2J\r\x08\x7f\u202egnp\u2066c"
BARS = {"Progress", "Live", "Status", "track"}
SHOWN = r"\x1b[2J\x9b2J"  # rich leaves out bells, backspaces and carriage returns itself


def unsafe(text: str) -> set[str]:
    return {c for c in text if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in "\u202e\u2066"}


def test_D09_control_characters_are_shown_in_all_that_a_console_draws() -> None:
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(Text(HOSTILE, "red"))
    for drawn in (HOSTILE, Text(HOSTILE, "bold"), Panel(HOSTILE, title=HOSTILE), table):
        out = io.StringIO()
        Console(file=out, width=200).print(drawn)
        assert not unsafe(out.getvalue()) and SHOWN in out.getvalue()
    out = io.StringIO()
    Console(file=out, width=200).rule(HOSTILE)
    assert not unsafe(out.getvalue()) and SHOWN in out.getvalue()


def test_D09_a_terminal_still_gets_the_consoles_own() -> None:
    ours, plain = io.StringIO(), io.StringIO()
    for kind, out in ((Console, ours), (rich.console.Console, plain)):
        console = kind(file=out, force_terminal=True, width=60, color_system="truecolor", legacy_windows=False)
        console.print("[red]red[/] and", Text("blue", "blue"), 3)
        with Live(console=console, auto_refresh=False) as live:
            live.update(Panel("one\ttwo\nthree"), refresh=True)
            live.update(Panel("four"), refresh=True)
    assert "\x1b" in plain.getvalue() and ours.getvalue() == plain.getvalue()


def test_D09_styles_stay_where_they_were() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system="standard", no_color=False)
    console.print(Text.assemble(("b\x1bd", "red"), "pl\x9bin"))
    assert out.getvalue().replace("\x1b[31m", "<").replace("\x1b[0m", ">") == "<b><\\x1b><d>pl\\x9bin\n"


def test_D09_what_is_safe_stays() -> None:
    safe = "naïve 图像 עברית العربية 👩‍👩‍👧 tab\tnewline\n \\x1b [bold]"
    assert printable(safe) == safe
    assert printable("\udcff\u2028") == r"\udcff\u2028"


def test_D09_warnings_and_tracebacks_are_shown_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["sparsight", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    capsys.readouterr()
    sys.stderr.write(warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "file.py", 1))
    sys.excepthook(KeyError, KeyError(HOSTILE), None)
    sys.excepthook(RuntimeError, RuntimeError(HOSTILE), None)
    said = capsys.readouterr().err
    assert not unsafe(said) and said.count(SHOWN) == 3


def test_D09_no_other_console_is_made() -> None:
    """One border: what makes a console makes ours."""
    found = []
    for file in Path(sparsight.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        nodes = list(ast.walk(tree))
        calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        rich_modules = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module in ("rich", "rich.console")]
        names = {alias.name for node in rich_modules for alias in node.names} & {call.func.id for call in calls}
        bars = [call for call in calls if call.func.id in BARS]  # given no console, they make one of rich's
        alone = [call.lineno for call in bars if "console" not in {keyword.arg for keyword in call.keywords}]
        if alone or names & {"Console", "get_console", "print"}:
            found.append((file.name, names, alone))
    assert found == []


def test_F23_without_a_terminal_a_line_tells_how_far_it_is(monkeypatch):
    """One for each stretch of time, at once in the file; on a terminal none."""
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    told = {}
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with Progress(console=console) as bar:
            task = bar.add_task("pretrain", total=8)
            bar.update(task, completed=4, description="pretrain, loss 1.250")
            told[terminal] = "pretrain, loss 1.250: 4 of 8" in console.file.getvalue()
    assert told == {False: True, True: False}
    monkeypatch.setattr(Progress, "EVERY", 60.0)
    console = Console(file=io.StringIO())
    with Progress(console=console) as bar:
        bar.update(bar.add_task("pretrain", total=8), completed=4)
        assert "4 of 8" not in console.file.getvalue()
