"""What a recipe will cost, stage by stage, before it runs; what dominates, and what would make it cheaper."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from sparsight.cost.flops import step_flops
from sparsight.cost.memory import (
    Parts,
    bridge_activations,
    encoder_activations,
    language_activations,
    step_memory,
)
from sparsight.cost.shapes import Trains, encoder_shape, language_shape, tell_if_cut
from sparsight.layouts import window_bounds
from sparsight.schedules import anneal, kept_tokens, skip_probabilities
from sparsight.settings.bridges import ChainOfSightConfig, ResamplerConfig
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Lora, Recipe, Stage

POINTS = 32  # places in a stage's course at which schedules are looked at
MOST = 4096  # micro-batches larger than this are not looked for
# Chain-of-Sight, Table 1: pre-training time by the clock, relative to 336 tokens.
PAPER_CLOCK = {"cos-32": 0.27, "cos-48": 0.35, "cos-80": 0.42, "cos-336": 1.0}


@dataclass(frozen=True)
class StageCost:
    """One stage of a recipe, forecast. FLOPs are those of the whole stage; bytes those of a step's peak."""

    recipe: Recipe
    stage: Stage
    cached_before: int = 0  # images that an earlier stage has encoded

    @cached_property
    def shapes(self) -> tuple[Any, Any]:
        """Of the encoder and of the language model. What has trained is in fp32, however it was stored."""
        encoder = encoder_shape(self.recipe.vision)
        language = language_shape(self.recipe.language, self.recipe.language_layers)
        before = takewhile(lambda stage: stage.name != self.stage.name, self.recipe.stages)
        trained = [Trains.of(stage) for stage in (*before, self.stage)]
        if self.recipe.precision == "fp32" or any(trains.vision for trains in trained):
            encoder = replace(encoder, weight_bytes=4)
        if self.recipe.precision == "fp32" or any(trains.language and not trains.lora_rank for trains in trained):
            language = replace(language, weight_bytes=4)
        return encoder, language

    @property
    def image_size(self) -> int:
        """Side of an image in pixels; the encoder's own where the stage says none."""
        return self.stage.image_size or self.shapes[0].image_size

    @cached_property
    def map_size(self) -> tuple[int, int]:
        return self.shapes[0].map_size(self.image_size)

    @cached_property
    def trains(self) -> Trains:
        return Trains.of(self.stage)

    @cached_property
    def tokens(self) -> int:
        """Visual tokens of a image."""
        return self.stage.bridge.visual_tokens(self.map_size)

    def length(self, keep: float = 1.0) -> float:
        """Positions of a conversation."""
        conversation = self.stage.conversation
        return conversation.text + conversation.images * kept_tokens(self.tokens, keep)

    @cached_property
    def micro_batch(self) -> int:
        """Conversations in a forward pass, on one rank."""
        if self.stage.batch_tokens is not None:
            return max(1, int(self.stage.batch_tokens // self.length()))
        return self.stage.micro_batch_size or self.stage.batch_size

    @property
    def batch(self) -> int:
        """Conversations in an optimizer step; with ``batch_tokens``, a step is one micro-batch."""
        return self.stage.batch_size if self.stage.batch_tokens is None else self.micro_batch

    @property
    def steps(self) -> int:
        return -(-self.stage.samples // self.batch)

    @cached_property
    def images(self) -> int:
        """Different images, as far as the recipe says."""
        seen = round(self.stage.samples * self.stage.conversation.images)
        data = self.recipe.data_of(self.stage)
        return min(data.scenes, seen) if isinstance(data, SceneData) else seen

    @cached_property
    def flops(self) -> dict[str, float]:
        """Executed FLOPs of the stage by part; schedules are averaged over its course."""
        encoder, total = self.shapes[0], defaultdict[str, float](float)
        image = encoder.flops(self.image_size, self.recipe.vision_levels, self.trains)
        for share, keep, layers in self._course():
            for part, flops in self.micro_batch_flops(keep, layers).items():
                total[part] += share * flops * self.stage.samples / self.micro_batch
        images = self.stage.samples * self.stage.conversation.images
        if self.stage.cache_features:
            images = float(self.images - self.cached_before)
        return {"encoder": image * max(0.0, images)} | dict(total)

    def micro_batch_flops(self, keep: float = 1.0, layers: float | None = None) -> dict[str, float]:
        """Of one forward and backward pass behind the encoder."""
        encoder, language = self.shapes
        rows, positions = self._rows(self.micro_batch, keep)
        parts = step_flops(
            language if layers is None else replace(language, layers=layers),
            self.stage.bridge,
            encoder.level_widths(self.recipe.vision_levels),
            self.map_size,
            0.0,
            rows,
            positions,
            self.micro_batch * self.stage.conversation.supervised,
            self.micro_batch * self.stage.conversation.images,
            self.trains,
        )
        del parts["encoder"]
        return parts

    def _rows(self, conversations: int, keep: float = 1.0) -> tuple[float, float]:
        length, capacity = self.length(), self.stage.pack_length
        if capacity is None or capacity < length:
            return conversations, self.length(keep)
        rows = conversations * length / capacity
        return rows, capacity * self.length(keep) / length

    def _course(self) -> Iterator[tuple[float, float, float]]:
        """(share of the stage, keep ratio, mean number of layers run)."""
        compressor, skipper, layers = self.stage.compressor, self.stage.skipper, self.shapes[1].layers
        for point in range(POINTS):
            progress, keep, off = (point + 0.5) / POINTS, 1.0, 0.0
            if skipper is not None:
                off = sum(skip_probabilities(layers, progress, **skipper.model_dump()))
            if (c := compressor) is not None:
                keep = c.keep if c.final is None else anneal(c.schedule, c.keep, c.final, progress)
                if c.dense_every is not None:
                    yield 1 / POINTS / c.dense_every, 1.0, layers - off
            dense = 1 / c.dense_every if c is not None and c.dense_every is not None else 0.0
            yield (1 - dense) / POINTS, keep, layers - off

    def mean(self, what: str) -> float:
        """Over the stage: ``tokens`` that stay of a image's, or ``layers`` run."""
        index = {"tokens": 0, "layers": 1}[what]
        return sum(share * (kept_tokens(self.tokens, keep), layers)[index] for share, keep, layers in self._course())

    @cached_property
    def parts(self) -> Parts:
        encoder, language = self.shapes
        return Parts.of(encoder, self.recipe.vision_levels, self.stage.bridge, language, self.trains)

    def memory(self, micro_batch: int | None = None) -> dict[str, float]:
        """Bytes at the peak of a step, by part. Of a compressor's course, the point with most tokens counts."""
        count = micro_batch or self.micro_batch
        (encoder, language), bf16, trains = self.shapes, self.recipe.precision != "fp32", self.trains
        keep = max(keep for _, keep, _ in self._course())
        rows, positions = self._rows(count, keep)
        held = language_activations(language, rows, positions, trains, bf16)
        layer = language_activations(
            replace(language, layers=1), rows, positions, replace(trains, recompute=False), bf16
        )
        copies = 0.0
        if bf16 and language.weight_bytes == 4 and trains.flows_back:
            copies = 2.0 * language.parameters
        levels, images = self.recipe.vision_levels, count * self.stage.conversation.images
        tower = 0.0
        if not self.stage.cache_features:
            tower = encoder_activations(encoder, self.image_size, levels, images, trains, bf16)
        bridge = bridge_activations(
            self.stage.bridge, encoder.level_widths(levels), language.hidden, self.map_size, images, bf16
        )
        logits = count * self.stage.conversation.supervised * language.vocabulary * (10 if bf16 else 8)
        kept = held + bridge + copies + logits + tower * trains.vision
        return step_memory(self.parts, kept, tower, layer, count < self.batch)

    def fits(self, limit: float) -> int:
        """The largest micro-batch whose step fits into ``limit`` bytes; 0 if none does."""
        low, high = 0, MOST
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sum(self.memory(middle).values()) <= limit else (low, middle - 1)
        return low


def forecast(recipe: Recipe) -> list[StageCost]:
    """The stages of a recipe.

    Raises:
        UserError: the sizes of encoder or language model are not known, or a layout does not fit the feature map.
    """
    stages, cached = [], Counter[str]()
    for stage in recipe.stages:
        encoder, side = StageCost(recipe, stage).shapes[0], StageCost(recipe, stage).image_size
        tell_if_cut(f"vision '{recipe.vision}'", side, getattr(encoder, "patch", 1), encoder.image_size)
        images = f"{side} {recipe.source_of(stage)}"
        cost = StageCost(recipe, stage, cached[images])
        for scale in stage.bridge.scales.scales if hasattr(stage.bridge, "scales") else ():
            window_bounds(min(cost.map_size), scale.grid)
        if stage.cache_features:
            cached[images] = max(cached[images], cost.images)
        stages.append(cost)
    return stages


def total_flops(stages: list[StageCost]) -> float:
    return sum(sum(cost.flops.values()) for cost in stages)


def inner_sizes(bridge: Any) -> dict[str, Any]:
    """Width and its like of a bridge with queries; nothing of another."""
    return {key: getattr(bridge, key) for key in ("width", "heads", "mlp_ratio", "depth") if hasattr(bridge, key)}


def standard(recipe: Recipe) -> Recipe:
    """The standard way to train on the same samples: in every stage a single-scale resampler with as many tokens as the
    recipe's largest stage has, of the stage's own width, every token and every layer in every step."""
    tokens = max(StageCost(recipe, stage).tokens for stage in recipe.stages)

    def plain(stage: Stage) -> Stage:
        bridge = ResamplerConfig(tokens=tokens, **inner_sizes(stage.bridge))
        return stage.model_copy(update={"bridge": bridge, "compressor": None, "skipper": None})

    return recipe.model_copy(update={"stages": tuple(map(plain, recipe.stages))})


def remedies(cost: StageCost, limit: float) -> list[str]:
    """Changes of a stage that does not fit into ``limit`` bytes after which it does, each with its size."""
    stage = cost.stage
    rate = stage.learning_rate
    options: dict[str, dict[str, Any]] = {}
    if fits := min(cost.fits(limit), cost.batch):
        divisor = max(n for n in range(1, fits + 1) if cost.batch % n == 0)
        options[f"micro_batch_size: {divisor}"] = {"micro_batch_size": divisor, "batch_tokens": None}
    one = {"micro_batch_size": 1, "batch_tokens": None}
    options["gradient_checkpointing: true"] = {"gradient_checkpointing": True}
    options["gradient_checkpointing: true, micro_batch_size: 1"] = one | {"gradient_checkpointing": True}
    if rate.language is not None and stage.lora is None:
        options["lora: {rank: 16}"] = {"lora": Lora()}
        options["lora: {rank: 16}, gradient_checkpointing: true, micro_batch_size: 1"] = one | {
            "lora": Lora(), "gradient_checkpointing": True
        }  # fmt: skip
    if rate.vision is not None and (rate.bridge or rate.language):
        frozen = rate.model_copy(update={"vision": None})
        options["learning_rate.vision: null, micro_batch_size: 1"] = one | {"learning_rate": frozen}
    sizes = {
        name: sum(replace(cost, stage=stage.model_copy(update=update)).memory().values())
        for name, update in options.items()
    }
    return [f"{name} ({size / 1e9:.1f} GB)" for name, size in sizes.items() if size <= limit]


def paper_ratios(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Layout -> (FLOPs of the first stage relative to 336 tokens, the paper's pre-training time relative to that)."""
    stage = recipe.stages[0]
    if not isinstance(stage.bridge, ChainOfSightConfig) or min(StageCost(recipe, stage).map_size) < 8:
        return {}

    def flops(layout: str) -> float:
        bridge = ChainOfSightConfig(**(stage.bridge.model_dump() | {"layout": layout}))
        cost = StageCost(recipe, stage.model_copy(update={"bridge": bridge}))
        return sum(cost.flops.values())

    full = flops("cos-336")
    return {name: (flops(name) / full, clock) for name, clock in PAPER_CLOCK.items()}


Speed = Callable[[StageCost], float]


def at_peak(peak: float, mfu: float) -> Speed:
    """Seconds of a stage on a device that does ``mfu`` of its peak."""
    return lambda cost: sum(cost.flops.values()) / (peak * mfu)
