"""The cost of a recipe, stage by stage, before it runs; and the standard recipe, for comparison."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

from sparsight.cost.flops import bridge_flops, language_flops
from sparsight.cost.memory import Parts, bridge_activations, encoder_activations, language_activations, step_memory
from sparsight.cost.shapes import EncoderShape, LanguageShape, Trains, encoder_shape, language_shape, tell_if_cut
from sparsight.layouts import window_bounds
from sparsight.schedules import kept_tokens
from sparsight.settings.bridges import ResamplerConfig, WindowedSettings
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Recipe, Stage

POINTS = 100  # of a stage, at which its schedules are evaluated
MOST = 4096  # the largest micro-batch that `StageCost.fits` tries

Speed = Callable[["StageCost"], float]  # seconds of a stage


@dataclass(frozen=True)
class StageCost:
    """The forecast of one stage of a recipe: FLOPs of the whole stage, bytes at the peak of a step."""

    recipe: Recipe
    stage: Stage
    cached_before: int = 0  # images that an earlier stage has encoded

    @cached_property
    def shapes(self) -> tuple[EncoderShape, LanguageShape]:
        """Of the encoder and of the language model. A part that has trained is in fp32, however it was stored."""
        encoder = encoder_shape(self.recipe.vision)
        language = language_shape(self.recipe.language, self.recipe.language_layers)
        before = takewhile(lambda stage: stage.name != self.stage.name, self.recipe.stages)
        trained = [Trains.of(stage) for stage in (*before, self.stage)]
        if self.recipe.precision == "fp32" or any(trains.vision for trains in trained):
            encoder = replace(encoder, weight_bytes=4)
        if self.recipe.precision == "fp32" or any(trains.language and not trains.lora_rank for trains in trained):
            language = replace(language, weight_bytes=4)
        return encoder, language

    @cached_property
    def trains(self) -> Trains:
        return Trains.of(self.stage)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels; the encoder's own where the stage has none."""
        return self.stage.image_size or self.shapes[0].image_size

    @cached_property
    def map_size(self) -> tuple[int, int]:
        return self.shapes[0].map_size(self.image_size)

    @cached_property
    def level_widths(self) -> list[int]:
        return self.shapes[0].level_widths(self.recipe.vision_levels)

    @cached_property
    def tokens(self) -> int:
        """Visual tokens of an image."""
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
        """Different images, as far as the recipe tells."""
        seen = round(self.stage.samples * self.stage.conversation.images)
        data = self.recipe.data_of(self.stage)
        return min(data.scenes, seen) if isinstance(data, SceneData) else seen

    @cached_property
    def flops(self) -> dict[str, float]:
        """Executed FLOPs of the stage by part; schedules are averaged over it."""
        images = self.stage.samples * self.stage.conversation.images
        new = max(0, self.images - self.cached_before) if self.stage.cache_features else images
        return self.passes(new, self.trains)

    def passes(self, encoded: float, trains: Trains) -> dict[str, float]:
        """FLOPs of passes over all samples, of which so many images are encoded anew; forward alone if nothing
        trains."""
        stage, samples, (encoder, language) = self.stage, self.stage.samples, self.shapes
        images, passes = samples * stage.conversation.images, samples / self.micro_batch
        image = encoder.flops(self.image_size, self.recipe.vision_levels, trains)
        sizes = self.level_widths, language.hidden, self.map_size, images / passes
        total = Counter({"encoder": image * encoded, "bridge": passes * bridge_flops(stage.bridge, *sizes, trains)})
        for share, keep, layers in self._schedule():
            rows, positions = self._rows(samples, keep)
            labels = samples * stage.conversation.supervised
            splits = stage.skipper is not None and stage.skipper.tokens == "visual"
            beside = splits * positions * stage.conversation.text / self.length(keep)
            parts = language_flops(language, rows, positions, labels, trains, layers, beside)
            total.update({part: share * flops for part, flops in parts.items()})
        return dict(total)

    def _rows(self, conversations: int, keep: float = 1.0) -> tuple[float, float]:
        """Rows, packed where the stage says how long, and positions in each."""
        length, capacity = self.length(), self.stage.pack_length
        if capacity is None or capacity < length:
            return conversations, self.length(keep)
        return conversations * length / capacity, capacity * self.length(keep) / length

    def _schedule(self) -> Iterator[tuple[float, float, float]]:
        """(share of the stage, keep ratio, mean number of active layers)."""
        c, skipper, layers = self.stage.compressor, self.stage.skipper, self.shapes[1].layers
        for point in range(POINTS):
            progress, keep, dense = (point + 0.5) / POINTS, 1.0, 0.0
            skipped = sum(skipper.probabilities(layers, progress)) if skipper is not None else 0.0
            if c is not None:
                keep = c.keep_at(progress)
                dense = 1 / c.dense_every if c.dense_every is not None else 0.0
            if dense:
                yield dense / POINTS, 1.0, layers - skipped
            yield (1 - dense) / POINTS, keep, layers - skipped

    def mean(self, what: str) -> float:
        """Over the stage: ``tokens`` that stay of an image's, or ``layers`` that are active."""
        return sum(
            share * (kept_tokens(self.tokens, keep) if what == "tokens" else layers)
            for share, keep, layers in self._schedule()
        )

    @cached_property
    def parts(self) -> Parts:
        return Parts.of(self.shapes[0], self.recipe.vision_levels, self.stage.bridge, self.shapes[1], self.trains)

    def memory(self, micro_batch: int | None = None) -> dict[str, float]:
        """Bytes at the peak of a step, by part, where the compressor keeps the most tokens."""
        count = micro_batch or self.micro_batch
        (encoder, language), trains, bf16 = self.shapes, self.trains, self.recipe.precision != "fp32"
        rows, positions = self._rows(count, 1.0 if self.stage.compressor is None else self.stage.compressor.most)
        images, labels = count * self.stage.conversation.images, count * self.stage.conversation.supervised
        tower = 0.0
        if not self.stage.cache_features:
            tower = encoder_activations(encoder, self.image_size, self.recipe.vision_levels, images, trains, bf16)
        kept = tower * trains.vision + language_activations(language, rows, positions, trains, bf16)
        kept += bridge_activations(
            self.stage.bridge, self.level_widths, language.hidden, self.map_size, images, bf16
        ) + labels * language.vocabulary * (10 if bf16 else 8)
        if bf16 and language.weight_bytes == 4 and trains.flows_back:
            kept += 2.0 * language.unpacked  # copies of the weights in bf16
        one = replace(language, layers=1), rows, positions, replace(trains, recompute=False), bf16
        return step_memory(self.parts, kept, tower, language_activations(*one), count < self.batch)

    def fits(self, limit: float) -> int:
        """The largest micro-batch whose step fits into ``limit`` bytes; 0 if none does."""
        return bisect_right(range(1, MOST + 1), limit, key=lambda count: sum(self.memory(count).values()))


def forecast(recipe: Recipe) -> list[StageCost]:
    """The stages of a recipe.

    Raises:
        UserError: the sizes of encoder or language model are not known, or a layout does not fit the feature map.
    """
    stages, cached = [], Counter[str]()
    for stage in recipe.stages:
        cost = StageCost(recipe, stage)
        encoder, side = cost.shapes[0], cost.image_size
        tell_if_cut(f"vision '{recipe.vision}'", side, getattr(encoder, "patch", 1), encoder.image_size)
        for scale in stage.bridge.scales.scales if isinstance(stage.bridge, WindowedSettings) else ():
            window_bounds(min(cost.map_size), scale.grid)
        images = f"{side} {recipe.source_of(stage)}"
        stages.append(replace(cost, cached_before=cached[images]))
        if stage.cache_features:
            cached[images] = max(cached[images], cost.images)
    return stages


def total_flops(stages: list[StageCost]) -> float:
    return sum(sum(cost.flops.values()) for cost in stages)


def standard(recipe: Recipe) -> Recipe:
    """The standard way to train on the same samples: in every stage a single-scale resampler with as many tokens as the
    recipe's largest stage has, of the stage's own width, every token and every layer in every step."""
    tokens = max(StageCost(recipe, stage).tokens for stage in recipe.stages)

    def plain(stage: Stage) -> Stage:
        sizes = stage.bridge.model_dump(include={"width", "heads", "mlp_ratio", "depth"})
        bridge = ResamplerConfig(tokens=tokens, **sizes)
        return stage.model_copy(update={"bridge": bridge, "compressor": None, "skipper": None})

    return recipe.model_copy(update={"stages": tuple(map(plain, recipe.stages))})


def at_peak(peak: float, mfu: float) -> Speed:
    """Seconds of a stage on a device that does ``mfu`` of its peak."""
    return lambda cost: sum(cost.flops.values()) / (peak * mfu)
