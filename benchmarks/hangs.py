"""Train random mixes of batches, engines and methods as every rank of a world, each alone under torch's fake process
group, and compare the collectives that they ask for. Writes a result to benchmarks/results.

    python benchmarks/hangs.py [--mixes 2000] [--minutes 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "tests/sparse", "tests/reliability")]

from collectives import divergence  # noqa: E402
from mixes import Mix, random_mix, records  # noqa: E402

from sparsight.reporting.runlog import environment  # noqa: E402

METHODS = ("compressor", "skipper", "lora", "packing", "checkpointing", "frozen_vision")
SHOWN = 50  # mixes between lines on the screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked, start = parser.parse_args(), time.monotonic()
    seen, parted, counts, runs, calls = set[Mix](), list[dict[str, str]](), Counter[str](), 0, 0
    choose = random.Random(asked.seed).choice
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # what was found until then is written
        while len(seen) < asked.mixes and time.monotonic() - start < 60 * asked.minutes:
            mix = random_mix(choose)
            found = records(mix)
            run = {id(record): record for record in found}.values()  # ranks of a large world that are alike share one
            runs, calls = runs + len(run), calls + sum(len(record.calls) for record in run)
            if where := divergence(found):
                parted.append({"mix": repr(mix), "where": where})
                sys.stderr.write(f"{parted[-1]}\n")
            seen.add(mix)
            counts.update([f"{len(mix.kinds)} ranks", mix.engine, mix.model, *set(mix.kinds)])
            counts.update(name for name in METHODS if getattr(mix, name))
            if len(seen) % SHOWN == 0:
                sys.stderr.write(f"{len(seen)} mixes, {len(parted)} in which ranks part\n")
    now = datetime.now(UTC)
    values = {
        "made": now.isoformat(timespec="seconds"),
        "environment": environment(),
        "seed": asked.seed,
        "mixes": len(seen),
        "ranks": sum(len(mix.kinds) for mix in seen),
        "ranks_run": runs,
        "collectives": calls,
        "divergences": parted,
        "counts": dict(sorted(counts.items())),
        "seconds": round(time.monotonic() - start),
    }
    file = ROOT / "benchmarks" / "results" / f"hangs-cpu-{now:%Y-%m-%dT%H%M}.json"
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(seen)} mixes, {calls} collectives, {len(parted)} divergences: {file}\n")


if __name__ == "__main__":
    main()
