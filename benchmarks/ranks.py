"""Weak and strong scaling of `sparsight train` (DDP, gloo) over the ranks of this machine's CPUs, by the clock.

    python benchmarks/ranks.py

Each run is a process group of its own, with one thread a rank. The clock means little where other programs run: the
load of the machine stands in the result, and the steps' CPU seconds beside the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from common import timing_options, write_result
from rich.console import Console
from rich.progress import track
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from sparsight.reporting import read_run

RANKS = (1, 2, 4)
BATCH = 8  # samples: on each rank (weak), or over all (strong)
WARM = 2  # steps that do not count
SIZES = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
LANGUAGE = {"hidden": 320, "layers": 8, "heads": 5, "intermediate": 960, "vocabulary": 600, "context": 512}
COMMUNICATION = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
x, found = torch.ones(int(sys.argv[1])), []
for _ in range(6):
    dist.barrier(); start = time.perf_counter(); dist.all_reduce(x); found.append(time.perf_counter() - start)
if dist.get_rank() == 0: print("SECONDS", sorted(found)[2])
dist.barrier(); dist.destroy_process_group()  # a rank that ends without aborts now and then in gloo's threads
"""


def launched(ranks: int, *command: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *launcher], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def recipe_of(folder: Path, batch: int, micro: int, steps: int) -> dict[str, Any]:
    stage = {
        "name": "pretrain",
        "bridge": {"kind": "chain_of_sight", "layout": "cos-80", "width": 192, "heads": 4},
        "image_size": 224,
        "learning_rate": {"bridge": 1e-3, "language": 1e-3},
        "samples": batch * (steps + WARM),
        "batch_size": batch,
        "micro_batch_size": micro,
        "checkpoints": 0,
    }
    scenes = {"kind": "scenes", "scenes": 64, "cutouts": "shapes"}
    common = {"name": "r", "vision": str(folder), "language": LANGUAGE, "precision": "fp32", "workers": 0}
    return common | {"data": scenes, "stages": [stage], "evaluation": {"kind": "none"}}


def measured(folder: Path, kind: str, ranks: int, steps: int) -> dict[str, Any]:
    """Medians of the steps of a run, and of an all-reduce of its gradients alone."""
    batch = BATCH * ranks if kind == "weak" else BATCH
    file, out, before = folder / "r.yaml", folder / f"{kind}-{ranks}", os.getloadavg()[0]
    file.write_text(yaml.safe_dump(recipe_of(folder / "encoder", batch, batch // ranks, steps)), encoding="utf-8")
    launched(ranks, "-m", "sparsight", "train", str(file), "--out", str(out))
    stage = read_run(out).stages[0]
    used = stage.steps[WARM:]
    script = folder / "communication.py"
    script.write_text(COMMUNICATION, encoding="utf-8")
    records = [json.loads(line) for line in (out / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(record["trainable_parameters"] for record in records if record["type"] == "stage")
    reduced = launched(ranks, str(script), str(trained)) if ranks > 1 else "SECONDS 0"
    seconds = median(sum(step["seconds"].values()) for step in used)
    return {
        "kind": kind,
        "ranks": ranks,
        "batch": batch,
        "seconds": seconds,
        "cpu_seconds": median(step.get("cpu_seconds") or float("nan") for step in used),
        "samples_per_second": batch / seconds,
        "all_reduce_seconds": float(reduced.split("SECONDS")[1].split()[0]),
        "trained_parameters": trained,
        "load_before": before,
    }


def main() -> None:
    options, _ = timing_options(__doc__, steps={"type": int, "default": 12})
    console, rows, start = Console(), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = CLIPVisionConfig(**SIZES, image_size=224, patch_size=16)
        CLIPVisionModel(config).save_pretrained(f"{folder}/encoder")
        crop = {"height": 224, "width": 224}
        CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=crop).save_pretrained(f"{folder}/encoder")
        for kind, ranks in track([(k, r) for k in ("weak", "strong") for r in RANKS], "runs", console=console):
            rows.append(measured(Path(folder), kind, ranks, options.steps))
    for row in rows:
        one = next(each for each in rows if each["kind"] == row["kind"])
        row["speedup"] = row["samples_per_second"] / one["samples_per_second"]
        row["at_most"] = min(row["ranks"], os.cpu_count() or 1)
    result = {
        "rows": rows,
        "cores": os.cpu_count(),
        "steps": options.steps,
        "wall_seconds": time.perf_counter() - start,
    }
    write_result("ranks-cpu", result, options.out, console)


if __name__ == "__main__":
    main()
