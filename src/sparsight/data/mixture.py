"""Which part of a mixture each sample comes from: arithmetic on its number, so that order and resume need no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from sparsight.errors import UserError

LONGEST_PERIOD = 100_000


class Quotas:
    """Turns by weight: after any n turns, each part has had n * weight / sum of them, to less than one.

    The order repeats after as many turns as the weights, brought to the smallest whole numbers, add up to (Tijdeman's
    rule: of the parts that are not ahead, the one whose turn is due first).

    Args:
        weights: above 0, read as decimals: 0.1 is exactly a tenth.

    Raises:
        UserError: the order repeats only after more than `LONGEST_PERIOD` turns.
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
        self.parts, self.ranks = np.empty((2, self.period), np.int32)  # whose turn it is; its turns before, in a period
        for turn in range(self.period):
            ready = [p for p, share in enumerate(self.shares) if had[p] * self.period < (turn + 1) * share]
            part = min(ready, key=lambda p: -(-(had[p] + 1) * self.period // self.shares[p]))
            self.parts[turn], self.ranks[turn] = part, had[part]
            had[part] += 1

    def turn(self, index: int) -> tuple[int, int]:
        """The part whose turn ``index`` is, and the number of its turns before."""
        rounds, turn = divmod(index, self.period)
        part = int(self.parts[turn])
        return part, rounds * self.shares[part] + int(self.ranks[turn])

    def counts(self, n: int) -> list[int]:
        """Turns of each part among the first ``n``."""
        rounds, rest = divmod(n, self.period)
        extra = np.bincount(self.parts[:rest], minlength=len(self.shares))
        return [rounds * share + int(more) for share, more in zip(self.shares, extra, strict=True)]
