"""On two ranks of gloo (all_ranks.py): one has images, the other text alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import IMAGE, WORDS, batch_of, made
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach

NAMES = ("sparsight", "llava, clip + llama", "qwen2_5_vl", "qwen3_vl", "smolvlm")
VIDEOS = ("qwen2_5_vl", "qwen3_vl")  # images and videos go through the vision tower one after the other
STEPS, LONG = 3, 50
PROBE_NAME = "llava, clip + llama"


def prepared(name: str, recompute: bool) -> tuple[Any, Any]:
    """A model with both methods on: half of the tokens, up to every other layer, the others scaled."""
    model = made(name)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compressor = CompressorConfig(keep=0.5, method="similarity")
    skipper = SkipperConfig(alpha=0.4, epsilon=0.0, schedule="constant", layers="alternating", inverse_density=True)
    return model, attach(model, compressor, skipper, seed=1)


def batches(name: str, model: Any, step: int) -> list[dict[str, Any]]:
    """What each rank sees: images on the first, text on the second; on odd steps the other way round."""
    if step == STEPS:  # detached: the plain models know no blank images
        return [batch_of(name, model, (1, 1), seed=step)] * 2
    both = [batch_of(name, model, (1, 1), seed=step), batch_of(name, model, (0, 0), seed=100 + step)]
    return both if step % 2 == 0 else both[::-1]


def with_video(name: str, model: Any) -> list[dict[str, Any]]:
    """What each rank sees: an image and a video of one frame on the first, images alone on the second."""
    both = [batch_of(name, model, (1, 1), seed=step) for step in (0, 1)]
    batch, ids = both[0], both[0]["input_ids"]
    ids[1][ids[1] == IMAGE] = WORDS + 3
    batch["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == WORDS + 3).long()
    batch["pixel_values"], batch["pixel_values_videos"] = batch["pixel_values"].chunk(2)
    batch["image_grid_thw"], batch["video_grid_thw"] = batch["image_grid_thw"].chunk(2)
    return both


def labels_in(both: list[dict[str, Any]]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in both)


def loss_of(model: Any, batch: dict[str, Any], total: int, share: int) -> torch.Tensor:
    # Ranks average their gradients: times their number, the mean is the sum over all labels.
    return model(**batch, num_items_in_batch=total).loss * share


def wrapped(model: Any, handle: Any, kind: str) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(model)
    lists = [m for m in model.get_submodule(handle.parts.vision).modules() if isinstance(m, nn.ModuleList)]
    for block in [*handle.layers, *(block for blocks in lists for block in blocks)]:
        fully_shard(block)
    return fully_shard(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in found.items()}


def main(folder: Path, kind: str) -> None:
    rank = dist.get_rank()
    found: dict[Any, Any] = {}
    for name in NAMES:
        for recompute in (False, True):
            model, handle = prepared(name, recompute)
            calls: list[int] = []
            model.get_submodule(handle.parts.vision).register_forward_pre_hook(lambda *_, c=calls: c.append(1))
            parallel = wrapped(model, handle, kind)
            for step in range(STEPS):
                handle.step(step, 0.0)
                both = batches(name, model, step)
                calls.clear()
                loss_of(parallel, both[rank], labels_in(both), 2).backward()
                handle.clear_gradients()
                found[name, recompute, step] = handle.skipped, len(calls), gradients(model)
                model.zero_grad()
            probe = handle.dense_probe()
            assert all(value > 0 for value in probe.values())
            handle.detach()  # sharded or not: what was attached goes
            both = batches(name, model, STEPS)
            # Not through DDP, which would ask the plain LLaVA for gradients of a block that it does not use.
            loss_of(model, both[rank], labels_in(both), 2).backward()
            found[name, recompute, STEPS] = handle.skipped, 1, gradients(model)
    for name in VIDEOS:
        model, handle = prepared(name, False)
        calls = []
        model.get_submodule(handle.parts.vision).register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        parallel, both = wrapped(model, handle, kind), with_video(name, model)
        loss_of(parallel, both[rank], labels_in(both), 2).backward()
        handle.clear_gradients()
        found["video", name] = len(calls), gradients(model)
    model = made(PROBE_NAME)
    handle = attach(model, CompressorConfig(keep=0.25))
    parallel, both = wrapped(model, handle, kind), batches(PROBE_NAME, model, 0)
    loss_of(parallel, both[rank], labels_in(both), 2).backward()
    model.zero_grad()
    found["probe"] = list(handle.dense_probe().values())
    # R03: images and text at random, in another order on each rank.
    model, handle = prepared("llava, clip + llama", False)
    parallel, order = wrapped(model, handle, kind), random.Random(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(LONG):
        handle.step(step, step / LONG)
        batch = batch_of("llava, clip + llama", model, tuple(order.choices((0, 0, 1, 2), k=2)), seed=2 * step + rank)
        loss_of(parallel, batch, 8, 1).backward()
        handle.clear_gradients()
        optimizer.step()
        optimizer.zero_grad()
        found["long", step] = handle.skipped
    found["weights"] = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}
    torch.save(found, folder / f"rank{rank}.pt")
