"""Whose turn it is in a mixture: pure arithmetic on the index, so that order, resume and sharding need no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from sparsight.errors import UserError

LONGEST_PERIOD = 100_000


class Quotas:
    """Turns by weight. After any number n of turns, each part has had its share, n * weight / sum, to less than one.

    The order repeats after as many turns as the smallest whole numbers in the ratio of the weights add up to, and is
    kept for one such period (Tijdeman's rule: of the parts that are not ahead, the one whose turn is due first).

    Args:
        weights: above 0; as they are written, so that 0.1 is a tenth.

    Raises:
        UserError: the order repeats too late to be kept.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(weight * math.lcm(*(each.denominator for each in exact))) for weight in exact]
        self.shares = [weight // math.gcd(*whole) for weight in whole]
        self.period = sum(self.shares)
        if self.period > LONGEST_PERIOD:
            raise UserError(
                f"weights {list(weights)}: in whole numbers they add up to {self.period:,}, expected at most "
                f"{LONGEST_PERIOD:,}; round them"
            )
        had = [0] * len(weights)
        self.parts = np.empty(self.period, np.int32)
        self.ranks = np.empty(self.period, np.int32)  # turns that the part has had in this period
        for turn in range(self.period):
            ready = [p for p, share in enumerate(self.shares) if had[p] * self.period < (turn + 1) * share]
            part = min(ready, key=lambda p: -(-(had[p] + 1) * self.period // self.shares[p]))
            self.parts[turn], self.ranks[turn] = part, had[part]
            had[part] += 1

    def place(self, index: int) -> tuple[int, int]:
        """Whose turn ``index`` is, and how many turns that part has had before."""
        rounds, turn = divmod(index, self.period)
        part = int(self.parts[turn])
        return part, rounds * self.shares[part] + int(self.ranks[turn])

    def counts(self, n: int) -> list[int]:
        """Turns of each part among the first ``n``."""
        rounds, rest = divmod(n, self.period)
        extra = np.bincount(self.parts[:rest], minlength=len(self.shares))
        return [rounds * share + int(more) for share, more in zip(self.shares, extra, strict=True)]
