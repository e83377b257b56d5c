"""D06: what hangs ends by itself, and says who hangs, and where."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import At, Rows, make, whole
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ranks_here import forked
from sparsight.safety import MANIFEST
from sparsight.training.checkpoints import explained
from sparsight.training.stalls import Watchdog

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def train(folder: Path, data: Rows | None = None, *others: TrainerCallback, **options: Any) -> Trainer:
    """Under the watchdog, as `train_stage` does."""
    trainer, _ = make(folder, data, *others, **options)
    try:
        with Watchdog("stage 'a'") as watchdog:
            trainer.add_callback(watchdog)
            trainer.train()
    except Exception as error:
        sys.stderr.write(explained(error) or str(error))
        raise SystemExit(7) from error
    return trainer


def hangs() -> None:
    time.sleep(1000)


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def full(folder: Path) -> None:
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6" / "optimizer.pt").symlink_to("/dev/full")


@pytest.mark.parametrize(
    "kind, text, left",
    [("dies", "", "24"), ("data", "loads data was killed", "2"), ("disk", "checkpoint-6 could not be written", "24")],
)
def test_D12_a_fault_of_one_rank_ends_both_and_leaves_a_whole_checkpoint(
    tmp_path: Path, kind: str, text: str, left: str
) -> None:
    """The long version, which resumes, is benchmarks/crash.py."""
    folder = tmp_path / "run"

    def dies() -> None:
        end = time.monotonic() + 20
        while not (folder / "checkpoint-2" / MANIFEST).exists() and time.monotonic() < end:  # what loads data is ahead
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def work(rank: int) -> None:
        faulty = rank == 1
        others = [At("on_step_begin", 5, dies)] * (faulty and kind == "dies")
        others += [At("on_step_begin", 5, lambda: full(folder))] * (not faulty and kind == "disk")
        data, workers = (Rows(7, dies), 1) if faulty and kind == "data" else (None, 0)
        train(folder, data, *others, save_steps=2, dataloader_num_workers=workers)

    codes = forked(tmp_path, work, timeout=60)
    at = 0 if kind == "disk" else 1
    said, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (at, 1 - at))
    assert codes[at] == (-signal.SIGKILL if kind == "dies" else 7) and text in said
    assert codes[1 - at] == 7 and "another rank has ended, or cannot be reached" in other
    assert whole(folder) == [f"checkpoint-{step}" for step in left]


def test_D04_a_signal_to_one_rank_ends_both_behind_the_same_step(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        event = At("on_step_begin", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(tmp_path / "run", None, *[event] * rank, save_steps=100)

    assert forked(tmp_path, work, timeout=40) == [128 + signal.SIGTERM] * 2
    assert whole(tmp_path / "run") == ["checkpoint-5"]


@pytest.mark.parametrize("event, told", [(hangs, 1), pytest.param(stops, 0, marks=pytest.mark.long)])
def test_D06_a_rank_that_hangs_is_named_and_all_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: Any, told: int
) -> None:
    """By itself with the place; where it cannot speak, by the others."""
    monkeypatch.setenv("SPARSIGHT_TIMEOUT", str(5 / 60))

    def work(rank: int) -> None:
        train(tmp_path / "run", None, *[At("on_step_begin", 4, event)] * rank)

    codes = forked(tmp_path, work, timeout=20)
    said, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (told, 1 - told))
    if event is hangs:
        assert codes == [1, 1] or (codes == [7, 1] and "another rank has ended" in other)
    else:
        assert codes == [1, "hangs"]  # the one that was stopped
    assert f"stage 'a': rank {told} on " in said and "Go on with --resume" in said
    if event is hangs:
        assert "hangs in hangs (" in said and "test_stalls.py" in said
    else:
        assert "silent: rank 1" in said


def test_D06_a_process_alone_that_hangs_ends_too_and_a_slow_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIGHT_TIMEOUT", str(4 / 60))

    class Slow(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            time.sleep(0.5)
            return super().__getitem__(index)

    assert forked(tmp_path, lambda rank: train(tmp_path / "run", Slow(11, hangs)) and None, 1) == [1]
    said = (tmp_path / "0.txt").read_text()
    assert "rank 0 on " in said and "hangs in hangs (" in said and "silent" not in said and "behind" not in said
    assert said.count("'loss'") == 4  # which took longer, all together


def test_D06_a_process_that_loads_data_and_hangs_is_told() -> None:
    loader = DataLoader(Rows(0, hangs), num_workers=1, timeout=0.5)
    with pytest.raises(RuntimeError) as told:
        next(iter(loader))
    assert "SPARSIGHT_TIMEOUT" in explained(told.value) and "given no batch" in explained(told.value)


def test_D06_the_trainer_waits_so_long_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `SparsightTrainer`, whose loader has processes of its own."""
    from sparsight.training.trainer import SparsightTrainer

    monkeypatch.setenv("SPARSIGHT_TIMEOUT", "3")
    trainer: Any = SparsightTrainer.__new__(SparsightTrainer)
    trainer.train_dataset, trainer.plan, trainer.data_collator = Rows(), [], None
    for workers, wanted in ((0, 0), (2, 180)):
        trainer.args = type("Args", (), {"process_index": 0, "world_size": 1, "dataloader_num_workers": workers,
                                         "dataloader_pin_memory": False})  # fmt: skip
        assert trainer.get_train_dataloader().timeout == wanted
