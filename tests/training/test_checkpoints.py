"""`SafeCheckpoints` under the unmodified Trainer: what a signal, an exception or a fault of the machine leaves."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing.util
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ranks_here import forked
from sparsight.errors import UserError
from sparsight.safety import LOCK, MANIFEST, faults, locked
from sparsight.training import checkpoints
from sparsight.training.checkpoints import Interrupted, SafeCheckpoints, explained

STEPS = 8


class Model(nn.Module):
    """Draws from all random generators that a checkpoint keeps, in every pass; fails after ``left`` of them."""

    left = 1000

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        noise = nn.functional.dropout(self.layer(x), 0.5) + random.random() + float(np.random.rand())
        self.left -= 1
        if self.left == -1:
            raise RuntimeError("oh")
        return {"loss": noise.square().mean()}


class Rows(torch.utils.data.Dataset):
    """Calls ``event`` when a row is asked for after ``left`` others."""

    def __init__(self, left: int = 1000, event: Callable[[], None] = lambda: None) -> None:
        self.left, self.event = left, event

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.left -= 1
        if self.left == -1:
            self.event()
        return {"x": torch.full((4,), float(index))}


class At(TrainerCallback):
    """Calls ``event`` at one of the Trainer's events, in one step."""

    def __init__(self, name: str, step: int, event: Callable[[], Any]) -> None:
        setattr(self, name, lambda args, state, control, **_: event() if state.global_step == step else None)


def make(folder: Path, data: Rows | None = None, *others: TrainerCallback, **options: Any) -> tuple[Trainer, Console]:
    console = Console(file=io.StringIO(), width=300)
    common = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": 3, "learning_rate": 0.1}
    common |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 1, "logging_steps": 1}
    common |= {"dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), **(common | options))
    callbacks = [SafeCheckpoints(console), *others]
    return Trainer(Model(), arguments, train_dataset=data or Rows(), callbacks=callbacks), console


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def whole(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*") if not faults(path))


def resumed(folder: Path, straight: Trainer, left_out: int | None = None) -> Console:
    """Go on from the newest whole checkpoint, and compare with the run that nothing happened to; one step may be left
    out of the log."""
    trainer, console = make(folder)
    trainer.train(resume_from_checkpoint=True)
    logs = [{e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (straight, trainer)]
    assert logs[1] == {step: loss for step, loss in logs[0].items() if step != left_out} and len(logs[0]) == STEPS
    ours, theirs = (t.model.state_dict() for t in (trainer, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return console


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("straight")
    trainer, _ = make(folder)
    trainer.train()
    assert whole(folder) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"] and not (folder / LOCK).exists()
    return trainer


def raises(error: BaseException) -> Callable[[], None]:
    def event() -> None:
        raise error

    return event


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("where", ["on_step_begin", "on_save", "on_train_end"])
def test_D04_a_signal_saves_the_step_and_sets_the_code(
    tmp_path: Path, straight: Trainer, name: str, where: str
) -> None:
    number = getattr(signal, name)
    step = {"on_step_begin": 4, "on_save": 3, "on_train_end": STEPS}[where]
    before = signal.getsignal(number)
    event = At(where, step, lambda: os.kill(os.getpid(), number))
    save: dict[str, Any] = {"on_step_begin": {"save_steps": 100}, "on_train_end": {"save_strategy": "no"}}.get(
        where, {}
    )
    trainer, console = make(tmp_path, None, event, **save)
    ends = {"on_step_begin": 5, "on_save": 4, "on_train_end": STEPS}[where]
    with pytest.raises(Interrupted, match=f"{name}: stopped in training at step {ends} of {STEPS}") as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert f"checkpoint-{ends}" in whole(tmp_path) and f"{name}: stopping after this step" in said(console)
    resumed(tmp_path, straight)


def signalled(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """A signal comes while the ranks agree on signals at the end of a step; ``STEPS + 1``: behind the last one."""
    asked = itertools.count(1)

    def agrees(found: int, _: torch.device) -> int:
        if next(asked) == step:
            os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(checkpoints, "largest", agrees)


def test_D04_a_signal_while_the_ranks_agree_is_seen_at_the_next_step(
    tmp_path: Path, straight: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, 4, signal.SIGTERM)
    trainer, _ = make(tmp_path, save_steps=100)
    with pytest.raises(Interrupted, match="SIGTERM: stopped in training at step 5"):
        trainer.train()
    resumed(tmp_path, straight)


def test_D04_a_signal_behind_the_last_step_takes_its_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, STEPS + 1, signal.SIGINT)
    trainer, _ = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert f"checkpoint-{STEPS}" in whole(tmp_path) and not (tmp_path / LOCK).exists()


def test_D04_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer, _ = make(tmp_path, None, At("on_step_begin", 4, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert whole(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("where", ["the data", "the step's begin", "the loss", "the step's end"])
def test_an_exception_saves_the_last_whole_step(tmp_path: Path, straight: Trainer, where: str) -> None:
    event = raises(RuntimeError("oh"))
    at = At("on_step_end" if where == "the step's end" else "on_step_begin", 5, event)
    data = Rows(11 if where == "the data" else 1000, event)
    trainer, console = make(tmp_path, data, *([] if where in ("the data", "the loss") else [at]))
    trainer.model.left = 5 if where == "the loss" else 1000
    with pytest.raises(RuntimeError, match="^oh$"):
        trainer.train()
    step = trainer.state.global_step
    assert step == (4 if where == "the data" else 5)  # a batch is loaded ahead
    assert f"step {step} is saved in {tmp_path / f'checkpoint-{step}'}" in said(console)
    assert f"checkpoint-{step}" in whole(tmp_path)
    resumed(tmp_path, straight, left_out=5 if where == "the step's end" else None)


def test_D12_an_exception_in_the_optimizer_saves_nothing(tmp_path: Path, straight: Trainer) -> None:
    """Some weights have moved, others not."""
    trainer, console = make(tmp_path, None, At("on_optimizer_step", 4, raises(RuntimeError("oh"))))
    with pytest.raises(RuntimeError, match="^oh$"):
        trainer.train()
    assert whole(tmp_path) == ["checkpoint-3"] and "saved" not in said(console)
    resumed(tmp_path, straight)


class Late(TrainerCallback):
    """Writes into a checkpoint what it wants to find there."""

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "mine.json").write_text("{}")


def test_what_other_callbacks_write_is_in_the_manifest(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, None, Late())
    trainer.train()
    assert "mine.json" in json.loads((tmp_path / "checkpoint-3" / MANIFEST).read_text())["files"]


def test_D01_damage_is_passed_over_and_a_named_checkpoint_refused(tmp_path: Path, straight: Trainer) -> None:
    make(tmp_path)[0].train()
    (tmp_path / "checkpoint-8" / "scheduler.pt").unlink()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-6 is damaged \(optimizer.pt: 0 bytes where"):
        make(tmp_path)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    console = resumed(tmp_path, straight)
    assert "scheduler.pt: missing" in said(console) and "optimizer.pt: 0 bytes" in said(console)
    assert {path.name for path in tmp_path.glob("damaged-*")} == {"damaged-checkpoint-6", "damaged-checkpoint-8"}


def test_D12_a_full_disk_leaves_the_checkpoint_before_and_names_the_space(tmp_path: Path, straight: Trainer) -> None:
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "optimizer.pt").symlink_to("/dev/full")
    trainer, _ = make(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint-6 could not be written, the disk is full: it needs about .* GB"):
        trainer.train()
    assert whole(tmp_path) == ["checkpoint-3"]
    assert "damaged-checkpoint-6" in said(resumed(tmp_path, straight))


def test_D12_a_killed_process_that_loads_data_is_told_and_nothing_is_lost(tmp_path: Path, straight: Trainer) -> None:
    def kill() -> None:
        max(psutil.Process().children(), key=psutil.Process.create_time).kill()  # others are of earlier tests
        time.sleep(0.2)

    options: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    trainer, console = make(tmp_path, None, At("on_step_begin", 4, kill), **options)
    with pytest.raises(Exception) as told:
        trainer.train()
    assert "a process that loads data was killed" in explained(told.value)
    assert f"checkpoint-{trainer.state.global_step}" in whole(tmp_path), said(console)
    resumed(tmp_path, straight)


def test_D04_a_launchers_signal_to_what_loads_data_does_not_end_the_step(tmp_path: Path, straight: Trainer) -> None:
    def group() -> None:
        loads = max(psutil.Process().children(), key=psutil.Process.create_time)
        subprocess.run(
            ["kill", "-TERM", str(loads.pid), str(os.getpid())], check=True
        )  # from elsewhere: torch obeys those of the parent
        time.sleep(0.2)

    trainer, console = make(tmp_path, None, At("on_step_begin", 4, group), dataloader_num_workers=1)
    with pytest.raises(Interrupted, match="at step 5 of"):
        trainer.train()
    assert "checkpoint-5" in whole(tmp_path) and "saved in" not in said(console)  # by no exception
    resumed(tmp_path, straight)


def test_D12_what_loads_data_ends_with_the_process_that_it_serves(tmp_path: Path) -> None:
    """Also where an error still holds the loader: nothing but Python's own end ends it then."""

    def work(rank: int) -> None:
        multiprocessing.process._children.clear()  # type: ignore[attr-defined]  # of the process that forked this one
        event = At("on_step_begin", 4, raises(RuntimeError("oh")))
        trainer, _ = make(tmp_path / "run", None, event, dataloader_num_workers=1)
        try:
            trainer.train()
        except RuntimeError:
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]

    assert forked(tmp_path, work, 1, timeout=20) == [0]


def test_D12_memory_in_the_optimizers_step_is_explained(tmp_path: Path, straight: Trainer) -> None:
    """Some weights have moved, so that nothing is saved; the checkpoint before it counts."""
    event = At("on_optimizer_step", 4, raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    trainer, console = make(tmp_path, None, event)
    with pytest.raises(torch.OutOfMemoryError) as told:
        trainer.train()
    assert "out of memory" in (text := explained(told.value)) and "--resume" in text and "\n" not in text
    assert whole(tmp_path) == ["checkpoint-3"] and "saved" not in said(console)
    resumed(tmp_path, straight)


def test_D12_memory_that_cannot_be_had_is_explained(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, None, At("on_step_begin", 4, lambda: torch.empty(2**52)))
    with pytest.raises(RuntimeError) as told:
        trainer.train()
    assert explained(told.value).startswith("out of memory") and "checkpoint-4" in whole(tmp_path)
    assert explained(RuntimeError("unable to mmap 624 bytes: Cannot allocate memory (12)")).startswith("out of memory")
    assert explained(RuntimeError("a bug")) == "" == explained(UserError("DataLoader worker (pid 3)"))


def test_the_output_folder_is_locked_and_late_callbacks_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from sparsight.safety import locked; from pathlib import Path; import sys\n"
               "with locked(Path(sys.argv[1])): pass", str(tmp_path)]  # fmt: skip
    found = []
    event = At("on_step_begin", 1, lambda: found.append(subprocess.run(command, capture_output=True, text=True)))
    make(tmp_path, None, event)[0].train()
    assert f"in use by process {os.getpid()} on" in found[0].stderr
    with locked(tmp_path):
        pass
    trainer = Trainer(Model(), make(tmp_path)[0].args, train_dataset=Rows())
    trainer.add_callback(SafeCheckpoints())
    with pytest.raises(UserError, match="comes too late"):
        trainer.train()


def test_a_limit_of_one_checkpoint_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="give it 2"):
        make(tmp_path, save_total_limit=1)[0].train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="save_total_limit")
        make(tmp_path, save_total_limit=2)[0].train()
