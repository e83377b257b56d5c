"""A run in the terminal while it goes on, read from its log alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparsight.reporting.runlog import Run, StageRun, log_file, read_run, step_seconds
from sparsight.reporting.tables import decimals, duration, human, percent, share, table

_RECENT = 20  # steps that rates are means over
_STAGES = 4  # the last ones, side by side
_BARS = "▁▂▃▄▅▆▇█"


def watch(path: str | Path, console: Console, every: float = 1.0) -> Run:
    """Show a run until it ends; one that has ended is printed once. Ctrl-C ends it, too.

    Args:
        path: the run's folder or log.
        every: seconds between looks at the log.

    Raises:
        FileNotFoundError: there is no log.
        UserError: the log has no header.
    """
    file = log_file(path)
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                start = time.perf_counter()
                run = read_run(file, live=True)
                live.update(render(run, time.time() - file.stat().st_mtime, console.width), refresh=True)
                if run.ended:
                    break
                time.sleep(max(every, 4 * (time.perf_counter() - start)))  # a long log takes its time to read
        except KeyboardInterrupt:
            pass
    return run


def render(run: Run, silence: float, width: int) -> RenderableType:
    """The view of a run whose log was last written to ``silence`` seconds ago."""
    state = "ended" if run.ended else f"last record {duration(silence)} ago"
    parts: list[RenderableType] = []
    if run.stages:
        stage = run.stages[-1]
        done = stage.steps[-1]["step"] if stage.steps else 0
        bar = Table.grid(padding=(0, 1))
        planned = stage.planned_steps
        bar.add_row(Text(stage.name, "bold"), ProgressBar(planned, done, width=30), f"{done} of {planned or '?'} steps")
        curve = sparkline([step.get("loss") for step in stage.steps], max(10, min(width, 100) - 16))
        parts += [
            bar,
            Text(f"loss {curve}") if curve else Text("no step yet"),
            _figures(run.stages[-_STAGES:]),
        ]
    else:
        parts.append(Text("no stage has begun"))
    if scored := [record for stage in run.stages for record in stage.scored]:
        last = ", ".join(f"{task} {percent(score)}" for task, score in scored[-1]["scores"].items())
        parts.append(Text(f"a subset, after step {scored[-1]['step']} of {scored[-1]['stage']}: {last}"))
    if run.scores:
        parts.append(Text(f"score: {100 * fmean(run.scores.values()):.1f}%, the mean of {len(run.scores)} tasks"))
    parts += [Text(f"! {problem}", "yellow") for problem in run.problems]
    return Panel(Group(*parts), title=Text(f"{run.name}: {state}"), title_align="left", width=min(width, 100))


def _figures(stages: Sequence[StageRun]) -> Table:
    """A column for each stage, a row for each figure."""
    columns = [figures(stage) for stage in stages]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    built = table("", ["", *(stage.name for stage in stages)], rows).in_terminal()
    built.box, built.pad_edge = None, False
    return built


def figures(stage: StageRun) -> dict[str, str]:
    """Figures of a stage by name: totals since it began, rates of its last `_RECENT` steps."""
    last = stage.steps[-_RECENT:]
    newest = last[-1] if last else {}
    seconds = sum(step_seconds(step) for step in last)

    def total(key: str) -> float:
        return sum(step.get(key) or 0 for step in last)

    def of(part: float, whole: float, unit: str = "") -> str:
        return f"{part:.1f}{unit}".replace(".0", "") + f" of {whole:g}" if whole else "-"

    waited = sum((step.get("seconds") or {}).get("data") or 0 for step in last)
    left = (stage.planned_steps - newest["step"]) * seconds / len(last) if last and stage.planned_steps else None
    samples, layers = total("samples"), newest.get("layers") or 0
    kept = total("visual_tokens_kept" if "visual_tokens_kept" in newest else "visual_tokens")
    return {
        "loss": decimals(newest.get("loss")),
        "samples/s": f"{samples / seconds:.1f}" if seconds else "-",
        "data wait": share(waited / seconds if seconds else None),
        "executed so far": human(stage.executed_flops, "FLOP"),
        "memory": human(newest.get("memory_bytes"), "B"),
        "layers run": of(total("layers_run") / max(len(last), 1), layers),
        "visual tokens kept, a sample": of(kept / samples, total("visual_tokens") / samples) if samples else "-",
        "time so far": duration(stage.seconds),
        "time left": "finished" if stage.finished else "-" if left is None else duration(left),
    }


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The means of ``width`` equal parts, or all values if there are fewer, as a curve of blocks."""
    known = [value for value in values if value is not None]
    count = min(width, len(known))
    bounds = [len(known) * part // count for part in range(count + 1)] if count else []
    means = [fmean(known[start:end]) for start, end in pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(_BARS[round((value - low) / (high - low) * 7) if high > low else 0] for value in means)
