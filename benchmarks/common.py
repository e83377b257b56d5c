"""What the benchmarks share: the command line, a clock that waits for the device, and the result's file."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsight.reporting import environment


def timing_options(doc: str, **more: dict[str, Any]) -> tuple[argparse.Namespace, torch.device]:
    """``--device``, ``--rounds``, ``--out``, and ``more``: what `add_argument` takes, by name."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    for name, argument in more.items():
        parser.add_argument(f"--{name}", **argument)
    options = parser.parse_args()
    return options, torch.device(options.device)


def now(device: torch.device) -> float:
    """Seconds, with the device's queue empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def result_file(name: str, out: Path | None = None) -> Path:
    """``results/NAME-DATE.json``, if no other is wanted."""
    day = datetime.now(UTC).strftime("%Y-%m-%dT%H%M")
    return out or Path(__file__).parent / "results" / f"{name}-{day}.json"


def write_result(name: str, result: dict[str, Any], out: Path | None, console: Console) -> None:
    """Write a result's file, with commit, versions and hardware."""
    out = result_file(name, out)
    out.write_text(json.dumps(result | {"env": environment()}, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote [bold]{out}[/]")
