# SPDX-License-Identifier: BSD-3-Clause
"""Medians, intervals and geometric means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "geometric_mean", "median_of", "paired_ratio"]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median with an interval that holds the true one with 95% probability."""

    value: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """Half the interval, as a share of the value."""
        return (self.high - self.low) / 2 / self.value


def median_of(values: Sequence[float]) -> Estimate:
    """Median and its interval by order statistics, free of any assumption on the distribution.

    The number of samples below the true median is binomial with p = 1/2, which gives the ranks
    (David and Nagaraja, "Order Statistics", section 7.1). Fewer than six samples cannot reach 95%:
    the interval is then their whole range.
    """
    ordered = sorted(values)
    n = len(ordered)
    below, rank = 0.0, 0
    while True:
        below += math.comb(n, rank) / 2**n
        if below > (1 - _CONFIDENCE) / 2:
            break
        rank += 1
    rank = max(rank, 1)
    return Estimate(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Median of the ratios round by round: what both suffer alike in a round cancels.

    Where one took part in the first rounds only, these count.
    """
    return median_of([a / b for a, b in zip(numerator, denominator, strict=False)])


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios; raises ValueError for none."""
    return statistics.geometric_mean(values)
