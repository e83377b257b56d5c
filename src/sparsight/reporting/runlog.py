"""The run log: what a run did, one JSON object a line (`run.jsonl`). Imports no torch.

Units: seconds, bytes, floating-point operations (a multiply-add is 2), scores as fractions of 1. What is not finite
is written as `null`, and its dotted name is listed in the record's `nonfinite`: neither lost nor taken for a number.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparsight.cost.devices import cpu_name

VERSION = 1
FILE_NAME = "run.jsonl"
_PACKAGES = (
    "sparsight",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "peft",
    "trl",
)
_REQUIRED: dict[str, dict[str, type]] = {
    "header": {"version": int, "run": str},
    "stage": {"stage": str},
    "step": {"stage": str, "step": int},
    "stage_end": {"stage": str},
    "resume": {"stage": str, "step": int},
    "cache": {"stage": str, "folder": str},
    "eval": {"scores": dict},
    "example": {"id": str},
}


class RunLog:
    """Appends records to one file, each flushed: a killed process loses at most the line it was writing.

    Raises `FileExistsError` when the file exists and `append` is false: a log is added to, never overwritten.
    """

    def __init__(self, path: str | Path, append: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = open(self.path, "ab+" if append else "xb+")  # noqa: SIM115 - lives as long as the log
        except FileExistsError:
            raise FileExistsError(f"{self.path} exists; continue it with append=True, or log elsewhere") from None
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # the last writer was killed within a line; do not join ours to it
                self._file.write(b"\n")

    def write(self, type: str, **fields: object) -> None:
        """Write one record. Raises `TypeError`, naming the field, for a value that has no JSON form."""
        nonfinite: list[str] = []
        record: dict[str, Any] = {"type": type}
        record |= {name: _plain(value, name, nonfinite) for name, value in fields.items()}
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """`value` in JSON's types; the dotted names of what is not finite go to `nonfinite`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", nonfinite) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    try:
        scalar = value.item()  # numpy and torch
    except (AttributeError, ValueError, RuntimeError):
        raise TypeError(f"run log: {name} is a {type(value).__name__}, not a scalar or another JSON value") from None
    return _plain(scalar, name, nonfinite)


def environment() -> dict[str, Any]:
    """Time, commit, versions, hardware and platform of this process, for the header.

    `commit` and `dirty` are those of the checkout that this package is part of, None when it is in none. GPU names
    and the number of threads come from torch, None when nothing has imported it yet.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus, threads = None, None
    if torch := sys.modules.get("torch"):
        versions["torch"] = str(torch.__version__)
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        threads = torch.get_num_threads()
    commit, dirty = _git(Path(__file__))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "versions": versions,
        "hardware": {"cpu": cpu_name(), "cores": cores, "threads": threads, "memory_bytes": memory, "gpus": gpus},
        "platform": platform.platform(),
    }


def _git(file: Path) -> tuple[str | None, bool | None]:
    """(commit, whether the folder has uncommitted changes); (None, None) if git does not track `file`."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", file.name)  # a venv inside someone else's checkout is not our commit
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None, None


@dataclass(frozen=True)
class StageRun:
    """One stage. Without a `stage_end` record, `finished` is false and totals are sums over `steps`."""

    name: str
    layout: str | None
    bridge: str | None
    visual_tokens: int | None
    image_size: int | None
    samples: int
    seconds: float
    executed_flops: float
    steps: list[dict[str, Any]]
    finished: bool


@dataclass(frozen=True)
class Run:
    """What a run log says. `problems` names what could not be read, or does not add up, and where."""

    name: str
    header: dict[str, Any]
    stages: list[StageRun]
    scores: dict[str, float]
    shuffled: dict[str, float]
    chance: dict[str, float]
    items: dict[str, int]
    examples: list[dict[str, Any]]
    problems: list[str]


def step_seconds(step: Mapping[str, Any]) -> float:
    """Seconds of one step record: data wait, compute and optimizer together."""
    parts = step.get("seconds")
    return sum(_numbers(parts).values()) if isinstance(parts, dict) else 0.0


def number_in(record: Mapping[str, Any], key: str) -> float | None:
    """The number that a record holds under `key`; None for anything else."""
    return _numbers(record).get(key)


def example_key(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells examples apart: several questions may be asked of the picture that `id` names."""
    return tuple(str(record.get(key, "")) for key in ("id", "task", "question"))


def read_run(path: str | Path) -> Run:
    """Read a run log, given as the file or its folder. What can be read is kept; `problems` names the rest.

    Raises `FileNotFoundError` if there is no such file, and `ValueError` if it holds no header.
    """
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no run log at {file}")
    reader = _Reader()
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            reader.take(number, line)
    if not reader.header:
        found = ", ".join(f"{count} {kind}" for kind, count in reader.seen.items()) or "no readable record"
        raise ValueError(f"{file} has no header record; found: {found}. {'; '.join(reader.problems[:3])}".rstrip())
    return reader.run()


def _numbers(values: object) -> dict[str, Any]:
    """The entries of a mapping that are finite numbers."""
    items = values.items() if isinstance(values, dict) else ()
    return {key: value for key, value in items if type(value) in (int, float) and math.isfinite(value)}


@dataclass
class _Reader:
    header: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    examples: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))

    def take(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line.decode(errors="replace"), parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            self.problems.append(f"line {number}: cut or not JSON; left out")
            return
        kind = record.get("type") if isinstance(record, dict) else None
        if not isinstance(kind, str) or kind not in _REQUIRED:
            self.problems.append(f"line {number}: unknown type of record {kind!r}; left out")
            return
        for key, expected in _REQUIRED[kind].items():
            if not isinstance(record.get(key), expected) or isinstance(record[key], bool):
                self.problems.append(f"line {number}: {kind} without a valid {key!r}; left out")
                return
        self.seen[kind] = self.seen.get(kind, 0) + 1
        names = record.get("nonfinite")
        for name in names if isinstance(names, list) else ():
            self.nonfinite[f"{record['stage']} step" if kind == "step" else kind, str(name)].append(number)
        getattr(self, f"_{kind}")(number, record)

    def _header(self, number: int, record: dict[str, Any]) -> None:
        if record["version"] != VERSION:
            self.problems.append(f"line {number}: version {record['version']} is unknown; read as {VERSION}")
        if self.header:
            same = all(record.get(key) == self.header.get(key) for key in ("run", "recipe", "samples_hash"))
            if not same:
                self.problems.append(f"line {number}: a second header that differs from the first; left out")
            return
        self.header = record

    def _stage(self, number: int, record: dict[str, Any]) -> None:
        self.starts[record["stage"]] = record
        self.ends.pop(record["stage"], None)

    def _step(self, number: int, record: dict[str, Any]) -> None:
        self.steps[record["stage"]][record["step"]] = record

    def _stage_end(self, number: int, record: dict[str, Any]) -> None:
        self.ends[record["stage"]] = record

    def _resume(self, number: int, record: dict[str, Any]) -> None:
        # steps after the checkpoint are not in the weights, whether they are redone or not
        kept = {step: old for step, old in self.steps[record["stage"]].items() if step <= record["step"]}
        self.steps[record["stage"]] = kept
        self.ends.pop(record["stage"], None)

    def _cache(self, number: int, record: dict[str, Any]) -> None:
        pass  # its seconds and FLOPs are in the stage's end

    def _eval(self, number: int, record: dict[str, Any]) -> None:
        if record.get("checkpoint") != self.evaluation.get("checkpoint"):
            self.evaluation = {"checkpoint": record.get("checkpoint")}
        for key in ("scores", "shuffled", "chance", "items"):
            self.evaluation[key] = self.evaluation.get(key, {}) | _numbers(record.get(key))

    def _example(self, number: int, record: dict[str, Any]) -> None:
        self.examples[example_key(record)] = record

    def run(self) -> Run:
        for (kind, name), lines in self.nonfinite.items():
            self.problems.append(f"line {lines[0]}: {kind}: {name} is not finite ({len(lines)} times)")
        # dict.fromkeys: in order of appearance, each once
        stages = [self._stage_run(name) for name in dict.fromkeys([*self.starts, *self.steps, *self.ends])]
        tables = {key: self.evaluation.get(key, {}) for key in ("scores", "shuffled", "chance", "items")}
        examples = list(self.examples.values())
        name = self.header["run"]
        return Run(name, self.header, stages, examples=examples, problems=self.problems, **tables)

    def _stage_run(self, name: str) -> StageRun:
        if name not in self.starts:
            self.problems.append(f"stage {name}: no stage record; its layout is unknown")
        start, end = self.starts.get(name, {}), _numbers(self.ends.get(name))
        steps = [self.steps[name][number] for number in sorted(self.steps[name])]
        sums = {
            "seconds": math.fsum(step_seconds(step) for step in steps),
            "executed_flops": math.fsum(_numbers(step).get("flops", 0) for step in steps),
            "samples": sum(_numbers(step).get("samples", 0) for step in steps),
        }
        for key, value in sums.items():
            if key in end and value > 1.01 * end[key]:
                self.problems.append(
                    f"stage {name}: {key} is {end[key]:g} at the end, but its steps add up to {value:g}"
                )
        return StageRun(
            name=name,
            layout=start.get("layout"),
            bridge=start.get("bridge"),
            visual_tokens=_numbers(start).get("visual_tokens"),
            image_size=_numbers(start).get("image_size"),
            samples=end.get("samples", sums["samples"]),
            seconds=end.get("seconds", sums["seconds"]),
            executed_flops=end.get("executed_flops", sums["executed_flops"]),
            steps=steps,
            finished=name in self.ends,
        )
