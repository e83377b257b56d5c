"""What training on 8 to 1,024 GPUs would take, computed: the closed-form cost, and links as their makers publish them.

    python benchmarks/cluster.py

Nothing here is timed. FLOPs and memory are those of `sparsight plan`; what a rank waits for is from the planner that
deals samples out (`plan_steps`), over lengths and images drawn at random. Published figures are computed by the same
functions beside it, with what is assumed for each.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result
from rich.console import Console

from sparsight.cost.forecast import StageCost
from sparsight.cost.shapes import language_shape
from sparsight.data.batching import plan_steps
from sparsight.settings.recipe import Recipe

NODE = 8  # GPUs
ENGINES = ("ddp", "zero2", "fsdp2", "zero3")
GPUS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Machine:
    """A GPU and its links, from data sheets: FLOP/s of dense bf16, bytes, bytes/s to memory, within a node and from a
    node to others (of each GPU, one direction). ``reached``: shares of the sheet's figures that long products and
    collectives get, and ``latency`` seconds of a hop: ours to assume."""

    name: str = "H100 SXM, NVLink 4, InfiniBand NDR"
    peak: float = 989e12
    memory: float = 80e9
    to_memory: float = 3.35e12
    inside: float = 450e9
    outside: float = 50e9
    mfu: float = 0.4
    reached: float = 0.8
    latency: float = 10e-6


# As DistTrain's machines are taken to be: 300 GB/s of NVLink, four times 200 Gb/s a node.
A100 = Machine("A100 SXM, NVLink 3, 4 x 200 Gb/s a node", 312e12, 80e9, 2.0e12, 300e9, 12.5e9)
MICRO = 4  # samples in a pass
KERNELS = 0.6  # share of the peak that products of a 70B model are taken to reach


def ring(size: float, gpus: int, machine: Machine) -> float:
    """Seconds in which each of ``gpus`` gets ``size`` bytes that are spread over all (a gather; a reduction alike)."""
    if gpus == 1:
        return 0.0
    link = machine.inside if gpus <= NODE else min(machine.inside, machine.outside * NODE)
    hops = min(gpus, NODE) - 1 + max(0, -(-gpus // NODE) - 1)  # a ring in the node, and one between nodes
    return size * (gpus - 1) / gpus / (link * machine.reached) + hops * machine.latency


def stage_of(**changes: Any) -> Recipe:
    """LLaVA's instruction tuning: CLIP ViT-L/14 at 336 px, its MLP, and a 7B language model that trains in full."""
    stage = {
        "name": "finetune",
        "bridge": {"kind": "mlp"},
        "image_size": 336,
        "learning_rate": {"bridge": 2e-5, "language": 2e-5},
        "samples": 665_000,
        "gradient_checkpointing": True,
        "conversation": {"text": 300, "supervised": 150, "images": 1},
    } | {key: value for key, value in changes.items() if key not in ("language", "vision", "vision_levels")}
    parts = {key: changes[key] for key in ("language", "vision", "vision_levels") if key in changes}
    common = {"name": "r", "precision": "bf16", "vision": "clip-l-14-336", "vision_levels": [23]}
    data = {"language": "vicuna-7b"} | {
        "data": {"kind": "json", "path": "x.json"},
        "stages": [stage],
        "evaluation": {"kind": "none"},
    }
    return Recipe.model_validate(common | data | parts)


def cost_of(**changes: Any) -> StageCost:
    recipe = stage_of(**changes)
    return StageCost(recipe, recipe.stages[0])


def per_sample(cost: StageCost) -> float:
    return sum(cost.flops.values()) / cost.stage.samples


def straggling(gpus: int, each: int, planned: bool, together: int | None = None) -> float:
    """Work of the rank that has most over the mean, of ranks that wait for each other after every ``together`` of their
    ``each`` samples in a step (after all, if not given). Lengths are lognormal, 0.6 the standard deviation of their
    logarithm; images 0 to 5, as in mixtures of text, images and tiles. ``planned``: dealt out by `plan_steps`."""
    draw, steps, micro = np.random.default_rng(0), 8, min(each, together or each)
    number = steps * gpus * each
    images = draw.choice(6, number, p=(0.06, 0.7, 0.1, 0.06, 0.04, 0.04))
    sizes = np.stack([(draw.lognormal(5.5, 0.6, number) + 576 * images).astype(int), images], 1)
    work = sizes[:, 0] + 40 * images  # an image's encoding, in positions of the language model
    if planned:
        plan = plan_steps(number, 0, gpus, sizes, batch_size=gpus * each, micro_batch_size=micro)
        loads = np.array([[sum(work[i] for i in batch) for batch in step] for step in plan])
    else:
        loads = work.reshape(-1, micro).sum(-1)
    met = loads.reshape(-1, gpus)  # a row for each time that they meet
    return float(met.max(1).sum() / met.mean(1).sum())


def step(cost: StageCost, engine: str, gpus: int, each: int, machine: Machine) -> dict[str, float | bool | str]:
    """An optimizer step of ``each`` samples on every GPU: seconds by what they go to, and memory."""
    trained, layers = cost.parts.trained_bytes, cost.shapes[1].layers
    narrow = cost.parts.weights * 2 / 4 if cost.shapes[1].weight_bytes == 4 else cost.parts.weights  # gathered as bf16
    sharded, micro = engine in ("fsdp2", "zero3"), min(each, MICRO)
    passes = -(-each // micro)
    compute = per_sample(cost) * each / (machine.peak * machine.mfu)
    behind = ring(trained, gpus, machine)  # reduce-scatter of fp32 gradients; a gather of as many bytes costs the same
    if engine == "ddp":  # all-reduce, under the last backward pass
        exposed = max(0.0, 2 * behind - compute / passes * 2 / 3) + 2 * behind / layers
    elif engine == "zero2":  # reductions under every backward pass, then weights are gathered, with nothing beside it
        exposed = passes * (max(0.0, behind - compute / passes * 2 / 3) + behind / layers) + behind
    else:  # each layer is gathered twice in a pass, under the layer before it, and its gradients reduced
        gather, reduce = (ring(size, gpus, machine) + layers * ring(0.0, gpus, machine) for size in (narrow, trained))
        forward, back = (compute / passes * share for share in (1 / 3, 2 / 3))
        exposed = passes * (max(0.0, gather - forward) + max(0.0, gather + reduce - back) + (gather + reduce) / layers)
    share = gpus if engine != "ddp" else 1
    optimizer = 6 * trained / share / machine.to_memory  # weights, two moments: read and written
    waits = (straggling(gpus, each, True, each if engine == "ddp" else micro) - 1) * compute
    memory = cost.memory(micro)
    held = memory["weights"] / (gpus if sharded else 1) + memory["activations"]
    held += memory["optimizer"] / share + memory["gradients"] / share
    if sharded:
        held += 3 * narrow / layers  # of layers that are whole at one time
    seconds = {"compute": compute, "communication": exposed, "waiting": waits, "optimizer": optimizer}
    total = sum(seconds.values())
    return {
        **seconds,
        "seconds": total,
        "samples_per_second": gpus * each / total,
        "mfu": machine.mfu * compute / total,
        "gigabytes": held / 1e9,
        "fits": held < 0.9 * machine.memory,
    }


def breaks_first(row: dict[str, Any]) -> str:
    """What stands most in the way."""
    if not row["fits"]:
        return "memory"
    lost = {key: row[key] for key in ("communication", "waiting", "optimizer")}
    worst = max(lost, key=lost.__getitem__)
    return worst if lost[worst] > 0.1 * row["seconds"] else ""


def scaling(cost: StageCost, machine: Machine) -> list[dict[str, Any]]:
    """Weak: 16 samples on each GPU. Strong: 1,024 over all. Efficiency: samples a second and GPU, over those on 8."""
    rows = []
    for kind in ("weak", "strong"):
        for engine in ENGINES:
            found: list[dict[str, Any]] = []
            for gpus in GPUS:
                each = 16 if kind == "weak" else 1024 // gpus
                row: dict[str, Any] = {"kind": kind, "engine": engine, "gpus": gpus, "samples_per_gpu": each}
                row |= step(cost, engine, gpus, each, machine)
                row["efficiency"] = row["mfu"] / (found[0]["mfu"] if found else row["mfu"])
                row["breaks"] = breaks_first(row)
                found.append(row)
            rows += found
    return rows


def published() -> list[dict[str, Any]]:
    """Figures of papers, and what is computed for them."""
    align = {"learning_rate": {"bridge": 1e-3}, "conversation": {"text": 30, "supervised": 20}, "samples": 558_000}
    align["gradient_checkpointing"] = False
    return [*chain_of_sight(), *its_port(align), *dual_speed(align), dist_train()]


def row(what: str, figure: float, computed: float, how: str) -> dict[str, Any]:
    return {"what": what, "published": figure, "computed": computed, "off": computed / figure - 1, "how": how}


def chain_of_sight() -> list[dict[str, Any]]:
    cos = {"vision": "clip-l-14", "vision_levels": [16, 23], "image_size": 224, "lora": {"rank": 64, "alpha": 128}}
    cos |= {"learning_rate": {"bridge": 1e-4, "language": 1e-4}, "gradient_checkpointing": False}
    cos["conversation"] = {"text": 23, "supervised": 12}
    flops = {
        n: per_sample(cost_of(**cos, bridge={"kind": "chain_of_sight", "layout": f"cos-{n}"}))
        for n in (336, 80, 48, 32)
    }
    # One constant, in FLOPs of a sample: what a sample takes besides. From the row of 80 tokens alone.
    other = (0.42 * flops[336] - flops[80]) / (1 - 0.42)
    rows = []
    for tokens, figure in ((32, 0.27), (48, 0.35), (80, 0.42)):
        name = f"Chain-of-Sight, pre-training with {tokens} tokens, of the time with 336"
        rows.append(row(name, figure, flops[tokens] / flops[336], "FLOPs alone"))
        if tokens != 80:
            fitted = (flops[tokens] + other) / (flops[336] + other)
            rows.append(row(name, figure, fitted, "and a constant for each sample, from the row of 80 tokens"))
    return rows


def its_port(align: dict[str, Any]) -> list[dict[str, Any]]:
    port = {"kind": "chain_of_sight", "layout": "cos-80"}
    times = [per_sample(cost_of(**align, **more)) for more in ({}, {"bridge": port, "vision_levels": [16, 23]})]
    rows = []
    rows.append(row("its port, alignment: 576 tokens over 80", 4.3, times[0] / times[1], "FLOPs, 30 text tokens"))
    tuned: dict[int, dict[str, Any]] = {576: {}}
    for tokens in (80, 336, 1296):
        tuned[tokens] = {"bridge": port | {"layout": f"cos-{tokens}"}, "vision_levels": [16, 23]}
    each_takes = {tokens: per_sample(cost_of(**more)) for tokens, more in tuned.items()}
    ratio = each_takes[576] / each_takes[80]
    rows.append(row("its port, fine-tuning: 576 tokens over 80", 1.4, ratio, "FLOPs, 300 text tokens"))
    other = (7.1 / 9.8 * each_takes[576] - each_takes[80]) / (1 - 7.1 / 9.8)
    for tokens, hours in ((336, 8.7), (1296, 14.0)):
        fitted = 9.8 * (each_takes[tokens] + other) / (each_takes[576] + other)
        how = "and a constant for each sample, from the hours with 80 and 576"
        rows.append(row(f"its port, fine-tuning with {tokens} tokens, hours", hours, fitted, how))

    return rows


def dual_speed(align: dict[str, Any]) -> list[dict[str, Any]]:
    """Nine of ten batches with a tenth of the tokens; the tenth with all, and a pass of its teacher with few."""
    rows = []
    for name, images, figure, tune in (("LLaVA-1.5", 1, 2.1, 665_000), ("LLaVA-NeXT", 5, 4.0, 779_000)):
        hours = {"dense": 0.0, "fast": 0.0}
        for more in (align, {"samples": tune}):
            talk = more.get("conversation", {"text": 300, "supervised": 150})
            more = more | {"conversation": talk | {"images": images}}
            dense, fast = (cost_of(**more, **c) for c in ({}, {"compressor": {"keep": 0.1}}))
            teacher = sum(fast.passes(0, type(fast.trains)(False, False, False)).values())
            hours["dense"] += sum(dense.flops.values())
            hours["fast"] += 0.9 * sum(fast.flops.values()) + 0.1 * (sum(dense.flops.values()) + teacher)
        how = f"FLOPs of both stages, 30 and 300 text tokens, {576 * images} visual ones"
        rows.append(row(f"DualSpeed, {name}, speed-up", figure, hours["dense"] / hours["fast"], how))

    return rows


def dist_train() -> dict[str, Any]:
    """A Llama 3 of 70B alone, which is most of it, on sequences of 8,192 and global batches of 1,920."""
    shape, gpus, each = language_shape("llama-3-8b"), 1172, 1920 / 1172
    large = dict(layers=80, hidden=8192, intermediate=28672, tokens=8192)
    weights = large["layers"] * large["hidden"] * (2.25 * large["hidden"] + 3 * large["intermediate"])
    weights += 2 * shape.vocabulary * large["hidden"]
    useful = each * 6 * large["tokens"] * (weights + large["layers"] * large["hidden"] * large["tokens"])
    compute = useful / (A100.peak * KERNELS)
    gather, reduce = ring(2 * weights, gpus, A100), ring(4 * weights, gpus, A100)
    exposed = max(0.0, gather - compute / 3) + max(0.0, gather + reduce - compute * 2 / 3) + (gather + reduce) / 80
    mfu = useful / (compute + exposed) / A100.peak
    how = f"FSDP2 in place of its 3D parallelism; products at an assumed {KERNELS:.0%} of the peak, no waiting"
    return row("DistTrain, 72B on 1,172 GPUs, MFU", 0.547, mfu, how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console, machine, cost = Console(), Machine(), cost_of()
    waits = [
        {"gpus": gpus, "samples_per_gpu": each}
        | {name: straggling(gpus, each, planned) for name, planned in (("planned", True), ("at_random", False))}
        for gpus in GPUS
        for each in (1, 4, 16)
    ]
    result = {"machine": asdict(machine), "micro_batch": MICRO, "scaling": scaling(cost, machine), "waiting": waits}
    write_result("cluster", result | {"published": published()}, options.out, console)


if __name__ == "__main__":
    main()
