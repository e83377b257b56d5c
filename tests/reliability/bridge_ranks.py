"""Two ranks on gloo, run by `torchrun` from test_r23_bridge.py: each holds a shard of the bridge.

torchrun --nproc-per-node 2 bridge_ranks.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import sparsight
from tiny import make_vlm


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    model = make_vlm("1:4,2:2")[0]
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
