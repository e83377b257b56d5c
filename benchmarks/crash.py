"""Kills training at random moments, resumes it, and compares what comes out with a run that nobody killed.

Each trial starts `sparsight train` (two stages, compressor, skipper, LoRA with dropout, a process that loads data),
waits for its kind of moment (in a step; while a checkpoint or a stage's model is written; between stages), sends
SIGKILL or SIGTERM, starts the same with --resume, and compares the files of both stages' models and of the last
checkpoints (weights, optimizer, schedule, random states) bit by bit with the straight run's, by their manifests, and
the losses of all steps. On two ranks, SIGKILL hits one of them, and the other must end by itself; SIGTERM is sent to
both, as launchers do. Faults of the last rank follow: a process that loads data is killed, memory ends, the loss is
NaN, the disk is full; all ranks must end in a minute, each with one line that says what to do, and resume.

Ranks are forked from this process, which has imported all: that is what a start of `sparsight train` does after that.

    nice -n 19 python benchmarks/crash.py [--trials 20] [--pairs 10] [--seed 0] [--work FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from common import write_result
from rich.console import Console
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

import sparsight.cli
import sparsight.pipeline
from sparsight.reporting import read_run
from sparsight.safety import MANIFEST
from sparsight.training.trainer import SparsightTrainer

STAGES, STEPS, EVERY = ("align", "finetune"), 16, 4
KINDS = ("step", "checkpoint", "model", "between")
# Files that name the run's folder, or say whether the model was built in this process or loaded.
NAMING = ("trainer_state.json", "training_args.bin", "config.json", "tokenizer_config.json")
WITHIN = 60.0  # seconds to end in, once one rank or process has died


def recipe(work: Path) -> Path:
    """Two stages of `STEPS` steps, over scenes."""
    torch.manual_seed(2)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**size, patch_size=8, image_size=64)).save_pretrained(work / "encoder")
    shape = {"shortest_edge": 64}, {"height": 64, "width": 64}
    CLIPImageProcessorPil(size=shape[0], crop_size=shape[1]).save_pretrained(work / "encoder")
    stage = {
        "bridge": {"kind": "chain_of_sight", "layout": "1:4,2:1", "width": 32, "heads": 2},
        "image_size": 64,
        "learning_rate": {"bridge": 2e-3, "language": 1e-3},
        "samples": 4 * STEPS,
        "batch_size": 4,
        "checkpoints": STEPS // EVERY,
        "compressor": {"keep": 0.5, "final": 1.0},
        "skipper": {"alpha": 0.5, "epsilon": 0.2},
    }
    values = {
        "name": "crash",
        "vision": str(work / "encoder"),
        "language": {"hidden": 32, "layers": 4, "heads": 2, "intermediate": 64, "vocabulary": 400, "context": 512},
        "precision": "fp32",
        "data": {"kind": "scenes", "scenes": 24, "cutouts": "shapes", "kinds": 8, "max_things": 3, "questions": 2},
        "workers": 1,
        "evaluation": {"kind": "none"},
        "stages": [
            stage | {"name": STAGES[0]},
            stage | {"name": STAGES[1], "lora": {"rank": 4, "dropout": 0.1}},
        ],
    }
    file = work / "crash.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


class Run:
    """`sparsight train` on some ranks, each a fork of this process with a log of its own."""

    def __init__(
        self, file: Path, out: Path, ranks: int, *more: str, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self.out, self.said, self.codes = out, out.with_suffix(f".{len(more)}"), {}
        arguments = ["sparsight", "train", str(file), "--out", str(out), *more]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        self.pids = []
        for rank in range(ranks):
            if pid := os.fork():
                self.pids.append(pid)
                continue
            os.environ |= group | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if group else {})
            if rank == ranks - 1:
                prepare()
            _become(arguments, Path(f"{self.said}-{rank}.log"))

    def poll(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float) -> float:
        """Seconds until all ranks have ended; those that have not by then are killed, with code None."""
        began = time.monotonic()
        while not self.poll():
            if time.monotonic() - began > seconds:
                for rank in set(range(len(self.pids))) - set(self.codes):
                    os.kill(self.pids[rank], signal.SIGKILL)
                    os.waitpid(self.pids[rank], 0)
                    self.codes[rank] = None
                break
            time.sleep(0.01)
        return time.monotonic() - began

    def text(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.out.parent.glob(f"{self.said.name}-*.log")))


def _become(arguments: list[str], said: Path) -> None:
    """In a fork: be the command, and end as it does."""
    code: Any = 1
    try:
        os.setsid()
        number = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1), os.dup2(number, 2)
        sys.argv = arguments
        sparsight.cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def logged(out: Path, stage: str) -> int:
    """Steps of a stage in the log of a living run."""
    file = out / "run.jsonl"
    return file.read_text(errors="ignore").count(f'"type": "step", "stage": "{stage}"') if file.is_file() else 0


def moment(kind: str, out: Path, draw: random.Random) -> tuple[Callable[[], bool], float, str]:
    """What to wait for, how many seconds then, and both in words."""
    stage = draw.choice(STAGES)
    folder = out / stage
    if kind == "step":
        step, wait = draw.randint(1, STEPS - 1), draw.uniform(0, 0.15)
        return lambda: logged(out, stage) >= step, wait, f"{wait:.3f} s after step {step} of {stage}"
    if kind == "checkpoint":
        path = folder / "checkpoints" / f"checkpoint-{EVERY * draw.randint(1, STEPS // EVERY)}"
        wait = draw.uniform(0, 0.03)
        return path.is_dir, wait, f"{wait:.3f} s after {path.relative_to(out)} appeared"
    if kind == "model":
        wait = draw.uniform(0, 0.03)
        return (folder / "model.partial").is_dir, wait, f"{wait:.3f} s after {stage}/model.partial appeared"
    wait = draw.uniform(0, 0.3)
    return (out / STAGES[0] / "model").is_dir, wait, f"{wait:.3f} s after {STAGES[0]}/model appeared"


def _content(value: Any) -> str:
    """A sum of what torch has loaded: tensors by their bytes, all else as text."""
    digest = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, dict):
            for key, inside in each.items():
                digest.update(str(key).encode())
                add(inside)
        elif isinstance(each, list | tuple):
            for inside in each:
                add(inside)
        elif isinstance(each, torch.Tensor | np.ndarray):
            digest.update(np.asarray(each).tobytes())
        else:
            digest.update(repr(each).encode())

    add(value)
    return digest.hexdigest()


def sums(out: Path) -> dict[str, Any]:
    """What the manifests of both models and of the last checkpoints say, and the losses of all steps."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        for folder in (out / stage / "model", out / stage / "checkpoints" / f"checkpoint-{STEPS}"):
            files = json.loads((folder / MANIFEST).read_text())["files"]
            for name, value in files.items():
                if name not in NAMING:  # torch writes what is equal in other bytes, too
                    own = (
                        _content(torch.load(folder / name, weights_only=False))
                        if name[-3:] in (".pt", "pth")
                        else value
                    )
                    found[f"{stage}/{folder.name}/{name}"] = own
    for stage in read_run(out).stages:
        found[stage.name] = [(step["step"], step["loss"]) for step in stage.steps]
    return found


def differences(out: Path, straight: dict[str, Any]) -> list[str]:
    found = sums(out)
    return sorted(name for name in found.keys() | straight.keys() if found.get(name) != straight.get(name))


def state_of(out: Path) -> list[str]:
    """What a kill has left unfinished."""
    checkpoints = [path for path in out.glob("*/checkpoints/checkpoint-*") if not (path / MANIFEST).is_file()]
    return [str(path.relative_to(out)) for path in (*checkpoints, *out.glob("*/model.partial"))]


def resumed(file: Path, out: Path, ranks: int, straight: dict[str, Any]) -> dict[str, Any]:
    again = Run(file, out, ranks, "--resume")
    again.wait(600)
    if set(again.codes.values()) != {0}:
        return {"good": False, "resume_codes": again.codes, "said": again.text()[-2000:]}
    wrong = differences(out, straight)
    aside = sorted(str(path.relative_to(out)) for path in out.rglob("damaged-*"))
    return {"good": not wrong, "differ": wrong, "moved_aside": aside}


def trial(file: Path, work: Path, number: int, ranks: int, seed: int, straight: dict[str, Any]) -> dict[str, Any]:
    """One kill and its resume; a run that ended before its moment is drawn again."""
    kind, name = KINDS[number % 4], ("SIGKILL", "SIGTERM")[number // 4 % 2]
    for attempt in range(20):
        draw = random.Random(f"{seed}/{ranks}/{number}/{attempt}")
        out = work / f"ranks{ranks}-{number}-{attempt}"
        reached, wait, text = moment(kind, out, draw)
        run = Run(file, out, ranks)
        while not run.poll() and not reached():
            time.sleep(0.0005)
        time.sleep(wait)
        if not run.poll():
            break
        if any(run.codes.values()):
            return {"good": False, "when": "before the kill", "codes": run.codes, "said": run.text()[-2000:]}
    victims = [draw.randrange(ranks)] if name == "SIGKILL" else range(ranks)
    for rank in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pids[rank], getattr(signal, name))
    steps = {stage: logged(out, stage) for stage in STAGES}
    seconds = run.wait(WITHIN)
    record = {"kind": kind, "signal": name, "when": text, "seconds_to_end": round(seconds, 2), "codes": run.codes}
    record |= {"steps_logged": steps, "unfinished": state_of(out), **resumed(file, out, ranks, straight)}
    if 128 + signal.SIGTERM in run.codes.values():  # it saved: nothing may be lost
        begun = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines() if '"resume"' in line]
        record["went_on_from"] = [(each["stage"], each["step"]) for each in begun if each.get("type") == "resume"]
        first, last = (max([s for n, s in record["went_on_from"] if n == name], default=0) for name in STAGES)
        lost = steps[STAGES[1]] - last if steps[STAGES[1]] or last else steps[STAGES[0]] - first
        record["steps_lost"] = max(0, lost)
        record["good"] &= lost <= 1
    record["good"] &= seconds < WITHIN and (name == "SIGKILL" or set(run.codes.values()) <= {143, -15, 0})
    return record


def _kill_worker(run: Run) -> None:
    psutil.Process(run.pids[-1]).children()[0].kill()


def _end_memory(run: Run) -> None:
    """Let the process have no more memory than it has, as far as that is counted."""
    now = psutil.Process(run.pids[-1]).memory_info().vms
    resource.prlimit(run.pids[-1], resource.RLIMIT_AS, (now, now))


def _spoil() -> None:
    """Multiply the loss of this process's sixth step by NaN."""
    plain = SparsightTrainer.compute_loss

    def spoiled(trainer: SparsightTrainer, *args: Any, **kwargs: Any) -> Any:
        return plain(trainer, *args, **kwargs) * (math.nan if trainer.state.global_step == 5 else 1.0)

    SparsightTrainer.compute_loss = spoiled


FAULTS: dict[str, Callable[[Run], None]] = {
    "a process that loads data is killed": _kill_worker,
    "memory": _end_memory,
    "the loss is NaN": lambda _: None,  # by `_spoil`
}


def fault(file: Path, work: Path, name: str, ranks: int, straight: dict[str, Any]) -> dict[str, Any]:
    """A fault of the last rank in the first stage's sixth step, or later."""
    out = work / f"{name.replace(' ', '-')}-{ranks}"
    run = Run(file, out, ranks, prepare=_spoil if "NaN" in name else lambda: None)
    while not run.poll() and logged(out, STAGES[0]) < 6:
        time.sleep(0.001)
    FAULTS[name](run)
    return ended(run, name) | resumed(file, out, ranks, straight)


def ended(run: Run, name: str) -> dict[str, Any]:
    seconds = run.wait(WITHIN)
    lines = [line for line in run.text().splitlines() if line.startswith("error:")]
    clear = len(lines) == len(run.pids) and "Traceback" not in run.text()
    return {"fault": name, "seconds_to_end": round(seconds, 2), "codes": run.codes, "said": lines, "clear": clear}


def full_disk(file: Path, work: Path, ranks: int, straight: dict[str, Any]) -> dict[str, Any]:
    """On a file system of memory that holds one checkpoint and not two; then it grows."""
    disk, name = work / f"disk-{ranks}", "the disk is full"
    disk.mkdir()
    size = sum(
        path.stat().st_size
        for path in (work / f"straight-{ranks}/{STAGES[0]}/checkpoints/checkpoint-{STEPS}").iterdir()
    )
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return {"fault": name, "not_run": "no file system can be mounted here"}
    try:
        record = ended(Run(file, disk, ranks), name)
        kept = sorted(path.parent.name for path in disk.rglob(f"checkpoint-*/{MANIFEST}"))
        subprocess.run(["mount", "-o", f"remount,size={200 * size}", str(disk)], check=True)
        return record | {"kept": kept} | resumed(file, disk, ranks, straight)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="on one rank")
    parser.add_argument("--pairs", type=int, default=10, help="on two ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console()
    work = options.work or Path(tempfile.mkdtemp(prefix="crash-"))
    work.mkdir(parents=True, exist_ok=True)
    file = recipe(work)
    result: dict[str, Any] = {"config": {key: str(value) for key, value in vars(options).items() if key != "work"}}
    for ranks, count in ((1, options.trials), (2, options.pairs)):
        if not count and ranks > 1:
            continue
        whole = Run(file, work / f"straight-{ranks}", ranks)
        whole.wait(600)
        assert set(whole.codes.values()) == {0}, whole.text()
        straight = sums(work / f"straight-{ranks}")
        trials = []
        for number in range(count):
            trials.append(trial(file, work, number, ranks, options.seed, straight))
            console.print(f"{ranks} rank(s), {number + 1} of {count}: {trials[-1]}", markup=False, highlight=False)
        good = sum(each["good"] for each in trials)
        console.print(f"{ranks} rank(s): {good} of {count} bit-equal")
        result[f"ranks_{ranks}"] = {"good": good, "of": count, "trials": trials}
        faults = [fault(file, work, name, ranks, straight) for name in FAULTS]
        result[f"faults_{ranks}"] = [*faults, full_disk(file, work, ranks, straight)]
        console.print(result[f"faults_{ranks}"], markup=False)
    write_result("crash", result, options.out, console)


if __name__ == "__main__":
    main()
