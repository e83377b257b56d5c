"""R22: killed in the middle of an epoch of packed, mixed shards and resumed, the same samples follow, on one rank or
two; nothing that was had before is read again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import streams
from test_r19_waiting import captions
from test_ranks import free_port

from forked import Forks
from shards import samples, write_tar
from small_runs import save_encoder
from sparsight.reporting.runlog import read_run

KILLED = 7  # steps of ten; a checkpoint is every second one


def launch(fresh: Forks, ranks: int, *arguments: Any) -> tuple[int, str]:
    """Exit code and standard error of streams.py."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if ranks == 1:
        done = fresh.run("import forked; forked.module()", streams.__name__, *arguments, env=env, timeout=240)
    else:
        command = ["torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        command = [sys.executable, "-m", *command, streams.__file__, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    return done.returncode, done.stderr[-3000:]


def learnt(out: Path, rank: int, begin: int = 0) -> list[Any]:
    lines = map(json.loads, (out / f"learnt-{rank}.jsonl").read_text().splitlines())
    return [line for line in lines if line[0] >= begin]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_after_a_kill_the_same_samples_follow(fresh: Forks, tmp_path: Path, ranks: int) -> None:
    save_encoder(tmp_path / "encoder")
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", samples(0, 9))
    write_tar(tmp_path / "shards" / "b.tar", samples(9, 7))
    captions(tmp_path, 8)

    code, said = launch(fresh, ranks, tmp_path, "whole", f"cut:{KILLED}")
    assert code == (-signal.SIGKILL if ranks == 1 else 1), said
    whole = [learnt(tmp_path / "whole", rank) for rank in range(ranks)]
    ids = [name for stream in whole for _, names in stream for name in names]
    assert len(ids) == 60 and {name.split("/")[0] for name in ids} == {"tars", "rows"}
    assert all(len(names) == 6 // ranks for stream in whole for _, names in stream)

    before = {rank: learnt(tmp_path / "cut", rank) for rank in range(ranks)}
    assert all(stream == whole[rank][: len(stream)] for rank, stream in before.items())
    (tmp_path / "cut" / "decoded").unlink()
    for rank in range(ranks):
        (tmp_path / "cut" / f"learnt-{rank}.jsonl").unlink()
    code, said = launch(fresh, ranks, tmp_path, "cut:resume")
    assert code == 0, said
    began = KILLED // 2 * 2
    for rank in range(ranks):
        assert learnt(tmp_path / "cut", rank) == learnt(tmp_path / "whole", rank, began)
    read = (tmp_path / "cut" / "decoded").read_text().splitlines()
    assert len(read) == 6 * (10 - began)  # one image a sample
    steps = [{step["step"]: step["loss"] for step in read_run(tmp_path / run / "run").stages[0].steps} for run in
             ("whole", "cut")]  # fmt: skip
    assert len(steps[0]) == 10 and steps[0] == steps[1]
    assert not (tmp_path / "whole" / "run" / "pretrain" / "model.partial").exists()
