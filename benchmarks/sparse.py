"""Time of a training step with the compressor and the skipper, as ratios to the plain step, beside the executed FLOPs.

SmolLM2-135M behind a Chain-of-Sight bridge of 336 tokens on cached features, batch 8, bf16: forward, backward, and the
optimizer's step. The variants take turns in one process.

    python benchmarks/sparse.py [--device cuda] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import device_name, now, timing_options, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.modeling_outputs import BaseModelOutputWithPooling

import sparsight
from sparsight.config import LayerSkipper, VisualTokenCompressor
from sparsight.cost import LanguageShape, Trains, step_flops
from sparsight.sparse.attach import Pass, attach

BATCH, TEXT, BRIDGE = 8, 32, sparsight.ChainOfSight("cos-336", width=192, heads=3)
KEEP, HALF = VisualTokenCompressor(keep=0.25), LayerSkipper(alpha=0.5, epsilon=0.0, course="constant")
VARIANTS = ("dense", "attached, idle", "half of the layers", "keep 0.25", "both")


def batch_of(model: Any, levels: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    tokens, batch = model.config.num_image_tokens, len(levels[0])
    words = torch.randint(10, 1000, (batch, TEXT), device=levels[0].device)
    image = torch.full((batch, tokens), model.config.image_token_id, device=levels[0].device)
    ids = torch.cat([words[:, : TEXT // 2], image, words[:, TEXT // 2 :]], 1)
    labels = ids.clone()
    labels[:, : tokens + TEXT // 2] = -100
    features = BaseModelOutputWithPooling(hidden_states=levels)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "mm_encoder_outputs": {"image": features}}


def flops_of(model: Any, done: Pass, labels: int, map_size: tuple[int, int]) -> float:
    shape = replace(LanguageShape.from_config(model.config.text_config), layers=done.layers_run)
    trains = Trains(vision=False, bridge=True, language=True)
    parts = step_flops(
        shape, BRIDGE, model.config.level_widths, map_size, 0.0, done.rows, done.length, labels, done.rows, trains
    )
    return sum(parts.values())


def idle_cost(step: Callable[..., Any], batch: dict[str, Any], pairs: int, console: Console) -> dict[str, Any]:
    """What being attached costs by itself: a batch of one, where it weighs most, in pairs that swap their order."""
    times: dict[str, list[float]] = {"dense": [], "attached, idle": []}
    for pair in track(range(pairs), "attached, idle", console=console):
        for variant in sorted(times, reverse=bool(pair % 2)):
            times[variant].append(step(variant, batch)[0]["step"])
    plain, idle = times["dense"], times["attached, idle"]
    ratios = sorted(mine / other for mine, other in zip(idle, plain, strict=True))
    quartiles = (ratios[pairs // 4], ratios[3 * pairs // 4])
    medians = statistics.median(idle) / statistics.median(plain)
    return {"pairs": pairs, "ratio": medians, "ratio_of_pairs": statistics.median(ratios), "quartiles": quartiles}


def main() -> None:
    options, device = timing_options(__doc__)
    console = Console()
    torch.manual_seed(0)
    model, _ = sparsight.build("efficientnet-lite0", "smollm2-135m", BRIDGE)
    model = model.to(device).train()
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        levels = model.eval().model.encode_images(torch.randn(BATCH, 3, 256, 256, device=device))
    model.train()
    batch = batch_of(model, tuple(level.float() for level in levels))
    layers = model.config.text_config.num_hidden_layers
    length = batch["input_ids"].shape[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(variant: str, batch: dict[str, Any] = batch) -> tuple[dict[str, float], Pass]:
        handle = None
        if variant != "dense":
            keep = KEEP if variant in ("keep 0.25", "both") else VisualTokenCompressor(keep=1.0)
            handle = attach(model, keep, HALF)
            handle.off = tuple(bool(n % 2) and variant in ("half of the layers", "both") for n in range(layers))
        marks = [now(device)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(**batch, loss_only=True).loss
        loss.backward()
        marks.append(now(device))
        if handle is not None:
            handle.clear_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(now(device))
        done = Pass(BATCH, length, length, layers, 0, 0)
        if handle is not None:
            (done,) = handle.take_passes()
            handle.detach()
        return {"forward_backward": marks[1] - marks[0], "step": marks[2] - marks[0]}, done

    times: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    passes = {variant: step(variant)[1] for variant in VARIANTS}
    for turn in track(range(options.rounds), "measuring", console=console):
        # There and back: a large step right behind a small one would have to fetch its memory anew.
        for variant in VARIANTS if turn % 2 == 0 else VARIANTS[::-1]:
            times[variant].append(step(variant)[0])
    idle = idle_cost(step, batch_of(model, tuple(level[:1] for level in levels)), 6 * options.rounds, console)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    map_size = tuple(levels[0].shape[1:3])
    flops = {variant: flops_of(model, done, labels, map_size) for variant, done in passes.items()}  # type: ignore[arg-type]
    rows = []
    for variant in VARIANTS:
        row: dict[str, Any] = {"variant": variant, "flops": flops[variant]}
        row["flops_ratio"] = flops[variant] / flops["dense"]
        for key in ("forward_backward", "step"):
            ratios = [mine[key] / dense[key] for mine, dense in zip(times[variant], times["dense"], strict=True)]
            row[f"{key}_seconds"] = statistics.median(t[key] for t in times[variant])
            row[f"{key}_ratio"] = statistics.median(ratios)
            row[f"{key}_spread"] = (min(ratios), max(ratios))
        rows.append(row)
    table = Table(title="time and executed FLOPs of a step, of the dense one's", title_justify="left")
    for column in ("variant", "seconds", "step", "forward + backward", "FLOPs"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        ratios = (f"{row[key]:.3f}" for key in ("step_ratio", "forward_backward_ratio", "flops_ratio"))
        table.add_row(row["variant"], f"{row['step_seconds']:.2f}", *ratios)
    console.print(table)
    console.print(f"attached but idle, batch 1: {idle['ratio']:.4f} of the plain step ({idle['pairs']} pairs)")
    result = {"device": device_name(device), "batch": BATCH, "text": TEXT, "bridge": BRIDGE.model_dump()}
    result |= {"rounds": options.rounds, "precision": "bf16 autocast", "idle": idle, "rows": rows}
    write_result(f"sparse-{device.type}", result, options.out, console)


if __name__ == "__main__":
    main()
