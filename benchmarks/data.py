"""What batching, packing and the feature cache do to the time of training, and how long it waits for data.

Packing: SmolLM2-135M behind a Chain-of-Sight bridge on cached features; forward, backward and optimizer's step on
batches of at most 2,048 positions. Answers are as long as captions that people wrote: the first lines of the 952
English descriptions that come with the images of Tux Paint's stamps (tokens of SmolLM2). The ways of batching take
turns in one process.

Waiting and cache: the stage `pretrain` of `recipes/demo.yaml`, shortened, with the cache and without.

    python benchmarks/data.py [--device cuda] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import device_name, now, timing_options, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sparsight
from sparsight.data.batching import plan_steps
from sparsight.data.chat import encode_conversation
from sparsight.data.collate import Collator
from sparsight.devices.precision import precision_on
from sparsight.pipeline import autocast, run
from sparsight.reporting.runlog import read_run, step_seconds
from sparsight.settings.load import load_comparison
from sparsight.settings.recipe import Recipe

# How many of the captions have 0, 1, 2, ... tokens.
CAPTIONS = [0, 0, 16, 196, 348, 117, 67, 27, 22, 28, 10, 40, 18, 9, 6, 11, 8, 6, 2, 3, 2, 2, 1, 0, 1, 0, 1, 0, 1, 0, 1]
CAPTIONS += [0, 2, 0, 0, 0, 0, 4, 0, 1, 0, 1, 1]
POSITIONS, SAMPLES, BATCHES = 2048, 2000, 3
LAYOUTS = ("cos-32", "cos-80")
WAYS = ("padded", "sorted by length", "rows of 256", "one row")


def caption_items(processor: Any, levels: Any, samples: int) -> list[dict[str, Any]]:
    """Samples with cached features, whose answers are as long as people's captions."""
    words = np.random.default_rng(1).choice(len(CAPTIONS), samples, p=np.array(CAPTIONS) / sum(CAPTIONS))
    items = []
    for count in words:
        talk = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
            {"role": "assistant", "content": " dog" * int(count)},
        ]
        encoded = encode_conversation(processor.tokenizer, talk, processor.image_token, processor.num_image_tokens)
        items.append({"id": "", "input_ids": encoded.input_ids, "labels": encoded.labels, "features": levels})
    return items


def batches_of(way: str, lengths: np.ndarray) -> list[list[int]]:
    """Sample numbers of each batch."""
    if way == "padded":  # in random order, as many as fit
        batches: list[list[int]] = [[]]
        for index in np.random.default_rng(0).permutation(len(lengths)).tolist():
            if max(lengths[[*batches[-1], index]]) * (len(batches[-1]) + 1) > POSITIONS:
                batches.append([])
            batches[-1].append(index)
        return batches
    if way == "rows of 256":  # of the size of which eight rows are full
        ways: dict[str, Any] = {"batch_size": int(POSITIONS / lengths.mean()), "packing": True}
    else:
        ways = {"batch_tokens": POSITIONS, "packing": way == "one row"}
    sizes = np.stack([lengths, np.ones_like(lengths)], 1)
    return [batch for step in plan_steps(len(lengths), 0, 1, sizes, **ways) for batch in step]


def packing(layout: str, rounds: int, device: torch.device, console: Console) -> list[dict[str, Any]]:
    bridge = sparsight.ChainOfSightConfig(layout, width=192, heads=3)
    model, processor = sparsight.build("efficientnet-lite0", "smollm2-135m", bridge)
    model = model.to(device)
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        levels = model.model.encode_images(torch.randn(1, 3, 256, 256, device=device))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    items = caption_items(processor, levels, SAMPLES)
    lengths = np.array([len(item["input_ids"]) for item in items])

    def step(way: str, indices: list[int]) -> tuple[float, int, int]:
        collate = Collator(0, way in WAYS[2:], {"rows of 256": 256, "one row": POSITIONS}.get(way))
        batch = collate([items[index] for index in indices])
        info = batch.pop("info")
        batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        start = now(device)
        with autocast("auto", device):
            loss = model(**batch, loss_only=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (now(device) - start) / len(indices), batch["input_ids"].numel(), info["filled"]

    plans = {way: batches_of(way, lengths) for way in WAYS}
    found: dict[str, list[tuple[float, int, int]]] = {way: [] for way in WAYS}
    for way in WAYS:
        step(way, plans[way][0])
    for turn in track(range(rounds), f"{layout}, batches", console=console):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            found[way] += [step(way, indices) for indices in plans[way][turn * BATCHES : (turn + 1) * BATCHES]]
    plain = statistics.median(each[0] for each in found["padded"])
    return [
        {
            "layout": layout,
            "way": way,
            "mean_length": float(lengths.mean()),
            "samples_in_a_batch": len(lengths) / len(plans[way]),
            "filled": sum(each[2] for each in found[way]) / sum(each[1] for each in found[way]),
            "seconds_per_sample": statistics.median(each[0] for each in found[way]),
            "spread": (min(each[0] for each in found[way]), max(each[0] for each in found[way])),
            "ratio": statistics.median(each[0] for each in found[way]) / plain,
        }
        for way in WAYS
    ]


def demo_stage(cached: bool, folder: Path, console: Console) -> dict[str, Any]:
    """The demo's pre-training, Chain-of-Sight, for 60 steps on 400 images."""
    recipe = load_comparison(Path(__file__).parent.parent / "recipes" / "demo.yaml").recipes()[1]
    values = recipe.model_dump(mode="json")
    values["data"] |= {"scenes": 400}
    values["stages"] = [values["stages"][1] | {"samples": 1920, "cache_features": cached, "checkpoints": 0}]
    values["evaluation"] = {"kind": "none"}
    run(Recipe.model_validate(values), folder, console)
    (stage,) = read_run(folder).stages
    end = json.loads((folder / "run.jsonl").read_text().splitlines()[-1])
    return {
        "cache_features": cached,
        "seconds_per_step": statistics.median(step_seconds(step) for step in stage.steps),
        "data_wait": end["data_wait"],
        "seconds": end["seconds"],
        "encoding_seconds": end["encoding_seconds"],
    }


def main() -> None:
    options, device = timing_options(__doc__)
    console = Console()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        stages = [demo_stage(cached, Path(name) / str(cached), console) for cached in (True, False)]
    rows = list(itertools.chain(*(packing(layout, options.rounds, device, console) for layout in LAYOUTS)))
    table = Table(title=f"time per sample on batches of {POSITIONS} positions, of the padded one", title_justify="left")
    for column in ("layout", "way", "filled", "ms", "ratio"):
        table.add_column(column, justify="left" if column in ("layout", "way") else "right")
    for row in rows:
        figures = (f"{row['filled']:.1%}", f"{row['seconds_per_sample'] * 1e3:.1f}", f"{row['ratio']:.3f}")
        table.add_row(row["layout"], row["way"], *figures)
    console.print(table)
    for stage in stages:
        console.print(stage)
    result = {"device": device_name(device), "positions": POSITIONS, "rounds": options.rounds}
    result |= {"precision": precision_on(device, "auto"), "packing": rows, "demo": stages}
    write_result(f"data-{device.type}", result, options.out, console)


if __name__ == "__main__":
    main()
