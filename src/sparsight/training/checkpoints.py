"""Checkpoints that are whole or do not count, for any Trainer of transformers, and ends that lose nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.text import Text
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sparsight.aside import moved_aside
from sparsight.console import Console
from sparsight.devices.ranks import from_first, largest, process_state, several_ranks
from sparsight.errors import UserError
from sparsight.safety import check_manifest, describe, faults, locked, naming_space, write_manifest
from sparsight.sparse.callback import _caller
from sparsight.training.stalls import WAITS_FOR

STATE = "trainer_state.json"
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_LAUNCHER = 3.0  # seconds within which torchrun passes on a signal that its ranks have had already


class Interrupted(SystemExit):
    """A signal stopped the run, and its last step is in a checkpoint. A process that does not catch it ends with
    ``code``, 128 and the signal's number, as shells have it."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.code: int = 128 + number


class StopSignals:
    """Within, the first SIGINT, SIGTERM or SIGHUP is kept as ``number``; the second one ends the process at once. One
    that is there at the end takes its effect then, unless an error ends it."""

    def __init__(self, told: Callable[[str], None] | None = None) -> None:
        self.told, self.number, self.since = told, 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.mine, self.number = os.getpid(), 0
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self.before[number] = signal.signal(number, self._noted)
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: Any) -> None:
        while self.before:
            number, before = self.before.popitem()
            signal.signal(number, signal.SIG_DFL if before is None else before)
        if self.number and error is None:
            os.kill(self.mine, self.number)

    def _noted(self, number: int, _: Any) -> None:
        if os.getpid() != self.mine:  # a process that loads data: the terminal signals it too, but its work is needed
            return
        if self.number:
            if "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self.since > _LAUNCHER:
                self.number = number
                self.__exit__()
            return
        self.number, self.since = number, time.monotonic()
        if self.told is not None:
            with suppress(RuntimeError):  # it came in the middle of another print
                self.told(f"{signal.Signals(number).name}: stopping after this step; a second one stops at once")


@contextmanager
def held(folder: Path, shared: bool = True) -> Iterator[None]:
    """`locked`, on all ranks; the first rank first.

    Raises:
        UserError: another run holds it; or it is to be ``shared`` by all ranks, and is not.
    """
    rank = process_state().process_index
    with ExitStack() as stack:
        with process_state().main_process_first():
            seen = stack.enter_context(locked(folder, rank))
        blind = gather_object([] if seen else [f"rank {rank} on {socket.gethostname()}"])
        if shared and blind:
            raise UserError(
                f"{folder} is another folder for {', '.join(blind)} than for the first rank: all need the same one, on "
                "a disk that all machines share"
            )
        yield


def last_checkpoint(folder: str | Path, console: Console | None = None) -> str | None:
    """The newest checkpoint in a folder that is as it was saved, None if there is none. Damaged ones, and those cut
    short by a kill, are named and moved aside; nothing is deleted.

    Raises:
        OSError: the disk cannot be read; then nothing is moved.
    """
    while Path(folder).is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        path = Path(found)
        wrong = faults(path)
        if not wrong and path.name != (name := f"checkpoint-{json.loads((path / STATE).read_bytes())['global_step']}"):
            wrong = {STATE: f"this is {name}"}
        if not wrong:
            return found
        new = moved_aside(path, f"damaged-{path.name}")
        text = f"{found} is damaged ({describe(wrong)}) and passed over; it is now {new}"
        (console or Console()).print(Text(text, style="yellow"), soft_wrap=True)
    return None


def agreed_checkpoint(folder: Path, console: Console) -> str | None:
    """`last_checkpoint`, as the first rank finds it.

    Raises:
        UserError: this rank does not see it.
    """
    found = from_first(last_checkpoint(folder, console) if process_state().is_main_process else None)
    if found and not Path(found).is_dir():
        rank = process_state().process_index
        raise UserError(f"rank {rank} does not see {found}: all ranks need the same folder, on a shared disk")
    return found


class SafeCheckpoints(TrainerCallback):
    """Makes any Trainer of transformers safe to kill: give it to the Trainer as one of its ``callbacks``.

    A checkpoint counts only when its manifest of SHA-256 sums is there and true; it is written last, behind a flush of
    all files to the disk. ``train(resume_from_checkpoint=True)`` goes on from the newest whole one, and moves others
    aside. The first SIGINT, SIGTERM or SIGHUP ends the step, saves, and raises `Interrupted`, on all ranks together;
    an exception saves the last whole step (on one rank: others may wait in a collective). While it trains, the output
    folder is locked.

    Args:
        console: where is told what is saved, moved aside, and why training stopped; the terminal if not given.
        name: what is trained, as messages call it.
        checked: a checkpoint whose manifest was compared already.
    """

    def __init__(self, console: Console | None = None, name: str = "training", checked: str | None = None) -> None:
        self.checked = checked
        self.console, self.name = console or Console(quiet=os.environ.get("RANK", "0") != "0"), name
        self.signals = StopSignals(self._say)
        self.trainer: Any = None
        self.trains = multiprocessing.RawValue("b", 0)  # seen by processes that load data
        self.began = self.updating = -1
        self.random: tuple[Any, ...] = (-1,)

    def _say(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def on_init_end(self, *_: Any, **__: Any) -> None:
        self.trainer = _caller("callback_handler")
        self.trainer.train = partial(self._train, self.trainer.train)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **given: Any) -> None:
        """Raises UserError where it was added to a Trainer that was there already."""
        if self.trainer is None:
            raise UserError("SafeCheckpoints comes too late by add_callback; give it to Trainer(callbacks=[...])")
        handler = self.trainer.callback_handler
        handler.callbacks = [each for each in handler.callbacks if each is not self] + [self]  # what others save, too
        if args.save_total_limit == 1:
            warnings.warn(
                "save_total_limit=1: the Trainer deletes the last checkpoint before the new one is known to be on the "
                "disk; give it 2",
                stacklevel=2,
            )
        loader: Any = given.get("train_dataloader")
        loader = getattr(loader, "base_dataloader", loader)  # inside of accelerate's
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = partial(_outlive, loader.worker_init_fn, self.trains)
        self.began = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.updating = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.random = state.global_step, random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda
        if self._stopped(args):
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        folder = self._folder()
        process_state().wait_for_everyone()  # all have written their shards
        if args.should_save and folder.is_dir():
            write_manifest(folder)

    def _stopped(self, args: TrainingArguments) -> int:
        """The signal that any rank has had, on all ranks. One that comes meanwhile is seen at the next step."""
        agreed = largest(self.signals.number, args.device)
        self.signals.number = self.signals.number or agreed
        return agreed

    def _train(self, train: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        own, trainer, resume = self.trainer.args, self.trainer, resume_from_checkpoint
        with held(Path(own.output_dir), not own.save_on_each_node), self.signals:
            if resume is True:
                resume = agreed_checkpoint(Path(own.output_dir), self.console) or True
            elif resume and resume != self.checked and process_state().is_main_process:
                check_manifest(resume)
            self.trains.value = 1
            try:
                result = train(resume, *args, **kwargs)
                if not (number := self._stopped(own)):
                    return result
                if not self._folder().is_dir():  # it came after the last step
                    self._save()
            except Exception as error:
                self._rescue()
                number = self.signals.number if explained(error) and not several_ranks() else 0
                if not number:  # else a launcher's signal ended what loads data, too
                    with self._naming_space():
                        raise error
            finally:
                self.trains.value = 0
            step, steps = trainer.state.global_step, trainer.state.max_steps
            text = f"{signal.Signals(number).name}: stopped in {self.name} at step {step} of {steps}"
            raise Interrupted(text, number)

    def _folder(self) -> Path:
        return Path(self.trainer.args.output_dir, f"checkpoint-{self.trainer.state.global_step}")

    def _naming_space(self) -> AbstractContextManager[None]:
        return naming_space(self._folder(), partial(_bytes, self.trainer), "Checkpoints before it are whole")

    def _save(self) -> None:
        trainer = self.trainer
        with self._naming_space():
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def _rescue(self) -> None:
        """After an exception: save the last whole step, as it was at its end."""
        step = self.trainer.state.global_step
        if self._folder().is_dir() or several_ranks() or self.began < 0 or step in (self.began, self.updating):
            return
        before = None
        with suppress(ValueError, AttributeError):  # in a thread, on Windows
            before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises again for a dead loader
        try:
            if self.random[0] == step:  # else another callback failed at its end, and nothing was drawn since
                random.setstate(self.random[1])
                np.random.set_state(self.random[2])
                torch.set_rng_state(self.random[3])
                torch.cuda.set_rng_state_all(self.random[4])  # of none, nothing
            self._save()
            self._say(f"{self.name}: step {step} is saved in {self._folder()}")
        except Exception as another:
            self._say(f"{self.name}: step {step} could not be saved: {another}")
        finally:
            if before is not None:
                signal.signal(signal.SIGCHLD, before)


def _outlive(first: Callable[[int], None] | None, trains: Any, worker: int) -> None:
    """Begin a process that loads data: a launcher signals all of them, but its work is needed until the step ends.
    The second signal ends it, and one behind the training, by which the process that it serves ends it."""

    def noted(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not trains.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, noted)
    if first is not None:
        first(worker)


def _bytes(trainer: Any) -> int:
    """Of a checkpoint: weights, buffers, and the optimizer's state."""
    states = getattr(trainer.optimizer, "state", {}).values()
    tensors = [*trainer.model.state_dict().values(), *(each for state in states for each in state.values())]
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, torch.Tensor))


def explained(error: BaseException) -> str:
    """What an error of the machine means to a user, and what to do; empty for other errors."""
    text = str(error)
    if isinstance(error, UserError):
        return ""
    if "DataLoader worker (pid" in text or isinstance(error, EOFError | ConnectionError):
        why = "a process that loads data was killed, perhaps for want of memory: lower workers, or free memory"
    elif "DataLoader timed out" in text:
        why = f"the processes that load data have given no batch: does a disk hang? {WAITS_FOR} minutes are waited"
    elif isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        why = "out of memory outside of a pass over a batch: lower micro_batch_size or batch_tokens, or free memory"
    elif several_ranks() and any(each in text.lower() for each in ("gloo", "nccl", "peer", "connection", "socket")):
        why = "another rank has ended, or cannot be reached; see what it says"
    else:
        return ""
    return f"{why}. Go on with --resume ({next(iter(text.splitlines()), type(error).__name__):.200})"
