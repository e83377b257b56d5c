"""Processes that start with torch imported: a server imports it once, and forks itself for each process asked for.

What runs there is alone as in a process of its own: neither transformers nor Sparsight is imported, and it may be
killed. Only hashes are seeded alike. Of the seven seconds that most tests' processes take, torch and what transformers
takes of it are five.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What `import transformers` and its Auto classes import of others, by the time that it takes.
MODULES = ("torch", "torch.distributed.tensor", "torch._dynamo", "scipy.optimize", "huggingface_hub", "tokenizers")


class Forks:
    """`run` is subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, ...)."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "import forked; forked.serve()"]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(
        self,
        code: str,
        *arguments: object,
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        timeout: int = 200,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            asked = {"code": code, "arguments": [*map(str, arguments)], "cwd": str(cwd or os.getcwd())}
            asked |= {"env": env or dict(os.environ), "out": folder, "timeout": timeout}
            self.server.stdin.write(json.dumps(asked) + "\n")
            self.server.stdin.flush()
            status = int(self.server.stdout.readline())
            out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        done = subprocess.CompletedProcess([code, *asked["arguments"]], status, out, err)
        if check:
            done.check_returncode()
        return done

    def close(self) -> None:
        self.server.terminate()  # processes forked meanwhile may hold its input open: it would wait for its end
        self.server.wait()


def serve() -> None:
    for name in MODULES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1  # threads do not survive a fork
    assert not {"transformers", "sparsight"} & sys.modules.keys()
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if not (child := os.fork()):
            return become(asked)  # ends as any program does
        until, found = time.monotonic() + asked["timeout"], (0, 0)
        while not found[0]:
            found = os.waitpid(child, os.WNOHANG)
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(found[1])}\n")
        sys.stdout.flush()


def module() -> None:
    """``python -m NAME ARGUMENTS``: `run` with "import forked; forked.module()", NAME, ARGUMENTS."""
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def become(asked: dict) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(asked["out"], name), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["cwd"])
    paths = asked["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = ["", *filter(None, paths), *(path for path in sys.path if path and path not in paths)]
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["-c", *asked["arguments"]]
    random.seed()
    names = sys.modules["__main__"].__dict__  # worker processes find classes there
    names.clear()
    names |= {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(asked["code"], "<string>", "exec"), names)
