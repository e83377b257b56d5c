"""On two ranks of gloo (all_ranks.py): each holds a shard of the bridge."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import sparsight
from tiny import make_vlm

LAYOUT = "1:4,2:2"


def main(folder: Path, kind: str) -> None:
    model = make_vlm(LAYOUT)[0]
    bridge = model.model.multi_modal_projector
    whole = sum(tensor.numel() for tensor in bridge.state_dict().values())
    fully_shard(bridge)
    fully_shard(model)
    shards = [tensor.to_local().numel() for tensor in bridge.state_dict().values()]
    assert sum(shards) < whole  # really sharded
    sparsight.save_bridge(model, folder / "bridge.safetensors")
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.zero_()
    sparsight.load_bridge(model, folder / "bridge.safetensors")
    found = {name: tensor.full_tensor() for name, tensor in bridge.state_dict().items()}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
