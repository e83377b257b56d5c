"""On two ranks of gloo (all_ranks.py): one has audio, the other text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from audio_families import batch_of, made
from ranks import gradients, labels_in, loss_of
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach

NAME = "AudioFlamingo3"


def batches(model: Any, second: int) -> list[dict[str, Any]]:
    """What each rank sees: a clip in each sample on the first, and so many on the second."""
    return [batch_of(NAME, model, (1, 1)), batch_of(NAME, model, (second, second), seed=1)]


def main(folder: Path, kind: str) -> None:
    rank, found = dist.get_rank(), dict[str, Any]()
    for second in (1, 0):
        model = made(NAME)
        both, handle = batches(model, second), attach(model, CompressorConfig(keep=0.5))
        if kind == "ddp":
            parallel: Any = DistributedDataParallel(model)
        else:
            for block in [*handle.layers, *model.get_submodule(handle.parts.audio).layers]:
                fully_shard(block)
            parallel = fully_shard(model)
        try:
            loss_of(parallel, both[rank], labels_in(both), 2).backward()
            found[str(second)] = gradients(model)
        except ValueError as error:
            found[str(second)] = str(error)
    torch.save(found, folder / f"rank{rank}.pt")
