"""Progress of a stage, 0 to 1, -> keep ratios and skipped layers. Pure functions of numbers; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sparsight.errors import UserError

Anneal = Literal["constant", "linear", "cosine", "steps"]
SkipSchedule = Literal["falling", "constant", "rising", "plateau"]
_STEPS = 4  # equal parts of a stage, for "steps"


def anneal(kind: Anneal, start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end``; "constant" stays at the start, "steps" goes there in four equal parts.

    Raises:
        UserError: ``progress`` lies outside [0, 1].
    """
    _check_progress(progress)
    share = {
        "constant": 0.0,
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "steps": min(math.floor(progress * _STEPS), _STEPS - 1) / (_STEPS - 1),
    }[kind]
    return start + (end - start) * share


def kept_tokens(tokens: int, keep: float) -> int:
    """How many of ``tokens`` stay, at least one. The one function that counts them.

    Raises:
        UserError: ``keep`` lies outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: expected a share above 0 and up to 1")
    return max(1, round(tokens * keep))


def skip_probabilities(
    layers: int,
    progress: float,
    alpha: float,
    epsilon: float = 0.0,
    schedule: SkipSchedule = "falling",
    protected: tuple[int, int] = (0, 0),
    importance: Sequence[float] | None = None,
    *,
    decay_from: float = 0.8,
    dense_last: float = 0.0,
) -> list[float]:
    """The probability that each layer is skipped (Sparse Training Scheme, Layer Dynamic Skipper).

    p_l = alpha * (1 - progress)^2 * (1 + epsilon * (2 l - (L - 1)) / (L - 1)), l = 0 .. L - 1. The first factor falls
    to zero over the stage; the second tilts over depth and keeps the mean: epsilon > 0 skips deep layers more.

    Args:
        progress: share of the stage that is done, fractional, so that one epoch anneals too.
        schedule: "falling" as above; "constant": a factor of 1; "rising": 1 - exp(-100 progress), as in Progressive
            Layer Dropping; "plateau": 1 until ``decay_from``, from there linear to 0 (see below).
        protected: first and last layers that are never skipped; the others keep their probabilities.
        importance: of each layer; then the tilt goes from the most to the least important one in place of depth (ours).
        decay_from, dense_last: shares of the stage: where the plateau ends, and how much of the end has no skipped
            layer under any schedule. "plateau" reaches 0 where that begins. Both are those of modded-nanogpt's pull
            request 348, after Don't Drop Dropout (ICML 2026).

    Raises:
        UserError: a value is out of its range; the message shows it.
    """
    _check_progress(progress)
    if alpha < 0 or alpha * (1 + abs(epsilon)) > 1:
        raise UserError(f"alpha {alpha}, epsilon {epsilon}: expected alpha >= 0 and alpha * (1 + |epsilon|) <= 1")
    first, last = protected
    if min(protected) < 0 or first + last > layers:
        raise UserError(f"protected layers {first} + {last}: the model has {layers}")
    ranks: Sequence[int] = range(layers)
    if importance is not None:
        if len(importance) != layers:
            raise UserError(f"importance has {len(importance)} values, but the model has {layers} layers")
        ranks = np.argsort(np.argsort([-value for value in importance], kind="stable")).tolist()
    dense_from = 1 - dense_last
    if schedule == "plateau":
        if not decay_from < dense_from:
            raise UserError(f"decay_from {decay_from}, dense_last {dense_last}: expected decay_from < 1 - dense_last")
        factor = min(1.0, (dense_from - progress) / (dense_from - decay_from))
    else:
        factor = {"falling": (1 - progress) ** 2, "constant": 1.0, "rising": 1 - math.exp(-100 * progress)}[schedule]
    if dense_last and progress > dense_from - 1e-9:  # shares of steps are not exact
        factor = 0.0
    tilts = (1 + epsilon * (2 * rank - (layers - 1)) / max(layers - 1, 1) for rank in ranks)
    return [alpha * factor * tilt if first <= layer < layers - last else 0.0 for layer, tilt in enumerate(tilts)]


def skipped_layers(probabilities: Sequence[float], seed: int, step: int, alternating: bool = False) -> tuple[bool, ...]:
    """Which layers are skipped in an optimizer step: a pure function, the same on every rank, after resume, and when
    activations are recomputed. A layer's draw does not depend on the number of layers. One layer always runs: where
    all are drawn, the one with the smallest probability.

    ``alternating``: the step's layers are the even or the odd ones, drawn too, each with twice its probability: none is
    skipped beside its neighbour, and each as often as before.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step])))
    if alternating:
        turn = int(generator.integers(2))
        probabilities = [2 * p if layer % 2 == turn else 0.0 for layer, p in enumerate(probabilities)]
    draws = generator.random(len(probabilities))
    skipped = [bool(draw < p) for draw, p in zip(draws, probabilities, strict=True)]
    if skipped and all(skipped):
        skipped[int(np.argmin(probabilities))] = False
    return tuple(skipped)


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise UserError(f"progress {progress}: expected 0 to 1")
