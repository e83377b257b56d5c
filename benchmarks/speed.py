"""Time of a training step, way by way, beside what executed FLOPs allow.

Forward, backward and AdamW, in bf16; pictures come as cached features, but where the encoder is what is measured. On a CPU:
SmolLM2-135M and EfficientNet-lite0, batch 8. On CUDA: a CLIP-L/14 and a Llama of 7B with LoRA, random weights, and the
largest batch (a power of two) that a group's first variant fits in memory with. The variants of a group take turns in one
process: what else the machine does weighs on all. `reached` is the share of executed FLOPs over the share of time, both of
the variant's baseline: 1.0 where the clock follows the FLOPs, less where it lags behind.

Peers run in the same way (with `use_cache=False`, which is to their advantage): transformers' own LLaVA; layer dropout as in
torchtune; random token dropping as in DeepSpeed's random-LTD.

    python benchmarks/speed.py [--device cuda] [--rounds 5] [--only GROUP ...] [--layers 2] [--batch 8] [--out FILE]
"""

from __future__ import annotations

import gc
import importlib.util
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
from common import device_name, now, timing_options, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from data import batches_of, caption_items
from sparsight import ChainOfSight, build
from sparsight.config import LayerSkipper, Resampler, ScratchLanguage, Stage, VisualTokenCompressor
from sparsight.data.collate import Collator
from sparsight.modeling.build import language_folder, scratch_tokenizer
from sparsight.modeling.packed import attention_for_packed_rows
from sparsight.modeling.short import attention
from sparsight.sparse.attach import SparseHandle, attach
from sparsight.sparse.gather import Kept
from sparsight.training.stages import add_lora, select_trainable

TEXT, SAMPLES = 24, 96  # text tokens of a sample, half of them learnt; samples of the packing group
Loss = Callable[[], torch.Tensor]


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
    models: dict[str, tuple[Any, Any, torch.optim.Optimizer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.width: dict[str, int] = {"width": 192, "heads": 3}
        self.vision: Any = "efficientnet-lite0"
        if self.device.type == "cpu":
            folder = language_folder("smollm2-135m")
            fewer = {} if self.layers is None else {"num_hidden_layers": self.layers}
            self.language = AutoModelForCausalLM.from_pretrained(folder, **fewer)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            return
        self.width = {}
        clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        llama = LlamaConfig(num_hidden_layers=self.layers or 32)
        with self.device:
            self.vision = AutoModel.from_config(CLIPVisionConfig(**clip, patch_size=14), dtype=torch.bfloat16)
            self.language = AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16)
        self.tokenizer = scratch_tokenizer(ScratchLanguage(), ["Describe the image. dog dog"])

    @contextmanager
    def training(self, trains: str) -> Iterator[None]:
        """Within, models are made to train: bridge or projector alone (``frozen``), with LoRA (``lora``), ``full``."""
        rates = {"bridge": 1e-5} | ({} if trains == "frozen" else {"language": 1e-5})
        values = {"name": trains, "bridge": {"kind": "linear"}, "samples": 1, "learning_rate": rates}
        self.stage = Stage.model_validate(values | ({"lora": {"rank": 16}} if trains == "lora" else {}))
        model, _, _ = self.model("linear")
        lora = add_lora(model, self.stage, seed=0)
        select_trainable(model, self.stage)
        trained = [parameter for parameter in self.language.parameters() if parameter.requires_grad]
        self.language_optimizers = [torch.optim.AdamW(trained, lr=1e-6, fused=True)] if trained else []
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
            trained = model.model.multi_modal_projector.parameters()
            self.models[key] = model, processor, torch.optim.AdamW(trained, lr=1e-6, fused=True)
        return self.models[key]

    def free(self) -> None:
        """After a group, and after running out of memory: no gradient and no cached block is left."""
        self.language.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def inputs(self, tokens: int, image_id: int, rows: int) -> dict[str, torch.Tensor]:
        """Random words around a picture of so many visual tokens; those behind it are learnt."""
        words = torch.randint(10, 290, (rows, TEXT), device=self.device)
        image = torch.full((rows, tokens), image_id, device=self.device)
        ids = torch.cat([words[:, : TEXT // 2], image, words[:, TEXT // 2 :]], 1)
        labels = ids.clone()
        labels[:, : tokens + TEXT // 2] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    def seconds(self, step: Step) -> float:
        with step.around() as handle:
            start = now(self.device)
            for loss in step.losses:
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
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
    """A step of our model. ``pixels``: encode them in the step; ``loss``: on ``labelled`` positions, ``all``, ``fused``."""
    settings = ChainOfSight(bridge, **bench.width) if isinstance(bridge, str) else bridge(**bench.width)
    model, _, optimizer = bench.model(settings)
    rows, config = rows or bench.batch, model.config
    batch: dict[str, Any] = bench.inputs(config.num_image_tokens, config.image_token_id, rows) | {"use_cache": False}
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    if pixels:
        batch["pixel_values"] = torch.randn(rows, 3, config.image_size, config.image_size, **options)
    else:
        levels = tuple(torch.randn(rows, *config.map_size, width, **options) for width in config.level_widths)
        batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(hidden_states=levels)}
    value: Loss = lambda: model(**batch, loss_only=loss == "labelled").loss  # noqa: E731
    if loss == "fused":
        value = fused_loss(model, batch)
    inside = compiled_layers(bench, model) if compiled else partial(around, model)

    @contextmanager
    def as_trained() -> Iterator[SparseHandle | None]:
        with attention(model.model.language_model), inside() as handle:
            yield handle

    return Step([value], [optimizer, *bench.language_optimizers], as_trained)


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
    skipper = LayerSkipper(alpha=0.5, epsilon=0.0, course="constant")
    handle = attach(model, VisualTokenCompressor(keep=keep), skipper)
    handle.off = tuple(bool(every) and number % every == every - 1 for number in range(handle.parts.layers))
    try:
        yield handle
    finally:
        handle.detach()


def batched(bench: Bench, way: str) -> Step:
    """The same samples, with captions as long as people's, in batches of one kind; a step for each batch."""
    model, processor, optimizer = bench.model(ChainOfSight("cos-32", **bench.width))
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
    rows = attention_for_packed_rows if way == "one row" else attention
    return Step(losses, [optimizer, *bench.language_optimizers], partial(rows, model.model.language_model))


# -------------------------------------------------------------------------------------------------------------- peers


def llava(bench: Bench, tokens: int) -> Step:
    """transformers' LLaVA around the same language model, on cached features of CLIP-L's width, logits everywhere."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=1024, num_attention_heads=16),
        text_config=bench.language.config,
        image_token_id=bench.model("linear")[0].config.image_token_id,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = bench.language.base_model, bench.language.get_output_embeddings()
    projector = LlavaMultiModalProjector(config).to(bench.device)
    features = torch.randn(bench.batch, tokens, 1024, device=bench.device)
    batch = bench.inputs(tokens, config.image_token_id, bench.batch) | {"use_cache": False}
    model.train()

    def value() -> torch.Tensor:
        images = BaseModelOutputWithPooling(pooler_output=list(projector(features)))
        return model(**batch, mm_encoder_outputs={"image": images}).loss

    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-6, fused=True)
    return Step([value], [optimizer, *bench.language_optimizers])


@contextmanager
def wrapped(model: Any, wrapper: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Decoder layers' ``forward`` goes through ``wrapper(plain, place, hidden, ...)``; place: 0 to 1, first to last."""
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        layer.forward = partial(wrapper, layer.forward, number / (len(layers) - 1))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def drawn(place: float) -> torch.Generator:
    """Differs from layer to layer, and is the same in every step: so are its FLOPs."""
    return torch.Generator().manual_seed(round(1000 * place))


def layer_dropout(plain: Callable[..., Any], place: float, x_BTD: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """torchtune's layer dropout, 0.5: each layer runs on the samples of the batch that it drew, the others pass by."""
    row_R = torch.rand(len(x_BTD), generator=drawn(place)).lt(0.5).nonzero()[:, 0].to(x_BTD.device)
    if not len(row_R):
        return x_BTD
    return x_BTD.index_copy(0, row_R, plain(x_BTD[row_R], **inputs).to(x_BTD.dtype))


def random_ltd(
    plain: Callable[..., Any], place: float, x_BTD: torch.Tensor, *, position_embeddings: Any, **inputs: Any
) -> torch.Tensor:
    """DeepSpeed's random-LTD, half of the tokens: each layer but the first and last draws, from text and pictures alike,
    those that go through it; the others pass by. (Theirs leaves the rotary positions uncut, and fails on Llama.)"""
    if place in (0.0, 1.0):
        return plain(x_BTD, position_embeddings=position_embeddings, **inputs)
    batch, length, width = x_BTD.shape
    index_BK = torch.rand(batch, length, generator=drawn(place)).topk(length // 2).indices.sort().values
    kept = Kept(index_BK.to(x_BTD.device), torch.ones_like(index_BK, dtype=torch.bool), length)
    positions = tuple(kept.gather(part, 1) for part in position_embeddings)
    few_BKD = plain(kept.gather(x_BTD, 1), position_embeddings=positions, **inputs)
    return x_BTD.scatter(1, kept.index_BK[..., None].expand(-1, -1, width), few_BKD.to(x_BTD.dtype))


# ----------------------------------------------------------------------------------------------------------- variants

HALF, FIFTH, QUARTER = partial(sparse, every=2), partial(sparse, every=5), partial(sparse, keep=0.25)
LAYOUTS: dict[str, Any] = {
    "336 tokens": "cos-336",
    "336 tokens, one scale": partial(Resampler, tokens=336),
    **{f"{tokens} tokens": f"cos-{tokens}" for tokens in (80, 48, 32)},
}
METHODS: dict[str, Any] = {
    "half of the layers off": HALF,
    "a fifth of the layers off": FIFTH,
    "keep 0.25 of the tokens": QUARTER,
    "half of the layers, 0.25 of the tokens": partial(sparse, keep=0.25, every=2),
    "peer: layer dropout 0.5": partial(wrapped, wrapper=layer_dropout),
    "peer: random-LTD, half of the tokens": partial(wrapped, wrapper=random_ltd),
}
LLAVA = "peer: LLaVA of transformers, {} tokens"
# What trains on a CPU; on CUDA, LoRA does in all but the first group, and the third is left out.
GROUPS = {group: "frozen" for group in ("frozen", "packing", "cache", "loss", "compile", "peers")}
GROUPS |= {"lora": "lora", "full": "full", "methods": "full", "idle": "full"}


def pairs(group: str, plain: str, other: str, **how: Any) -> list[Variant]:
    """At 336 and at 32 tokens, both ways of each: ``how`` is what the two differ in, as (plain, other)."""
    found = []
    for layout in ("cos-336", "cos-32"):
        names = [f"{layout[4:]} tokens, {way}" for way in (plain, other)]
        for number, name in enumerate(names):
            values = {key: both[number] for key, both in how.items()}
            found.append(Variant(group, name, names[0], partial(ours, bridge=layout, **values)))
    return found


VARIANTS = [
    *(
        Variant(group, name, "336 tokens", partial(ours, bridge=bridge))
        for group in ("frozen", "lora", "full")
        for name, bridge in LAYOUTS.items()
    ),
    Variant("methods", "dense", "dense", ours),
    *(Variant("methods", name, "dense", partial(ours, around=around)) for name, around in METHODS.items()),
    Variant("idle", "dense, one sample", "dense, one sample", partial(ours, rows=1)),
    Variant("idle", "attached, idle, one sample", "dense, one sample", partial(ours, rows=1, around=sparse)),
    *(
        Variant("packing", way, "padded", partial(batched, way=way))
        for way in ("padded", "sorted by length", "one row")
    ),
    *pairs("cache", "encoder in the step", "cached features", pixels=(True, False)),
    *pairs("loss", "logits of all positions", "of labelled ones", loss=("all", "labelled")),
    Variant(
        "loss", "336 tokens, liger's fused loss", "336 tokens, logits of all positions", partial(ours, loss="fused")
    ),
    *pairs("compile", "plain", "compiled layers", compiled=(False, True)),
    *(Variant("peers", LLAVA.format(n), LLAVA.format(576), partial(llava, tokens=n)) for n in (576, 256)),
    *(
        Variant("peers", f"ours, {n} tokens", LLAVA.format(576), partial(ours, bridge=f"cos-{n}"))
        for n in (336, 80, 48, 32)
    ),
]


# ---------------------------------------------------------------------------------------------------------- measuring


def largest_batch(bench: Bench, variant: Variant) -> int:
    """Doubled until memory runs out."""
    bench.batch = 1
    while bench.batch < 512:
        try:
            bench.seconds(variant.make(bench))
        except torch.OutOfMemoryError:
            break
        bench.batch *= 2
    bench.free()
    return bench.batch // 2


def measure(group: str, bench: Bench, rounds: int, console: Console) -> list[dict[str, Any]]:
    """A row for each variant: medians of seconds and of the ratios to the baseline in the same round."""
    steps: dict[str, Step] = {}
    flops: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    variants = [variant for variant in VARIANTS if variant.group == group]
    for variant in variants:
        row = rows[variant.name] = {"variant": variant.name, "baseline": variant.baseline}
        try:
            if variant.baseline in rows and "left_out" in rows[variant.baseline]:
                raise LeftOut("its baseline is left out")
            step = variant.make(bench)
            flops[variant.name] = bench.flops(step)
            bench.seconds(step)
            steps[variant.name] = step
        except (LeftOut, torch.OutOfMemoryError) as error:
            row["left_out"] = str(error) if isinstance(error, LeftOut) else f"out of memory at batch {bench.batch}"
            console.print(f"{group}, {variant.name}: left out: {row['left_out']}")
        if "left_out" in row:
            bench.free()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(rounds), group, console=console):
        # There and back: a large step right behind a small one would have to fetch its memory anew.
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            times[name].append(bench.seconds(steps[name]))
    for name in steps:
        row, first = rows[name], rows[name]["baseline"]
        ratios = [mine / other for mine, other in zip(times[name], times[first], strict=True)]
        row |= {"seconds": statistics.median(times[name]), "flops": flops[name]}
        row |= {"time_ratio": statistics.median(ratios), "spread": (min(ratios), max(ratios))}
        row["flops_ratio"] = flops[name] / flops[first]
        row["reached"] = row["flops_ratio"] / row["time_ratio"]
    return list(rows.values())


def show(groups: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="a training step, of its baseline's", title_justify="left")
    for column in ("", "seconds", "time", "rounds", "FLOPs", "reached"):
        table.add_column(column, justify="right" if column else "left")
    for group in groups:
        table.add_row(f"[bold]{group['group']}[/] ({group['trains']}, batch {group['batch']})")
        for row in group["rows"]:
            if "left_out" in row:
                table.add_row(f"  {row['variant']}", "left out")
                continue
            low, high = row["spread"]
            figures = (f"{row[key]:.3f}" for key in ("flops_ratio", "reached"))
            table.add_row(
                f"  {row['variant']}",
                f"{row['seconds']:.3f}",
                f"{row['time_ratio']:.3f}",
                f"{low:.2f} to {high:.2f}",
                *figures,
            )
    console.print(table)


def main() -> None:
    more = {"only": {"nargs": "+", "choices": list(GROUPS), "default": list(GROUPS)}}
    options, device = timing_options(__doc__, **more, layers={"type": int}, batch={"type": int})
    console, groups = Console(), []
    torch.manual_seed(0)
    bench = Bench(device, options.layers, options.batch or 8)
    for group in options.only:
        trains = GROUPS[group]
        if device.type == "cuda":
            trains = "frozen" if group == "frozen" else "lora"
            if group == "full":
                console.print("full: left out: weights, gradients and moments of 7B do not fit")
                continue
        with bench.training(trains):
            if device.type == "cuda" and options.batch is None:
                bench.batch = largest_batch(bench, next(variant for variant in VARIANTS if variant.group == group))
            rows = measure(group, bench, options.rounds * (6 if group == "idle" else 1), console)
            groups.append({"group": group, "trains": trains, "batch": bench.batch, "rows": rows})
    show(groups, console)
    result = {"device": device_name(device), "precision": "bf16", "text": TEXT, "rounds": options.rounds}
    result |= {"language": type(bench.language).__name__, "parameters": bench.language.num_parameters()}
    write_result(f"speed-{device.type}", result | {"groups": groups}, options.out, console)


if __name__ == "__main__":
    main()
