"""On two ranks of gloo (all_ranks.py): what AdamW does to a layer that is skipped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import batch_of, made
from ranks import wrapped

from sparsight.settings.methods import SkipperConfig
from sparsight.sparse.attach import attach

NAME = "llava, clip + llama"
SKIPPED = 1  # number of the layer
STEPS = ("run", "skipped", "run")


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(folder: Path, kind: str) -> None:
    rank = dist.get_rank()
    model = made(NAME)
    handle = attach(model, skipper=SkipperConfig(alpha=0.5, epsilon=0.0))
    parallel = wrapped(model, handle, kind)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1, weight_decay=0.5)
    found: dict[str, list[torch.Tensor]] = {}
    for step, name in enumerate(STEPS):
        handle.step(step, 1.0)  # at its end, no layer is skipped
        handle.set_skipped(tuple(name == "skipped" and number == SKIPPED for number in range(handle.parts.layers)))
        parallel(**batch_of(NAME, model, (1, 1), seed=2 * step + rank)).loss.backward()
        handle.clear_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # a skipped layer would be decayed by what is left from the step before
        parameters = list(handle.layers[SKIPPED].parameters())
        states = [optimizer.state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")]
        found[f"{step}"] = [whole(tensor) for tensor in (*parameters, *states)]
    told = []
    if kind == "ddp":  # a loop that forgets: FSDP leaves no gradients behind
        handle.set_skipped(tuple(number == SKIPPED for number in range(handle.parts.layers)))
        parallel(**batch_of(NAME, model, (1, 1), seed=rank)).loss.backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            handle.step(len(STEPS), 1.0)
        told = [str(warning.message) for warning in caught]
    torch.save({"tensors": found, "told": told}, folder / f"rank{rank}.pt")
