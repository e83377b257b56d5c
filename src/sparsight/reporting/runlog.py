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
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, NamedTuple, Self

from sparsight.devices.peaks import cpu_name
from sparsight.errors import UserError

VERSION = 1
FILE_NAME = "run.jsonl"
MOST_PROBLEMS = 20  # of a log, told one by one
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pillow", "peft", "trl")
_REQUIRED: dict[str, dict[str, type]] = {
    "header": {"version": int, "run": str},
    "recipe": {"recipe": dict},  # in place of the header's, where the run went on with other keys that may change
    "stage": {"stage": str},
    "step": {"stage": str, "step": int},
    "stage_end": {"stage": str},
    "resume": {"stage": str, "step": int},
    "cache": {"stage": str, "folder": str},
    "note": {"stage": str, "text": str},  # what a reader of the log should know; nothing is made of it
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
    for name in ("sparsight", *_PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus, threads = None, None
    if torch := sys.modules.get("torch"):
        versions["torch"] = str(torch.__version__)
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        threads = torch.get_num_threads()
    commit, dirty = _git(Path(__file__).parents[1] / "__init__.py")  # the whole package
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
class Curve:
    """A stage's losses, a value a step. ``mean``: over up to 25 steps on either side, fewer in short stages.

    Args:
        seconds: since the stage began, the encoding of images before the first step included.
        samples: seen in the stage.
    """

    seconds: list[float]
    samples: list[float]
    loss: list[float | None]
    mean: list[float | None]

    @property
    def final(self) -> float | None:
        """The last running mean."""
        return next((mean for mean in reversed(self.mean) if mean is not None), None)

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Seconds and samples after which the running mean is first as low as ``loss``; None if it never is."""
        found = (place for place, mean in enumerate(self.mean) if mean is not None and mean <= loss)
        place = next(found, None)
        return None if place is None else (self.seconds[place], self.samples[place])


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
    planned_steps: int | None = None
    encoding_seconds: float = 0.0  # for cached features, before the first step

    @cached_property
    def curve(self) -> Curve:
        seconds = accumulate((step_seconds(step) for step in self.steps), initial=self.encoding_seconds)
        samples = accumulate((number_in(step, "samples") or 0.0 for step in self.steps), initial=0.0)
        losses = [number_in(step, "loss") for step in self.steps]
        return Curve(list(seconds)[1:], list(samples)[1:], losses, running_mean(losses))

    def seconds_of(self, part: str) -> float:
        """Seconds that the steps spent on "data" (waiting for it), "compute" or "optimizer"."""
        return math.fsum(number_in(step.get("seconds"), part) or 0.0 for step in self.steps)

    @property
    def cpu_seconds(self) -> float | None:
        """CPU seconds of the steps' process; None where a step has none, as in older logs."""
        found = [number_in(step, "cpu_seconds") for step in self.steps]
        return None if not found or None in found else math.fsum(found)  # type: ignore[arg-type]

    @property
    def data_wait(self) -> float | None:
        """Share of the steps' seconds spent waiting for data; None where there are none."""
        seconds = sum(step_seconds(step) for step in self.steps)
        return self.seconds_of("data") / seconds if seconds else None

    def highest(self, key: str) -> float | None:
        """The highest number that a step has under ``key``."""
        return max((value for step in self.steps if (value := number_in(step, key)) is not None), default=None)


class Points(NamedTuple):
    """Items of one task: scores in [0, 1], what image each is about, and a hash, equal where the same was asked."""

    scores: list[float]
    images: list[int]
    questions: str


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
    points: dict[str, Points] = field(default_factory=dict)  # by task; older logs have none
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage: folder, and what this run paid

    @property
    def trained(self) -> bool:
        """Whether all of the recipe's stages are finished, also those that have not begun."""
        stages = _mapping(self.header.get("recipe")).get("stages")
        stages = stages if isinstance(stages, list) else []
        names = {str(stage.get("name")) for stage in stages if isinstance(stage, dict)}
        names = names or {stage.name for stage in self.stages}
        return bool(names) and names <= {stage.name for stage in self.stages if stage.finished}

    @property
    def ended(self) -> bool:
        """Whether nothing more will come: the recipe's stages are finished, and scored if they were to be."""
        evaluation = _mapping(_mapping(self.header.get("recipe")).get("evaluation"))
        held_out = set(_mapping(evaluation.get("held_out")))
        scored = held_out <= self.scores.keys()
        if evaluation.get("kind", "none") != "none":
            scored &= bool(self.scores.keys() - held_out)
        return self.trained and scored


def running_mean(values: Sequence[float | None]) -> list[float | None]:
    """As `Curve` says; None where there is no value."""
    reach = min(25, len(values) // 40)
    means: list[float | None] = []
    for place, value in enumerate(values):
        around = [each for each in values[max(0, place - reach) : place + reach + 1] if each is not None]
        means.append(None if value is None else fmean(around))
    return means


def step_seconds(step: Mapping[str, Any]) -> float:
    """Seconds of one step record: data wait, compute and optimizer together."""
    return sum(_numbers(step.get("seconds")).values())


def number_in(record: object, key: str) -> float | None:
    """The number that a record holds under `key`; None for anything else."""
    return _numbers(record).get(key)


def example_key(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells examples apart: several questions may be asked of the image that `id` names."""
    return tuple(str(record.get(key, "")) for key in ("id", "task", "question"))


def read_run(path: str | Path) -> Run:
    """Read a run log, given as the file or its folder. What can be read is kept; `problems` names the rest.

    Raises `FileNotFoundError` if there is no such file, and `ValueError` if it holds no header.
    """
    reader = LogReader(path)
    reader.follow()
    if reader.rest.strip():
        reader.take(reader.number + 1, reader.rest)
    return reader.run()


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """`read_run` for each path; runs of one name are told apart by their paths.

    Raises `UserError` for a path given twice, and what `read_run` raises.
    """
    if twice := [str(path) for path, count in Counter(Path(path).resolve() for path in paths).items() if count > 1]:
        raise UserError(f"given twice: {', '.join(twice)}; expected different runs")
    runs = [read_run(path) for path in paths]
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(path)) if names[run.name] > 1 else run for run, path in zip(runs, paths, strict=True)]


def _numbers(values: object) -> dict[str, Any]:
    """The entries of a mapping that are finite numbers."""
    items = _mapping(values).items()
    return {key: value for key, value in items if type(value) in (int, float) and abs(value) <= sys.float_info.max}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _points(parts: list[Any], mean: float) -> Points | None:
    """Scores, images and questions as `Points`; None if they do not fit each other or that mean."""
    scores, images, questions = parts
    if not (isinstance(scores, list) and isinstance(images, list) and isinstance(questions, str)):
        return None
    numbers = [list(_numbers(dict(enumerate(part))).values()) for part in (scores, images)]
    fit = (
        numbers == [scores, images] and len(scores) == len(images) > 0 and all(0 <= each <= 1 + 1e-9 for each in scores)
    )
    return Points(*parts) if fit and math.isclose(fmean(scores), mean, abs_tol=1e-6) else None


@dataclass
class LogReader:
    """Reads a run log, given as the file or its folder, also while it is being written.

    Raises `FileNotFoundError` if there is no such file.
    """

    path: InitVar[Path | str]
    file: Path = field(init=False)
    offset: int = 0  # bytes read
    number: int = 0  # lines taken
    rest: bytes = b""  # of a line that has no end yet
    stranger: int = 0  # the line of a second header: what comes after it is of another run
    strangers: int = 0
    header: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    examples: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self, path: Path | str) -> None:
        folder = Path(path)
        self.file = folder / FILE_NAME if folder.is_dir() else folder
        if not self.file.is_file():
            inside = sorted(str(file.parent) for file in folder.glob(f"*/{FILE_NAME}"))
            hint = f"; there are logs in {', '.join(inside)}" if inside else ""
            raise FileNotFoundError(f"there is no run log at {self.file}; expected the folder of a run{hint}")

    def follow(self) -> None:
        """Take the whole lines that were added since the last time."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.number += 1
            if line.strip():
                self.take(self.number, line)

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
            if not isinstance(record.get(key), expected) or (expected is int and key not in _numbers(record)):
                self.problems.append(f"line {number}: {kind} without a valid {key!r}; left out")
                return
        if self.stranger and kind != "header":
            self.strangers += 1
            return
        self.seen[kind] = self.seen.get(kind, 0) + 1
        names = record.get("nonfinite")
        for name in names if isinstance(names, list) else ():
            self.nonfinite[f"{record['stage']} step" if kind == "step" else kind, str(name)].append(number)
        self._apply(kind, number, record)

    def _apply(self, kind: str, number: int, record: dict[str, Any]) -> None:
        stage: str = record.get("stage", "")
        match kind:
            case "header":
                self._header(number, record)
            case "recipe" if self.header:
                self.header = self.header | {"recipe": record["recipe"]}
            case "stage":
                self.starts[stage] = record
                self.ends.pop(stage, None)
            case "step":
                self.steps[stage][record["step"]] = record
            case "stage_end":
                self.ends[stage] = record
            case "resume":  # steps after the checkpoint are not in the weights, whether they are redone or not
                kept = {step: old for step, old in self.steps[stage].items() if step <= record["step"]}
                self.steps[stage] = kept
                self.ends.pop(stage, None)
            case "cache":
                self.caches[stage] = record  # its seconds and FLOPs are in the stage's end, too
            case "eval":
                self._eval(number, record)
            case "example":
                self.examples[example_key(record)] = record

    def _header(self, number: int, record: dict[str, Any]) -> None:
        if record["version"] != VERSION:
            self.problems.append(f"line {number}: version {record['version']} is unknown; read as {VERSION}")
        if not self.header:
            self.header = record
            return
        same = all(record.get(key) == self.header.get(key) for key in ("run", "recipe", "samples_hash"))
        self.stranger = 0 if same else number
        if not same:
            self.problems.append(f"line {number}: a second header that differs from the first; left out")

    def _eval(self, number: int, record: dict[str, Any]) -> None:
        if record.get("checkpoint") != self.evaluation.get("checkpoint"):
            self.evaluation = {"checkpoint": record.get("checkpoint")}
        for key in ("scores", "shuffled", "chance", "items"):
            self.evaluation[key] = self.evaluation.get(key, {}) | _numbers(record.get(key))
        points = self.evaluation.setdefault("points", {})
        for task, score in _numbers(record["scores"]).items():
            points.pop(task, None)
            parts = [
                _mapping(record.get(key) or record.get("pictures" if key == "images" else key)).get(task)
                for key in ("points", "images", "questions")
            ]
            if (found := _points(parts, score)) is not None:
                points[task] = found
            elif any(part is not None for part in parts):
                self.problems.append(f"line {number}: points of {task} do not fit its images or its score; left out")

    def run(self) -> Run:
        """What was read so far. Raises `UserError` if no header was."""
        if not self.header:
            found = ", ".join(f"{count} {kind}" for kind, count in self.seen.items()) or "no readable record"
            raise UserError(
                f"{self.file} has no header record; found: {found}. {'; '.join(self.problems[:3])}".rstrip()
            )
        problems = list(self.problems)
        if self.strangers:
            problems.append(f"records of other runs, behind other headers: {self.strangers}; left out")
        for (kind, name), lines in self.nonfinite.items():
            problems.append(f"line {lines[0]}: {kind}: {name} is not finite ({len(lines)} times)")
        # dict.fromkeys: in order of appearance, each once
        stages = [self._stage_run(name, problems) for name in dict.fromkeys([*self.starts, *self.steps, *self.ends])]
        if len(problems) > MOST_PROBLEMS:
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more of the kind"]
        tables = {key: self.evaluation.get(key, {}) for key in ("scores", "shuffled", "chance", "items", "points")}
        tables |= {"examples": list(self.examples.values()), "problems": problems, "caches": dict(self.caches)}
        return Run(self.header["run"], self.header, stages, **tables)

    def _stage_run(self, name: str, problems: list[str]) -> StageRun:
        if name not in self.starts:
            problems.append(f"stage {name}: no stage record; its layout is unknown")
        start, end = self.starts.get(name, {}), _numbers(self.ends.get(name))
        steps = [self.steps[name][number] for number in sorted(self.steps[name])] if name in self.steps else []
        sums = {
            "seconds": math.fsum(step_seconds(step) for step in steps),
            "executed_flops": math.fsum(_numbers(step).get("flops", 0) for step in steps),
            "samples": sum(_numbers(step).get("samples", 0) for step in steps),
        }
        for key, value in sums.items():
            if key in end and value > 1.01 * end[key]:
                problems.append(f"stage {name}: {key} is {end[key]:g} at the end, but its steps add up to {value:g}")
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
            planned_steps=_numbers(start).get("steps"),
            encoding_seconds=_numbers(self.caches.get(name)).get("seconds", 0.0),
        )
