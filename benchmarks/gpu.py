"""What one GPU makes of it, in at most eight minutes: speed, memory, methods, compile, and a row of quality.

A CLIP-L/14 at 336 px and a Llama of 7B (random weights) with LoRA in bf16, images encoded in the step. Groups, in this
order; each is written as soon as it is measured, so that a run that is cut still tells:

- `trainer`: a step in Hugging Face's Trainer: transformers' own LLaVA with its 576 tokens, and ours with 576, 336, 80
  and 32. Peak memory stands beside the forecast of `sparsight plan`.
- `methods`, `compile`: as in speed.py.
- `quality`: the demo, as long as the time that is left; its scores.

    python benchmarks/gpu.py [--minutes 8] [--rounds 5] [--batch 8] [--layers 16] [--only GROUP ...] [--out FILE]

`--device cpu` runs the same on tiny sizes, to see that it runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import device_name, now, result_file, timing_options, write_result
from peers import CLIP, build_llava
from rich.console import Console
from speed import TEXT, Bench, measure
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from sparsight import ChainOfSightConfig
from sparsight.cost import forecast
from sparsight.devices.precision import precision_on
from sparsight.settings.recipe import Recipe

LAYOUTS = {576: "1:64,8:8", 336: "cos-336", 80: "cos-80", 32: "cos-32"}
TINY = (
    {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2},
    {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 336},
    {"width": 32, "heads": 2},
)
LLAVA = "peer: LLaVA of transformers, 576 tokens"
WARM = 2  # steps before the clock counts
NEEDED = {"trainer": 0, "methods": 60, "compile": 120, "quality": 60}  # seconds that must be left for a group to begin


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = now(self.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now(self.device) - self.began)


def whole_llava(bench: Bench) -> tuple[Any, int]:
    """transformers' LLaVA with its tower, and how many tokens it gives an image."""
    image_id = bench.model("linear")[0].config.image_token_id
    clip = bench.sizes[1] if bench.sizes else CLIP
    model, projector = build_llava(bench.language, image_id, clip)
    model.model.vision_tower, model.model.multi_modal_projector = bench.vision.requires_grad_(False), projector
    return model.train(), 576


def whole_ours(bench: Bench, layout: str) -> tuple[Any, int]:
    model = bench.model(ChainOfSightConfig(layout, **bench.width))[0]
    return model, model.config.num_image_tokens


def in_trainer(bench: Bench, model: Any, tokens: int, rounds: int, collate: Callable[[Any], Any]) -> dict[str, Any]:
    """Median seconds of a step in the Trainer, and bytes at its peak."""
    image_id = bench.model("linear")[0].config.image_token_id
    batch = {**bench.inputs(tokens, image_id, 1), "pixel_values": torch.randn(1, 3, 336, 336)}
    item = {key: value[0].cpu() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    clock, cuda = Clock(bench.device), bench.device.type == "cuda"
    model.config.use_cache = model.config.get_text_config().use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=WARM + rounds,
            per_device_train_batch_size=bench.batch,
            learning_rate=1e-6,
            optim="adamw_torch_fused",
            bf16=bench.stored == torch.bfloat16,
            use_cpu=not cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(
            model, arguments, train_dataset=[item] * bench.batch, data_collator=collate, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"seconds": statistics.median(clock.seconds[WARM:]), "memory_bytes": peak, "batch": bench.batch}


def lean(items: list[Any]) -> dict[str, Any]:
    """As `sparsight train` calls our model."""
    return {**default_data_collator(items), "loss_only": True}


def expected_bytes(bench: Bench, layout: str) -> float:
    """The peak of a step as `sparsight plan` forecasts it, for the layers that there are."""
    stage = {"name": "lora", "bridge": {"kind": "chain_of_sight", "layout": layout}, "lora": {"rank": 16}}
    stage |= {"learning_rate": {"bridge": 1e-5, "language": 1e-5}, "samples": 1024, "batch_size": bench.batch}
    stage |= {"conversation": {"text": TEXT, "supervised": TEXT // 2}}
    language = {"path": "llama-2-7b"}
    recipe = {"name": "gpu", "vision": "clip-l-14-336", "language": language, "data": {"kind": "json", "path": "none"}}
    recipe |= {"precision": "bf16", "stages": [stage], "language_layers": bench.language.config.num_hidden_layers}
    return sum(forecast(Recipe.model_validate(recipe))[0].memory().values())


def trainer(bench: Bench, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Rows of LLaVA and of ours; the batch is halved until LLaVA's fits."""
    rows: list[dict[str, Any]] = []
    while True:
        try:
            rows = [{"variant": LLAVA} | in_trainer(bench, *whole_llava(bench), rounds, default_data_collator)]
            break
        except torch.OutOfMemoryError:
            if bench.batch == 1:
                raise
        bench.batch //= 2  # here, as the error holds on to the memory
        bench.free()
    for tokens, layout in LAYOUTS.items():
        bench.free()
        row = {"variant": f"ours, {tokens} tokens"} | in_trainer(bench, *whole_ours(bench, layout), rounds, lean)
        if row["memory_bytes"]:
            row["forecast_bytes"] = expected_bytes(bench, layout)
        rows.append(row | {"time_ratio": row["seconds"] / rows[0]["seconds"]})
        console.print(f"{row['variant']}: {row['seconds']:.3f} s, {rows[-1]['time_ratio']:.3f} of LLaVA's")
    return rows


def quality(seconds: float, short: bool) -> list[dict[str, Any]]:
    """Scores of the demo's two pipelines, if they end in time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "sparsight",
            "demo",
            "--out",
            f"{folder}/demo",
            *(["--short"] if short else []),
        ]
        try:
            subprocess.run(command, check=True, timeout=seconds, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return [{"variant": "demo", "left_out": f"not done in the {seconds:.0f} s that were left"}]
        runs = json.loads((Path(folder) / "demo/comparison.json").read_text(encoding="utf-8"))["runs"]
    return [{"variant": f"demo, {run['name']}", "scores": run["scores"], "seconds": run["seconds"]} for run in runs]


def measured(group: str, bench: Bench | None, options: Any, left: Callable[[], float], console: Console) -> Any:
    """The rows of a group."""
    if left() < NEEDED[group]:
        return [{"variant": group, "left_out": f"{left():.0f} s were left, it needs {NEEDED[group]}"}]
    if group == "quality":
        return quality(left(), short=options.device == "cpu")
    assert bench is not None
    with bench.training("lora"):
        if group == "trainer":
            return trainer(bench, options.rounds, console)
        return measure(group, bench, options.rounds, console)


def main() -> None:
    numbers: dict[str, Any] = {"layers": {"type": int}, "batch": {"type": int, "default": 8}}
    numbers["minutes"] = {"type": float, "default": 8.0}
    options, device = timing_options(
        __doc__, only={"nargs": "+", "choices": list(NEEDED), "default": list(NEEDED)}, **numbers
    )
    end = time.perf_counter() + 60 * options.minutes
    console, name, groups, bench = Console(), f"gpu-{device.type}", list[dict[str, Any]](), None
    out = result_file(name, options.out)
    torch.manual_seed(0)

    def over() -> None:
        os.write(1, f"{options.minutes} minutes are over: what was not written is left out\n".encode())
        os._exit(0)  # also out of a compiler

    timer = threading.Timer(60 * options.minutes, over)
    timer.daemon = True
    timer.start()
    if options.only != ["quality"]:
        sizes = TINY if device.type == "cpu" else ({}, CLIP | {"image_size": 336}, {})
        bench = Bench(device, options.layers, options.batch, sizes)
    for group in options.only:
        began = time.perf_counter()
        if group == "quality" and bench is not None:  # its memory is needed
            bench.models.clear()
            bench = None
            torch.cuda.empty_cache()
        rows = measured(group, bench, options, lambda: end - time.perf_counter() - 5, console)
        groups.append({"group": group, "rows": rows, "took": time.perf_counter() - began})
        result = {"device": device_name(device), "precision": precision_on(device, "auto"), "text": TEXT}
        write_result(name, result | {"minutes": options.minutes, "groups": groups}, out, console)


if __name__ == "__main__":
    main()
