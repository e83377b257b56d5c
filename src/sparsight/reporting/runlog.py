"""The run log (`run.jsonl`): one JSON object a line. Imports no torch.

Units: seconds, bytes, floating-point operations (a multiply-add is 2), scores as fractions of 1. A number that is not
finite is written as `null`, and its dotted name is listed in the record's `nonfinite`.
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
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsight.devices.peaks import cpu_name
from sparsight.errors import UserError

VERSION = 1
FILE_NAME = "run.jsonl"
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pillow", "peft", "trl")
Number = int | float | None  # None: it was not finite


_REQUIRED = {
    "header": ("version", "run"),
    "recipe": ("recipe",),  # in place of the header's, where the run went on with other keys that may change
    "stage": ("stage",),
    "step": ("stage", "step"),
    "stage_end": ("stage",),
    "resume": ("stage", "step"),
    "cache": ("stage", "folder"),
    "note": ("stage", "text"),  # for a person who reads the log; nothing is made of it
    "eval": ("scores",),
    "eval_step": ("stage", "step", "scores"),  # of a subset, during training
    "example": ("id",),
}


class Record(BaseModel):
    """One line of the log, with the keys that are read; others are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    type: str
    nonfinite: list[str] = []
    version: int = VERSION
    run: str = ""
    recipe: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    samples_hash: str | None = None
    stage: str = ""
    step: int = 0
    bridge: str | None = None
    layout: str | None = None
    visual_tokens: Number = None
    visual_tokens_kept: Number = None
    image_size: int | None = None
    steps: int | None = None
    loss: Number = None
    samples: Number = None
    seconds: dict[str, Number] | Number = None  # of a step: data, compute, optimizer
    cpu_seconds: Number = None
    flops: Number = None
    executed_flops: Number = None
    memory_bytes: Number = None
    layers: Number = None
    layers_run: Number = None
    checkpoint: str | None = None
    scores: dict[str, Number] = {}
    shuffled: dict[str, Number] = {}
    chance: dict[str, Number] = {}
    items: dict[str, int] = {}
    points: dict[str, list[float]] = {}
    images: dict[str, list[int]] | int = Field({}, validation_alias=AliasChoices("images", "pictures"))  # older logs
    questions: dict[str, str] = {}
    grades: dict[str, dict[str, list[int | None]]] = {}
    id: str = ""
    task: str = ""
    question: str = ""
    truth: str = ""
    answer: str = ""
    correct: bool | None = None
    image_png_base64: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type not in _REQUIRED:
            raise ValueError(f"type {self.type!r} is not known")
        if missing := [
            key for key in _REQUIRED[self.type] if key not in self.model_fields_set | (self.model_extra or {}).keys()
        ]:
            raise ValueError(f"{self.type} without {missing}")
        return self


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """``value`` in JSON's types; dotted names of numbers that are not finite go to ``nonfinite``."""
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
    """(commit, whether the folder has uncommitted changes); (None, None) if git does not track ``file``."""

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
    loss: list[Number]
    mean: list[Number]

    @property
    def final(self) -> float | None:
        """The last running mean."""
        return next((mean for mean in reversed(self.mean) if mean is not None), None)

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Seconds and samples after which the running mean is first as low as ``loss``; None if it never is."""
        index = next((index for index, mean in enumerate(self.mean) if mean is not None and mean <= loss), None)
        return None if index is None else (self.seconds[index], self.samples[index])


@dataclass(frozen=True)
class StageRun:
    """One stage. Without a `stage_end` record, `finished` is false and totals are sums over `steps`."""

    name: str
    layout: str | None
    bridge: str | None
    visual_tokens: int | None
    image_size: int | None
    samples: float
    seconds: float
    executed_flops: float
    steps: list[dict[str, Any]]
    finished: bool
    planned_steps: int | None = None
    encoding_seconds: float = 0.0  # for cached features, before the first step
    scored: list[dict[str, Any]] = field(default_factory=list)  # `eval_step` records, by step

    @cached_property
    def curve(self) -> Curve:
        seconds = accumulate((step_seconds(step) for step in self.steps), initial=self.encoding_seconds)
        samples = accumulate((step.get("samples") or 0.0 for step in self.steps), initial=0.0)
        losses = [step.get("loss") for step in self.steps]
        return Curve(list(seconds)[1:], list(samples)[1:], losses, running_mean(losses))

    @property
    def cpu_seconds(self) -> float | None:
        """CPU seconds of the steps' process; None where a step has none, as in older logs."""
        return total([step.get("cpu_seconds") for step in self.steps])

    @property
    def data_wait(self) -> float | None:
        """Share of the steps' seconds spent waiting for data; None where there are none."""
        waited = math.fsum((step.get("seconds") or {}).get("data") or 0.0 for step in self.steps)
        seconds = math.fsum(step_seconds(step) for step in self.steps)
        return waited / seconds if seconds else None

    def highest(self, key: str) -> float | None:
        """The highest number that a step has under ``key``."""
        return max((step[key] for step in self.steps if step.get(key) is not None), default=None)


class Points(NamedTuple):
    """Items of one task: scores in [0, 1], the image that each is about, and a hash, equal where the same was asked."""

    scores: list[float]
    images: list[int]
    questions: str
    grades: dict[str, list[int | None]] = {}  # by name; older logs have none


@dataclass(frozen=True)
class Run:
    """A run log. `problems` says which lines could not be read."""

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
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage: folder, and this run's cost

    @property
    def environment(self) -> dict[str, Any]:
        return self.header.get("environment") or {}

    @property
    def recipe(self) -> dict[str, Any]:
        return self.header.get("recipe") or {}

    @property
    def trained(self) -> bool:
        """Whether all of the recipe's stages are finished, also those that have not begun."""
        names = {stage["name"] for stage in self.recipe.get("stages", ())} or {stage.name for stage in self.stages}
        return bool(names) and names <= {stage.name for stage in self.stages if stage.finished}

    @property
    def ended(self) -> bool:
        """Whether nothing more will come: the recipe's stages are finished, and scored if they were to be."""
        evaluation = self.recipe.get("evaluation") or {}
        held_out = set(evaluation.get("held_out") or ())
        scored = held_out <= self.scores.keys()
        if evaluation.get("kind", "none") != "none":
            scored &= bool(self.scores.keys() - held_out)
        return self.trained and scored


def total(values: Sequence[Number]) -> float | None:
    """The sum; None if any value is missing, or there is none."""
    return None if not values or None in values else math.fsum(values)  # type: ignore[arg-type]


def running_mean(values: Sequence[Number]) -> list[Number]:
    """As `Curve` says; None where there is no value."""
    reach = min(25, len(values) // 40)
    means: list[Number] = []
    for index, value in enumerate(values):
        around = [each for each in values[max(0, index - reach) : index + reach + 1] if each is not None]
        means.append(None if value is None else fmean(around))
    return means


def step_seconds(step: Mapping[str, Any]) -> float:
    """Seconds of one step record: data wait, compute and optimizer together."""
    return sum(value or 0.0 for value in (step.get("seconds") or {}).values())


def example_key(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Tells examples apart: several questions may be asked of the image that `id` names."""
    return tuple(str(record.get(key, "")) for key in ("id", "task", "question"))


def log_file(path: str | Path) -> Path:
    """The log of a run, given as the file or its folder. Raises `FileNotFoundError` if there is none."""
    folder = Path(path)
    file = folder / FILE_NAME if folder.is_dir() else folder
    if not file.is_file():
        inside = sorted(str(file.parent) for file in folder.glob(f"*/{FILE_NAME}"))
        hint = f"; there are logs in {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"there is no run log at {file}; expected the folder of a run{hint}")
    return file


def read_run(path: str | Path, live: bool = False) -> Run:
    """Read a run log, given as the file or its folder. Lines that cannot be read are left out, and `problems` says so.

    Args:
        live: the run goes on: a last line without its end is still being written.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds no header.
    """
    file = log_file(path)
    records = Records(str(file))
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") or not live:
            records.take(line)
    return records.run()


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """`read_run` for each path; runs of one name are told apart by their paths.

    Raises `UserError` for a path given twice, and as `read_run` does.
    """
    if twice := [str(path) for path, count in Counter(Path(path).resolve() for path in paths).items() if count > 1]:
        raise UserError(f"given twice: {', '.join(twice)}; expected different runs")
    runs = [read_run(path) for path in paths]
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(path)) if names[run.name] > 1 else run for run, path in zip(runs, paths, strict=True)]


class Records:
    """The state of a run, from its records one after the other."""

    def __init__(self, source: str) -> None:
        self.source, self.lines = source, 0
        self.header: dict[str, Any] = {}
        self.foreign = False  # behind a header of another run
        self.starts: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.scored_steps: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.ends: dict[str, dict[str, Any]] = {}
        self.caches: dict[str, dict[str, Any]] = {}
        self.scored: dict[str, Any] = {}
        self.examples: dict[tuple[str, ...], dict[str, Any]] = {}
        self.left_out: list[str] = []
        self.nonfinite: Counter[str] = Counter()

    def take(self, line: bytes) -> None:
        """Take one line: a record, or one that is left out."""
        self.lines += 1
        if not line.strip():
            return
        try:
            raw = json.loads(line.decode(errors="replace"), parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            self.left_out.append(f"line {self.lines}: cut, or not JSON")
        else:
            self._check(raw)

    def written(self, raw: dict[str, Any]) -> None:
        """Take a record that has just been written, as a reader would find it."""
        self.lines += 1
        self._check(raw)

    def _check(self, raw: Any) -> None:
        try:
            record = Record.model_validate(raw).model_dump(exclude_unset=True)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            self.left_out.append(f"line {self.lines}: {where} {fault['msg']}".replace(":  ", ": "))
        else:
            self.nonfinite.update(record.get("nonfinite", ()))
            self._apply(record["type"], record)

    def _apply(self, kind: str, record: dict[str, Any]) -> None:
        stage: str = record.get("stage", "")
        if kind == "header":
            self.header = self.header or record
            keys = ("run", "recipe", "samples_hash")
            self.foreign = any(record.get(key) != self.header.get(key) for key in keys)
        if self.foreign:
            self.left_out.append(f"line {self.lines}: of another run, behind its own header")
            return
        match kind:
            case "recipe" if self.header:
                self.header = self.header | {"recipe": record["recipe"]}
            case "stage":
                self.starts[stage] = record
                self.ends.pop(stage, None)
            case "step":
                self.steps[stage][record["step"]] = record
            case "eval_step":
                self.scored_steps[stage][record["step"]] = record
            case "stage_end":
                self.ends[stage] = record
            case "resume":  # steps after the checkpoint are not in the weights, whether they are redone or not
                for kept in (self.steps, self.scored_steps):
                    kept[stage] = {step: old for step, old in kept[stage].items() if step <= record["step"]}
                self.ends.pop(stage, None)
            case "cache":
                self.caches[stage] = record  # its seconds and FLOPs are in the stage's end, too
            case "eval":
                self._score(record)
            case "example":
                self.examples[example_key(record)] = record

    def _score(self, record: dict[str, Any]) -> None:
        """Take an evaluation: scores of several evaluations of the same checkpoint stand together."""
        if not self.scored or record.get("checkpoint") != self.scored["checkpoint"]:
            self.scored = defaultdict(dict, checkpoint=record.get("checkpoint"))
        for key in ("scores", "shuffled", "chance", "items"):
            self.scored[key] |= {task: value for task, value in record.get(key, {}).items() if value is not None}
        for task in record["scores"]:
            self.scored["points"].pop(task, None)
            parts = [record.get(key, {}).get(task) for key in ("points", "images", "questions")]
            if None not in parts and len(parts[0]) == len(parts[1]) > 0:
                grades = record.get("grades", {}).get(task, {})
                fit = all(len(own) == len(parts[0]) for own in grades.values())
                self.scored["points"][task] = Points(*parts)._replace(grades=grades if fit else {})

    def run(self) -> Run:
        """The run as far as it was read. Raises `UserError` if there was no header."""
        if not self.header:
            first = f"; {self.left_out[0]}" if self.left_out else ""
            raise UserError(f"{self.source} has no header record in its {self.lines} lines{first}")
        problems = [f"{name} is not finite in {count} records" for name, count in self.nonfinite.items()]
        if self.left_out:
            problems.append(f"lines left out: {len(self.left_out)}; the first is {self.left_out[0]}")
        names = dict.fromkeys([*self.starts, *self.steps, *self.ends])  # in order of appearance, each once
        stages = [self._stage_run(name) for name in names]
        tables = {key: dict(self.scored.get(key, {})) for key in ("scores", "shuffled", "chance", "items", "points")}
        examples = list(self.examples.values())
        return Run(
            self.header["run"], self.header, stages, **tables, examples=examples, problems=problems, caches=self.caches
        )

    def _stage_run(self, name: str) -> StageRun:
        start, end = self.starts.get(name, {}), self.ends.get(name, {})
        steps = [self.steps[name][number] for number in sorted(self.steps.get(name, ()))]

        def of(key: str, each: str) -> float:
            value = end.get(key)
            return math.fsum(step.get(each) or 0.0 for step in steps) if value is None else value

        seconds = end.get("seconds")
        return StageRun(
            name=name,
            layout=start.get("layout"),
            bridge=start.get("bridge"),
            visual_tokens=start.get("visual_tokens"),
            image_size=start.get("image_size"),
            samples=of("samples", "samples"),
            seconds=math.fsum(map(step_seconds, steps)) if seconds is None else seconds,
            executed_flops=of("executed_flops", "flops"),
            steps=steps,
            finished=name in self.ends,
            planned_steps=start.get("steps"),
            encoding_seconds=self.caches.get(name, {}).get("seconds") or 0.0,
            scored=[record for _, record in sorted(self.scored_steps.get(name, {}).items())],
        )


class RunLog:
    """Appends records to one file, each flushed: a killed process loses at most the line it was writing.

    `run` is the state so far, without reading the file. Raises `FileExistsError` when the file exists and `append` is
    false: a log is added to, never overwritten.
    """

    def __init__(self, path: str | Path, append: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = open(self.path, "ab+" if append else "xb+")  # noqa: SIM115 - lives as long as the log
        except FileExistsError:
            raise FileExistsError(f"{self.path} exists; continue it with append=True, or log elsewhere") from None
        self._records = Records(str(self.path))
        self._file.seek(0)
        for line in self._file.readlines() if self.path.is_file() else ():
            self._records.take(line)
            if not line.endswith(b"\n"):  # the last writer was killed within a line; do not join ours to it
                self._file.write(b"\n")

    def write(self, type: str, **fields: object) -> None:
        """Write one record. Raises `TypeError`, naming the field, for a value that has no JSON form."""
        nonfinite: list[str] = []
        record = {"type": type} | {name: _plain(value, name, nonfinite) for name, value in fields.items()}
        record |= {"nonfinite": nonfinite} if nonfinite else {}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._records.written(record)

    def run(self) -> Run:
        """The run as far as it is logged. Raises `UserError` before its header is."""
        return self._records.run()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
