"""`sparsight demo`: runs on the same samples, and their comparison."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsight.config import Comparison
from sparsight.pipeline.train import run
from sparsight.reporting import Run, read_run, read_runs, report
from sparsight.reporting.page import table


def run_comparison(comparison: Comparison, out: Path, console: Console, resume: bool = False) -> dict[str, Any]:
    """Run the recipes one after the other on the same samples, compare, and write the report.

    Args:
        out: gets a folder for each run, ``comparison.json`` and ``report.html``. Runs of an earlier comparison
            in it are replaced, unless ``resume``.

    Returns:
        The comparison, as in ``comparison.json``.
    """
    recipes = comparison.recipes()
    cache = out / "cache"
    if not resume:
        for folder in [*(out / recipe.name for recipe in recipes), cache]:
            shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    for recipe in recipes:
        if resume and (out / recipe.name / "run.jsonl").is_file() and read_run(out / recipe.name).scores:
            console.print(f"run [bold]{recipe.name}[/]: done already")
            continue
        console.rule(f"[bold]{recipe.name}")
        run(recipe, out / recipe.name, console, resume, cache)
    shutil.rmtree(cache, ignore_errors=True)
    console.rule("[bold]what was saved, and what it cost")
    folders = [out / recipe.name for recipe in recipes]
    _print_examples(read_runs(folders), console)
    result = report(folders, out, console)
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all.")
    return result


def _print_examples(runs: list[Run], console: Console) -> None:
    heads = ("picture", "question", "truth", *(each.name for each in runs))
    examples = zip(*(each.examples for each in runs), strict=True)
    rows = [(*(rows[0][key] for key in ("id", "question", "truth")), *(r["answer"] for r in rows)) for rows in examples]
    console.print(table("Examples (pictures in the report)", heads, rows, left=len(heads)))
