"""Settings of the two methods of the Sparse Training Scheme."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sparsight.errors import UserError
from sparsight.schedules import Anneal, SkipSchedule
from sparsight.settings.base import Settings


class CompressorConfig(Settings):
    """Fewer visual tokens behind the bridge, in training alone (Sparse Training Scheme, stage I).

    Args:
        keep: share of the visual tokens that stay, at the stage's start.
        method: see ``sparse.compress``.
        final: share at the stage's end, reached by ``schedule``; ``keep`` throughout if not given.
        dense_every: every so many steps all tokens stay; never if not given.
        positions: tokens that stay keep their "original" positions, or are "renumbered" without gaps.
    """

    keep: float = Field(0.25, gt=0, le=1)
    method: Literal["uniform", "random", "text", "pool", "similarity", "merge"] = "uniform"
    final: float | None = Field(None, gt=0, le=1)
    schedule: Anneal = "linear"
    dense_every: int | None = Field(None, ge=1)
    positions: Literal["original", "renumbered"] = "original"


class SkipperConfig(Settings):
    """Layers of the language model that are skipped in a step, forward and backward, in training alone (Sparse
    Training Scheme, stage II). See ``schedules.skip_probabilities``.

    Args:
        protected: how many first and last layers always run.
        importance: of each layer, as ``sparsight analyze`` measures it; then the tilt follows it in place of depth.
    """

    renamed: ClassVar = frozenset({"course"})

    alpha: float = Field(0.6, ge=0, le=1)
    epsilon: float = Field(0.3, ge=-1, le=1)
    schedule: SkipSchedule = "falling"
    protected: tuple[int, int] = (0, 0)
    importance: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _probabilities(self) -> SkipperConfig:
        if self.alpha * (1 + abs(self.epsilon)) > 1:
            raise UserError(f"alpha {self.alpha}, epsilon {self.epsilon}: expected alpha * (1 + |epsilon|) <= 1")
        if min(self.protected) < 0:
            raise UserError(f"protected {self.protected}: expected numbers of first and last layers")
        return self


class CallbackConfig(Settings):
    """What `SparsightCallback` attaches, and how often it compares dense and sparse."""

    compressor: CompressorConfig | None = None
    skipper: SkipperConfig | None = None
    seed: int = 0
    dense_probe: int | None = Field(None, ge=1)
