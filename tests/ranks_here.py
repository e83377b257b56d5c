"""Ranks without a launcher: processes forked from this one, which is the fastest way to several of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState


def forked(folder: Path, work: Callable[[int], None], ranks: int = 2, timeout: float = 60.0) -> list[int | str]:
    """Run ``work`` in each rank; exit codes (negative: of a signal), or "hangs" where it had to be killed. What a rank
    says is in ``folder/RANK.txt``. Nobody ends the others when one ends, unlike under torchrun."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            code = 1
            try:
                _begin(rank, ranks, port, folder)
                work(rank)
                code = 0
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes: dict[int, int | str] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < ranks and time.monotonic() < deadline:
        for rank in set(range(ranks)) - codes.keys():
            if (ended := os.waitpid(children[rank], os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.05)
    for rank in set(range(ranks)) - codes.keys():
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
        codes[rank] = "hangs"
    return [codes[rank] for rank in range(ranks)]


def _begin(rank: int, ranks: int, port: int, folder: Path) -> None:
    sys.stdout = sys.stderr = (folder / f"{rank}.txt").open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)  # threads of the parent are not here
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
