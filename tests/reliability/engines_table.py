"""Train small recipes of two stages under every engine on two ranks of this machine's CPU, compare losses and weights
with those of one process, and write a result for benchmarks/results; the table of docs/engines.md is made of it.

    python tests/reliability/engines_table.py [--engines ddp fsdp2 zero2 zero3] [--cases full lora ...]

DeepSpeed must be importable for ZeRO (DS_ACCELERATOR=cpu on a machine without a GPU).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "tests/sparse", "tests/reliability")]

import engines  # noqa: E402
from test_engines import cut, differences, launched, table  # noqa: E402

from small_runs import quiet  # noqa: E402
from sparsight.pipeline import run  # noqa: E402
from sparsight.pipeline.launch import ENGINES  # noqa: E402
from sparsight.reporting.runlog import environment  # noqa: E402


def cell(one: Path, other: Path) -> str:
    """The largest difference of any loss or weight, or why it is refused."""
    if (file := other.with_name(f"{other.name}.refused")).exists():
        return "refused: " + file.read_text(encoding="utf-8").partition("launcher, but ")[2]
    try:
        return f"{max(differences(one, other)):.0e}"
    except Exception as error:
        return f"failed: {error!r:.100}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--cases", nargs="+", default=list(engines.CASES), choices=list(engines.CASES))
    chosen = parser.parse_args()
    result: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        engines.prepare(folder)
        for case in chosen.cases:
            run(engines.recipe(folder, case), folder / "one" / case, quiet())
        for name in chosen.engines:
            out = folder / name
            if said := launched(name, folder, out, ",".join(chosen.cases), timeout=3000):
                sys.stderr.write(said)
            result[name] = {case: cell(folder / "one" / case, out / case) for case in chosen.cases}
            if said:
                continue
            shutil.copytree(out / chosen.cases[0], folder / "whole" / name)
            cut(out / chosen.cases[0])
            launched(name, folder, out, chosen.cases[0], "resume")
            result[name]["resume"] = cell(folder / "whole" / name, out / chosen.cases[0])
            sys.stderr.write(f"{name}: {result[name]}\n")
    now = datetime.now(UTC)
    values = {"made": now.isoformat(timespec="seconds"), "environment": environment(), "cells": result}
    file = ROOT / "benchmarks" / "results" / f"engines-cpu-{now:%Y-%m-%dT%H%M}.json"
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(result))


if __name__ == "__main__":
    main()
