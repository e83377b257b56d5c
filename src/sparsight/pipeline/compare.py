"""`sparsight demo`: runs on the same samples, and their comparison."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sparsight.console import Console
from sparsight.data.cache import remove_caches
from sparsight.pipeline.files import holds_run, move_aside, open_log, settle_image_size, settle_precision
from sparsight.pipeline.train import check_inputs, run
from sparsight.reporting import Run, read_run, read_runs, report
from sparsight.reporting.runlog import example_key
from sparsight.reporting.tables import table
from sparsight.settings.recipe import Comparison, Recipe


def run_comparison(
    comparison: Comparison, out: str | Path, console: Console, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Run the recipes one after the other on the same samples, compare, and write the report.

    Args:
        out: gets a folder for each run, ``comparison.json`` and ``report.html``.
        resume: go on where the comparison in ``out`` stopped.
        overwrite: move what is in ``out`` aside, and say where.

    Returns:
        The comparison, as in ``comparison.json``.

    Raises:
        FileExistsError: ``out`` holds a run of that name, and neither ``resume`` nor ``overwrite`` is on.
        UserError: ``resume``, and a run there is of another recipe.
    """
    recipes = [settle_image_size(recipe) for recipe in comparison.recipes()]
    out = Path(out)
    cache = out / "cache"
    for recipe in recipes:  # before the first one trains
        check_inputs(recipe)
    if overwrite:
        move_aside(out, resume, console)
    if not resume and (held := [str(out / each.name) for each in recipes if holds_run(each, out / each.name)]):
        raise FileExistsError(
            f"there are runs already: {', '.join(held)}; go on with --resume, choose another --out, or --overwrite, "
            f"which moves {out} aside"
        )
    start = time.perf_counter()
    for recipe in recipes:
        if resume and _ended(recipe, out / recipe.name):
            console.print(f"run [bold]{recipe.name}[/]: done already")
            continue
        console.rule(f"[bold]{recipe.name}")
        run(recipe, out / recipe.name, console, resume, cache)
    remove_caches(cache)
    console.rule("[bold]comparison")
    folders = [out / recipe.name for recipe in recipes]
    _print_examples(read_runs(folders), console)
    result = report(folders, out, console)
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all.")
    return result


def _ended(recipe: Recipe, folder: Path) -> bool:
    """Whether a run is finished, all questions of the recipe too. Raises UserError if it is another recipe's."""
    if not (folder / "run.jsonl").is_file() or not (found := read_run(folder)).ended:
        return False
    settled = settle_precision(recipe, folder, True, Console(quiet=True))
    open_log(settled, folder, True).close()
    return bool(found.header["recipe"].get("evaluation") == recipe.evaluation.model_dump(mode="json"))


def _print_examples(runs: list[Run], console: Console) -> None:
    heads = ("image", "question", "truth", *(each.name for each in runs))
    asked = [{example_key(example): example for example in each.examples} for each in runs]
    common = [[each[key] for each in asked] for key in asked[0] if all(key in each for each in asked)]
    rows = [(*(rows[0][key] for key in ("id", "question", "truth")), *(r["answer"] for r in rows)) for rows in common]
    console.print(table("Examples (images in the report)", heads, rows, left=len(heads)))
