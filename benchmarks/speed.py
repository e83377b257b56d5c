"""Time of a training step, way by way, beside what executed FLOPs allow.

Forward, backward and AdamW in bf16 (fp32 on a CPU without it). What does not train has bf16 weights then, as pretrained
models are stored and `sparsight train` loads them; what trains has fp32 ones. Images come as cached features, but where
the encoder is what is measured. On a CPU: SmolLM2-135M and EfficientNet-lite0, batch 8. On CUDA: a CLIP-L/14 and a
Llama of 7B with LoRA, random weights, and the largest batch (a power of two) with which a group's first variant fits in
memory. The variants of a group take turns in one process: what else the machine does weighs on all. `reached` is the
share of executed FLOPs over the share of time, both of the variant's baseline: 1.0 where the clock follows the FLOPs,
less where it lags behind.

Peers run in the same step: transformers' LLaVA (with `use_cache=False`, to its advantage); layer dropout as in
torchtune; random token dropping as in DeepSpeed's random-LTD.

    python benchmarks/speed.py [--device cuda] [--rounds 5] [--only GROUP ...] [--layers 2] [--batch 8] [--out FILE]

The file is written group by group; groups that are in FILE already stay there, unless they are measured again.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from common import device_name, now, result_file, timing_options, write_result
from peers import CLIP, build_llava, layer_dropout, random_ltd, wrapped
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data import batches_of, caption_items
from sparsight import ChainOfSightConfig, build
from sparsight.data.collate import Collator
from sparsight.devices.precision import precision_on
from sparsight.modeling.build import language_folder
from sparsight.modeling.scratch import scratch_tokenizer
from sparsight.pipeline import autocast
from sparsight.reporting import environment
from sparsight.settings.bridges import ResamplerConfig
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.settings.recipe import ScratchLanguage, Stage
from sparsight.sparse.attach import SparseHandle, attach
from sparsight.training.stages import add_lora, narrow_adapters, select_trainable

TEXT, SAMPLES = 24, 96  # text tokens of a sample, half of them learnt; samples of the packing group
Loss = Callable[[], torch.Tensor]
adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)


class LeftOut(Exception):
    """A variant that cannot run here; says why."""


@dataclass
class Step:
    """What is timed: a forward pass, backward pass and optimizers' step for each of ``losses``.

    ``around`` is entered before the clock starts; it may give the handle of what it has attached.
    """

    losses: Sequence[Loss]
    optimizers: Sequence[torch.optim.Optimizer]
    around: Callable[[], AbstractContextManager[SparseHandle | None]] = nullcontext


@dataclass(frozen=True)
class Variant:
    """One way to train, compared with another one of its group. The first of a group needs the most memory."""

    group: str
    name: str
    baseline: str
    make: Callable[[Bench], Step]


@dataclass
class Bench:
    """The parts that the models of a group share: one language model in memory, one optimizer of it."""

    device: torch.device
    layers: int | None
    batch: int
    sizes: tuple[dict[str, int], dict[str, int], dict[str, int]] | None = None  # of a Llama, a CLIP, and bridges
    models: dict[str, tuple[Any, Any, torch.optim.Optimizer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.width: dict[str, int] = {"width": 192, "heads": 3}
        self.vision: Any = "efficientnet-lite0"
        self.stored = torch.bfloat16 if precision_on(self.device, "auto") == "bf16" else torch.float32
        fewer = {} if self.layers is None else {"num_hidden_layers": self.layers}
        if self.device.type == "cpu" and self.sizes is None:
            folder = language_folder("smollm2-135m")
            self.language = AutoModelForCausalLM.from_pretrained(folder, dtype=self.stored, **fewer)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            return
        llama, clip, self.width = self.sizes or ({}, CLIP, {})
        with self.device:
            self.vision = AutoModel.from_config(CLIPVisionConfig(**clip, patch_size=14), dtype=self.stored)
            self.language = AutoModelForCausalLM.from_config(LlamaConfig(**(llama | fewer)), dtype=self.stored)
        self.tokenizer = scratch_tokenizer(ScratchLanguage(), ["Describe the image. dog dog"])

    @contextmanager
    def training(self, trains: str) -> Iterator[None]:
        """Within, models are made to train: bridge or projector alone (``frozen``), with LoRA (``lora``), ``full``."""
        rates = {"bridge": 1e-5} | ({} if trains == "frozen" else {"language": 1e-5})
        values = {"name": trains, "bridge": {"kind": "linear"}, "samples": 1, "learning_rate": rates}
        self.stage = Stage.model_validate(values | ({"lora": {"rank": 16}} if trains == "lora" else {}))
        for parameter in self.language.parameters():  # a group before may have trained them
            parameter.data = parameter.data.to(self.stored)
        model, _, _ = self.model("linear")
        lora = add_lora(model, self.stage.lora, seed=0)
        select_trainable(model, self.stage)
        trained = [parameter for parameter in self.language.parameters() if parameter.requires_grad]
        self.language_optimizers = [adamw(trained)] if trained else []
        try:
            yield
        finally:
            if lora is not None:
                lora.unload()
            self.language_optimizers.clear()
            self.models.clear()
            self.free()

    def model(self, bridge: Any) -> tuple[Any, Any, torch.optim.Optimizer]:
        """A model around the shared parts, its processor, and the bridge's optimizer."""
        if (key := str(bridge)) not in self.models:
            with self.device:
                model, processor = build(self.vision, self.language, bridge, tokenizer=self.tokenizer)
            model.train().model.vision_tower.eval()
            select_trainable(model, self.stage)
            self.models[key] = model, processor, adamw(model.model.multi_modal_projector.parameters())
        return self.models[key]

    def free(self) -> None:
        """After a group, and after running out of memory: no gradient and no cached block is left."""
        self.language.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def inputs(self, tokens: int, image_id: int, rows: int) -> dict[str, Any]:
        """Random words around an image of so many visual tokens; those behind it are learnt."""
        words = torch.randint(10, 290, (rows, TEXT), device=self.device)
        image = torch.full((rows, tokens), image_id, device=self.device)
        ids = torch.cat([words[:, : TEXT // 2], image, words[:, TEXT // 2 :]], 1)
        labels = ids.clone()
        labels[:, : tokens + TEXT // 2] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def seconds(self, step: Step) -> float:
        bf16 = self.stored == torch.bfloat16
        with step.around() as handle, narrow_adapters(self.language, self.stage, bf16):
            start = now(self.device)
            for loss in step.losses:
                with autocast("auto", self.device):
                    value = loss()
                value.backward()
                if isinstance(handle, SparseHandle):
                    handle.clear_gradients()
                for optimizer in step.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            return now(self.device) - start

    def flops(self, step: Step) -> float:
        """Executed FLOPs, counted by torch. On a CPU attention is taken apart: the counter cannot see into it there."""
        apart = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with apart, torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.seconds(step)
        return float(counter.get_total_flops())


# ------------------------------------------------------------------------------------------------------- our own ways


def ours(
    bench: Bench,
    bridge: Any = "cos-336",
    *,
    rows: int | None = None,
    pixels: bool = False,
    loss: str = "labelled",
    compiled: bool = False,
    around: Callable[[Any], AbstractContextManager[Any]] = lambda model: nullcontext(),
) -> Step:
    """A step of our model. ``pixels``: encode them in it; ``loss``: on ``labelled`` positions, ``all``, ``fused``."""
    settings = ChainOfSightConfig(bridge, **bench.width) if isinstance(bridge, str) else bridge(**bench.width)
    model, _, optimizer = bench.model(settings)
    rows, config = rows or bench.batch, model.config
    batch = bench.inputs(config.num_image_tokens, config.image_token_id, rows)
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    if pixels:
        batch["pixel_values"] = torch.randn(rows, 3, config.image_size, config.image_size, **options)
    else:
        levels = tuple(torch.randn(rows, *config.map_size, width, **options) for width in config.level_widths)
        batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(hidden_states=levels)}
    value = fused_loss(model, batch) if loss == "fused" else lambda: model(**batch, loss_only=loss == "labelled").loss
    inside = compiled_layers(bench, model) if compiled else partial(around, model)
    return Step([value], [optimizer, *bench.language_optimizers], inside)


def fused_loss(model: Any, batch: dict[str, Any]) -> Loss:
    """Vocabulary projection and loss in one kernel, over all positions."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise LeftOut("liger-kernel is not installed")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    kernel, labels = LigerFusedLinearCrossEntropyLoss(), batch.pop("labels")

    def value() -> torch.Tensor:
        hidden_BTE = model.model(**batch).last_hidden_state
        hidden_ME = hidden_BTE[:, :-1].flatten(0, 1).to(model.lm_head.weight.dtype)
        return kernel(model.lm_head.weight, hidden_ME, labels[:, 1:].flatten())

    return value


def compiled_layers(bench: Bench, model: Any) -> Callable[[], AbstractContextManager[None]]:
    if bench.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise LeftOut("torch.compile on a CPU needs a C++ compiler (g++, or what CXX names), and there is none")
    if bench.device.type == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        raise LeftOut("torch.compile on a GPU needs a C compiler for Triton (gcc, clang, or what CC names): none found")
    layers, compiled = model.model.language_model.layers, []
    for layer in layers:  # compiled at the first call; all layers share the code, so once
        layer.compile()
        compiled.append(layer._compiled_call_impl)
        layer._compiled_call_impl = None

    @contextmanager
    def around() -> Iterator[None]:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call
        try:
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None

    return around


@contextmanager
def sparse(model: Any, keep: float = 1.0, every: int = 0) -> Iterator[SparseHandle]:
    """The compressor, and the skipper with each ``every``-th layer off."""
    skipper = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")
    handle = attach(model, CompressorConfig(keep=keep), skipper)
    handle.step(0, 0.0)
    handle.set_skipped([bool(every) and number % every == every - 1 for number in range(handle.parts.layers)])
    try:
        yield handle
    finally:
        handle.detach()


def batched(bench: Bench, way: str) -> Step:
    """The same samples, with captions as long as people's, in batches of one kind; a step for each batch."""
    model, processor, optimizer = bench.model(ChainOfSightConfig("cos-32", **bench.width))
    config = model.config
    levels = tuple(torch.randn(1, *config.map_size, width) for width in config.level_widths)
    items = caption_items(processor, levels, SAMPLES)
    collate = Collator(0, packing=way == "one row")
    losses = []
    for indices in batches_of(way, np.array([len(item["input_ids"]) for item in items])):
        batch = collate([items[index] for index in indices])
        del batch["info"]
        features = batch.pop("mm_encoder_outputs")["image"].hidden_states
        batch = {key: value.to(bench.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        features = BaseModelOutputWithPooling(hidden_states=tuple(level.to(bench.device) for level in features))
        batch |= {"mm_encoder_outputs": {"image": features}, "loss_only": True, "use_cache": False}
        losses.append(lambda batch=batch: model(**batch).loss)
    return Step(losses, [optimizer, *bench.language_optimizers])


def llava(bench: Bench, tokens: int) -> Step:
    """transformers' LLaVA around the same language model, on cached features, in the plain way."""
    image_id = bench.model("linear")[0].config.image_token_id
    model, projector = build_llava(bench.language, image_id)
    batch = bench.inputs(tokens, image_id, bench.batch)
    features = torch.randn(bench.batch, tokens, CLIP["hidden_size"], device=bench.device)

    def loss() -> torch.Tensor:
        images = BaseModelOutputWithPooling(pooler_output=list(projector(features)))
        return model(**batch, mm_encoder_outputs={"image": images}).loss

    return Step([loss], [adamw(projector.parameters()), *bench.language_optimizers])


# ----------------------------------------------------------------------------------------------------------- variants

LAYOUTS = {f"{tokens} tokens": f"cos-{tokens}" for tokens in (336, 80, 48, 32)}
LAYOUTS |= {"336 tokens, one scale": partial(ResamplerConfig, tokens=336)}
METHODS: dict[str, Any] = {
    "half of the layers off": partial(sparse, every=2),
    "a fifth of the layers off": partial(sparse, every=5),
    "keep 0.25 of the tokens": partial(sparse, keep=0.25),
    "half of the layers, 0.25 of the tokens": partial(sparse, keep=0.25, every=2),
    "peer: layer dropout 0.5": partial(wrapped, wrapper=layer_dropout),
    "peer: random-LTD, half of the tokens": partial(wrapped, wrapper=random_ltd),
}
LLAVA = "peer: LLaVA of transformers, {} tokens"
# What trains on a CPU; on CUDA, LoRA does in all but the first group, and the third is left out.
GROUPS = {group: "frozen" for group in ("frozen", "packing", "cache", "loss", "compile", "peers")}
GROUPS |= {"lora": "lora", "lora, compiled": "lora", "full": "full", "methods": "full", "idle": "full"}


def pairs(group: str, plain: str, other: str, **how: Any) -> list[Variant]:
    """At 336 and at 32 tokens, both ways of each; ``how``: the argument that they differ in, as (plain, other)."""
    ((key, values),) = how.items()
    return [
        Variant(group, f"{n} tokens, {way}", f"{n} tokens, {plain}", partial(ours, bridge=f"cos-{n}", **{key: value}))
        for n in (336, 32)
        for way, value in zip((plain, other), values, strict=True)
    ]


def against(group: str, baseline: str, ways: dict[str, Callable[[Bench], Step]]) -> list[Variant]:
    return [Variant(group, name, baseline, make) for name, make in ways.items()]


SCALES = {name: partial(ours, bridge=bridge) for name, bridge in LAYOUTS.items()}
ONE = {"dense, one sample": partial(ours, rows=1), "attached, idle": partial(ours, rows=1, around=sparse)}
WAYS = {way: partial(batched, way=way) for way in ("padded", "sorted by length", "one row")}
PEERS = {LLAVA.format(tokens): partial(llava, tokens=tokens) for tokens in (576, 256)}
ALL = "336 tokens, logits of all positions"
VARIANTS = [
    *(variant for group in ("frozen", "lora", "full") for variant in against(group, "336 tokens", SCALES)),
    *against("methods", "dense", {"dense": ours} | {n: partial(ours, around=how) for n, how in METHODS.items()}),
    *against("idle", "dense, one sample", ONE),
    *against("packing", "padded", WAYS),
    *pairs("cache", "encoder in the step", "cached features", pixels=(True, False)),
    *pairs("loss", "logits of all positions", "logits of labelled ones", loss=("all", "labelled")),
    *against("loss", ALL, {"336 tokens, liger's fused loss": partial(ours, loss="fused")}),
    *pairs("compile", "plain", "compiled layers", compiled=(False, True)),
    *against("lora, compiled", "336 tokens", {n: partial(make, compiled=True) for n, make in list(SCALES.items())[:4]}),
    *against("peers", LLAVA.format(576), PEERS | {f"ours, {name}": make for name, make in SCALES.items()}),
]


# ---------------------------------------------------------------------------------------------------------- measuring


def largest_batch(bench: Bench, variant: Variant) -> int:
    """Doubled until memory runs out, or the batch is 512. Raises ValueError if no sample fits."""
    bench.batch = fits = 1
    try:
        while bench.batch <= 512:
            bench.seconds(variant.make(bench))
            fits, bench.batch = bench.batch, 2 * bench.batch
    except torch.OutOfMemoryError as error:
        if bench.batch == 1:
            raise ValueError(f"{variant.name}: one sample does not fit in this device's memory") from error
    bench.free()
    return fits


def prepare(variant: Variant, bench: Bench) -> tuple[Step, float]:
    """The step, run once to count its FLOPs, and once more to compile and to have memory."""
    try:
        step = variant.make(bench)
        flops = bench.flops(step)
        bench.seconds(step)
    except torch.OutOfMemoryError as error:
        raise LeftOut(f"out of memory at batch {bench.batch}") from error
    return step, flops


def measure(group: str, bench: Bench, rounds: int, console: Console) -> list[dict[str, Any]]:
    """A row for each variant: medians of seconds and of the ratios to the baseline in the same round."""
    ready: dict[str, tuple[Step, float]] = {}
    rows: list[dict[str, Any]] = []
    for variant in (variant for variant in VARIANTS if variant.group == group):
        row = {"variant": variant.name, "baseline": variant.baseline}
        try:
            if variant.baseline not in (variant.name, *ready):
                raise LeftOut("its baseline is left out")
            ready[variant.name] = prepare(variant, bench)
        except LeftOut as why:
            row["left_out"] = str(why)
            console.print(f"{group}, {variant.name}: left out: {why}")
        if "left_out" in row:  # not before: the error holds on to the memory
            bench.free()
        rows.append(row)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in track(range(rounds), group, console=console):
        # There and back: a large step right behind a small one would have to fetch its memory anew.
        for name in list(ready)[:: -1 if turn % 2 else 1]:
            times[name].append(bench.seconds(ready[name][0]))
    for row in (row for row in rows if "left_out" not in row):
        (_, flops), mine = ready[row["variant"]], times[row["variant"]]
        ratios = [a / b for a, b in zip(mine, times[row["baseline"]], strict=True)]
        row |= {"seconds": statistics.median(mine), "time_ratio": statistics.median(ratios)}
        row |= {"spread": (min(ratios), max(ratios)), "flops": flops, "flops_ratio": flops / ready[row["baseline"]][1]}
        row["reached"] = row["flops_ratio"] / row["time_ratio"]
    return rows


def measure_what_fits(group: str, bench: Bench, rounds: int, console: Console, shrink: bool) -> list[dict[str, Any]]:
    """As `measure`; where memory runs out while all variants stand ready, again with half of the batch."""
    while True:
        try:
            return measure(group, bench, rounds, console)
        except torch.OutOfMemoryError:
            if not shrink or bench.batch == 1:
                raise
        bench.batch //= 2  # here, as the error holds on to the memory
        bench.models.clear()
        bench.free()


def show(groups: list[dict[str, Any]], console: Console) -> None:
    table = Table("", title="a training step: shares of its baseline's", title_justify="left")
    for column in ("seconds", "time", "rounds", "FLOPs", "reached"):
        table.add_column(column, justify="right")
    for group in groups:
        table.add_row(f"[bold]{group['group']}[/] ({group['trains']}, batch {group['batch']})")
        for row in group["rows"]:
            cells = ["left out"]
            if "left_out" not in row:
                seconds, time, flops, reached = (
                    f"{row[key]:.3f}" for key in ("seconds", "time_ratio", "flops_ratio", "reached")
                )
                cells = [seconds, time, "{:.2f} to {:.2f}".format(*row["spread"]), flops, reached]
            table.add_row(row["variant"], *cells)
    console.print(table)


def main() -> None:
    more = {"only": {"nargs": "+", "choices": list(GROUPS), "default": list(GROUPS)}}
    options, device = timing_options(__doc__, **more, layers={"type": int}, batch={"type": int})
    console, name = Console(), f"speed-{device.type}"
    out = result_file(name, options.out)
    groups = json.loads(out.read_text(encoding="utf-8"))["groups"] if out.is_file() else []
    torch.manual_seed(0)
    bench, cuda = Bench(device, options.layers, options.batch or 8), device.type == "cuda"
    for group in options.only:
        if cuda and group == "full":
            console.print("full: left out on CUDA: weights, gradients and moments of 7B do not fit")
            continue
        trains = "lora" if cuda and group != "frozen" else GROUPS[group]
        with bench.training(trains):
            own_batch = group in ("packing", "idle")
            if cuda and options.batch is None and not own_batch:
                bench.batch = largest_batch(bench, next(variant for variant in VARIANTS if variant.group == group))
            rounds, may_shrink = options.rounds * (6 if group == "idle" else 1), cuda and options.batch is None
            rows = measure_what_fits(group, bench, rounds, console, may_shrink and not own_batch)
        found = {"group": group, "trains": trains, "batch": None if own_batch else bench.batch, "rows": rows}
        groups = [other for other in groups if (other["group"], other["batch"]) != (group, found["batch"])]
        groups.append(found | {"rounds": options.rounds, "env": environment()})
        result = {
            "device": device_name(device),
            "precision": precision_on(device, "auto"),
            "text": TEXT,
            "groups": groups,
        }
        result |= {"parameters": bench.language.num_parameters(), "layers": bench.language.config.num_hidden_layers}
        write_result(name, result, out, console)
    show(groups, console)


if __name__ == "__main__":
    main()
