"""Settings of the two methods of the Sparse Training Scheme."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sparsight.errors import UserError
from sparsight.schedules import Anneal, SkipSchedule, anneal, skip_probabilities
from sparsight.settings.base import Settings


class CompressorConfig(Settings):
    """Fewer visual tokens behind the bridge, in training alone (Sparse Training Scheme, stage I).

    Args:
        keep: share of the visual tokens that stay, at the stage's start.
        method: see ``sparse.compress``.
        final: share at the stage's end, reached by ``schedule``; ``keep`` throughout if not given.
        dense_every: every so many steps all tokens stay; never if not given.
        positions: tokens that stay keep their "original" positions, or are "renumbered" without gaps.
        pad_to_multiple_of: lengths after compression, in training (ours); if not given, 8 on a GPU, 64 there where
            layers are compiled, and 1 on a CPU. Rows of packed samples are not padded.
    """

    keep: float = Field(0.25, gt=0, le=1)
    method: Literal["uniform", "random", "text", "pool", "similarity", "merge"] = "uniform"
    final: float | None = Field(None, gt=0, le=1)
    schedule: Anneal = "linear"
    dense_every: int | None = Field(None, ge=1)
    positions: Literal["original", "renumbered"] = "original"
    pad_to_multiple_of: int | None = Field(None, ge=1)

    @property
    def scheduled(self) -> bool:
        """Whether the share that stays differs from step to step."""
        return self.final is not None or self.dense_every is not None

    @property
    def most(self) -> float:
        """The largest share that stays in any step."""
        return 1.0 if self.dense_every is not None else max(self.keep, self.final or 0.0)

    def keep_at(self, progress: float) -> float:
        """The share that stays in a step that is not one of ``dense_every``."""
        return self.keep if self.final is None else anneal(self.schedule, self.keep, self.final, progress)


class SkipperConfig(Settings):
    """Layers of the language model that are skipped in a step, forward and backward, in training alone (Sparse
    Training Scheme, stage II). See ``schedules.skip_probabilities``.

    The scheme has no ``plateau``, ``dense_last``, ``alternating`` or ``inverse_density``: these are those of
    modded-nanogpt's pull request 348, after Don't Drop Dropout (ICML 2026).

    Args:
        protected: how many first and last layers always run.
        importance: of each layer, as ``sparsight analyze`` measures it; then the tilt follows it in place of depth.
        decay_from: of ``schedule: plateau``: share of the stage after which it falls; 0.8 if not given.
        dense_last: share of the stage, at its end, in which no layer is skipped.
        layers: "alternating": in each step the even or the odd ones, drawn; each layer is skipped as often as with
            "any", never beside a neighbour.
        tokens: "visual": in a skipped layer visual and audio tokens pass by, and text goes through it, attending to
            text alone. Every layer is trained in every step, so that nothing is left out of the optimizer (ours; ShortV
            freezes visual tokens in layers at inference).
        inverse_density: a layer that runs adds to its input 1 / (1 - p) of what it adds at inference, p its
            probability in that step: in the mean of the draws, as much.
    """

    renamed: ClassVar = frozenset({"course"})

    alpha: float = Field(0.6, ge=0, le=1)
    epsilon: float = Field(0.3, ge=-1, le=1)
    schedule: SkipSchedule = "falling"
    protected: tuple[int, int] = (0, 0)
    importance: tuple[float, ...] | None = None
    decay_from: float | None = Field(None, ge=0, lt=1)
    dense_last: float = Field(0.0, ge=0, lt=1)
    layers: Literal["any", "alternating"] = "any"
    tokens: Literal["all", "visual"] = "all"
    inverse_density: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> SkipperConfig:
        if min(self.protected) < 0:
            raise UserError(f"protected {self.protected}: expected numbers of first and last layers")
        if self.decay_from is not None and self.schedule != "plateau":
            raise UserError(f"decay_from {self.decay_from}: expected schedule 'plateau', found '{self.schedule}'")
        self.probabilities(len(self.importance or ()) or 1 + sum(self.protected), 0.0)  # raises
        most, given = self.alpha * (1 + abs(self.epsilon)), f"alpha {self.alpha}, epsilon {self.epsilon}"
        if self.layers == "alternating" and most > 0.5:
            why = "with layers 'alternating', a layer's turn comes in half of the steps"
            raise UserError(f"{given}: {why}: expected alpha * (1 + |epsilon|) <= 0.5")
        if self.inverse_density and self.tokens == "visual":
            raise UserError("inverse_density weighs whole layers: expected tokens 'all', found 'visual'")
        if self.inverse_density and most == 1:
            raise UserError(f"{given}: with inverse_density, expected alpha * (1 + |epsilon|) < 1")
        return self

    def probabilities(self, layers: int, progress: float) -> list[float]:
        """`schedules.skip_probabilities` of so many layers. Raises UserError if they do not fit the settings."""
        given = self.model_dump(exclude={"layers", "tokens", "inverse_density"}, exclude_none=True)
        return skip_probabilities(layers, progress, **given)


class CallbackConfig(Settings):
    """What `SparsightCallback` attaches, and how often it compares dense and sparse."""

    compressor: CompressorConfig | None = None
    skipper: SkipperConfig | None = None
    seed: int = 0
    dense_probe: int | None = Field(None, ge=1)
