"""An end for a training that hangs: a rank in which nothing happens for minutes says where, and who is behind."""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainerCallback

from sparsight.console import printable
from sparsight.devices.ranks import process_state, several_ranks

WAITS_FOR = "SPARSIGHT_TIMEOUT"  # minutes, in the environment
_GATHERS = 10.0  # seconds at most, until all ranks that can have said where they are


def patience() -> float:
    """Seconds that a part of a step, or a checkpoint, may take."""
    return 60 * float(os.environ.get(WAITS_FOR, 20))


class Watchdog(TrainerCallback):
    """Within, ends the process if the Trainer calls none of its callbacks for `patience` seconds. It needs no
    collective, so that it ends ranks that wait in one."""

    def __init__(self, name: str) -> None:
        self.name, self.patience, self.parts, self.since = name, patience(), 0, time.monotonic()
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()

    def _goes_on(self, *_: Any, **__: Any) -> None:
        self.parts, self.since = self.parts + 1, time.monotonic()

    on_step_begin = on_substep_end = on_pre_optimizer_step = on_step_end = on_save = on_evaluate = _goes_on

    def unwatched(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same, which may take as long as it takes."""

        def run(*args: Any) -> Any:
            self.since = math.inf
            try:
                return work(*args)
            finally:
                self._goes_on()

        return run

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.patience / 10)):
            if time.monotonic() - self.since > self.patience:
                frame, rank = sys._current_frames()[threading.main_thread().ident or 0], process_state().process_index
                where = f"{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})"
                text = f"{self.name}: rank {rank} on {socket.gethostname()} hangs in {where} for {self.patience / 60:g}"
                text += f" min{self._behind(rank)}. Go on with --resume; {WAITS_FOR}=MINUTES waits longer\n"
                os.write(2, printable(text).encode())
                os._exit(1)

    def _behind(self, rank: int) -> str:
        """The ranks that say nothing, or have done less than others."""
        if not several_ranks():
            return ""
        names = [f"sparsight hangs {each}" for each in range(torch.distributed.get_world_size())]
        try:
            # A connection of its own: that of the group may be in use by what hangs.
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = torch.distributed.TCPStore(*place, is_master=False, timeout=timedelta(seconds=_GATHERS))
            store.set(names[rank], str(self.parts))
            time.sleep(min(_GATHERS, self.patience / 4))
            done = {each: int(store.get(name)) for each, name in enumerate(names) if store.check([name])}
        except (RuntimeError, KeyError, ValueError):
            return "; the first rank does not answer"
        silent = [str(each) for each in range(len(names)) if each not in done]
        behind = [str(each) for each, parts in done.items() if parts < max(done.values())]
        said = f"; silent: rank {', '.join(silent)}" if silent else ""
        return said + (f"; behind others: rank {', '.join(behind)}" if behind else "")
