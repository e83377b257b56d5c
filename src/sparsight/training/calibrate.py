"""A line through measured steps: seconds of a pass by the FLOPs of its parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

TERMS = ("pass", "linear", "attention")


def fit(parts: Sequence[dict[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Seconds of a pass, and of each FLOP of linear maps and of attention: no negative ones, least relative squares."""
    attention = np.array([part["language_attention"] for part in parts])
    linear = np.array([sum(part.values()) for part in parts]) - attention
    terms = np.stack([np.ones(len(parts)), linear, attention], 1) / np.array(seconds)[:, None]
    best, least = [0.0] * 3, np.inf
    for size in (1, 2, 3):
        for columns in itertools.combinations(range(3), size):
            scale = terms[:, columns].max(0)
            solution = np.linalg.lstsq(terms[:, columns] / scale, np.ones(len(parts)), rcond=None)[0] / scale
            error = float(((terms[:, columns] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least:
                best, least = [0.0] * 3, error
                for column, value in zip(columns, solution, strict=True):
                    best[column] = float(value)
    return dict(zip(TERMS, best, strict=True))
