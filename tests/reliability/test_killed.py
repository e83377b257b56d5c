"""R21 with compressor and skipper on: killed in the middle of a step, and resumed."""

import os
import signal
import sys

import killed
import pytest
import torch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "trl"])
def test_r21_resumed_after_a_kill_is_the_run_that_was_never_killed(fresh, tmp_path, kind):
    code = "import sys, pathlib, killed; killed.train(sys.argv[1], pathlib.Path(sys.argv[2]), 5)"
    # As many threads as here: they order the sums.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = fresh.run(code, kind, tmp_path / "run", env=env, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoint-4").is_dir() and not (tmp_path / "run" / "checkpoint-6").exists()
    resumed, after = killed.train(kind, tmp_path / "run", resume=True)
    whole, straight = killed.train(kind, tmp_path / "whole")
    assert sorted(after.masks) == [4, 5, 6, 7]
    assert after.masks == {step: straight.masks[step] for step in after.masks}
    assert any(any(off) for masks in straight.masks.values() for off, _ in masks)
    keys = ("loss", "keep", "visual_tokens_out", "layers_run", "language_flops", "mean_token_accuracy", "grad_norm")
    logs = [[[e.get(key) for key in keys] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert len(logs[0]) == killed.STEPS and logs[0] == logs[1]
    theirs = resumed.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.model.state_dict().items())
