"""Whether two samples differ: a rank test, its correction for many tests, and the size of the difference.

Like the rest of the statistics they assume no distribution, since times on a shared machine have a long tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pocketlm_benchmarks.result import Figure
from pocketlm_benchmarks.statistics import LEVEL, resampled_medians

EXACT_UP_TO = 50
"""Values of both samples together up to which the rank test counts every way to deal them out."""

_SEED = 0


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float]) -> Figure:
    """With its 95 % bootstrap interval, both samples resampled apart. They hold numbers above 0."""
    random = np.random.default_rng(_SEED)
    ratios = resampled_medians(numerator, random) / resampled_medians(denominator, random)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(float(np.median(numerator) / np.median(denominator)), float(low), float(high))


def rank_sum_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p value of the rank-sum test (Wilcoxon, 1945; Mann and Whitney, 1947); ties share their rank.

    Small samples get the exact permutation distribution, by the shift algorithm (Streitberg and Röhmel,
    1986), large ones the normal approximation with corrections for ties and continuity.
    """
    ranks = _double_ranks(np.concatenate([np.asarray(first, np.float64), np.asarray(second, np.float64)]))
    count, total = len(first), len(first) + len(second)
    expected = count * (total + 1)  # of the sum of `first`'s double ranks
    distance = abs(int(ranks[:count].sum()) - expected)
    if total <= EXACT_UP_TO:
        ways = _ways(ranks, count)
        sums = np.arange(len(ways))
        return float(ways[np.abs(sums - expected) >= distance].sum() / ways.sum())
    _, ties = np.unique(ranks, return_counts=True)
    spread = (total + 1) - float((ties**3 - ties).sum()) / (total * (total - 1))
    if spread <= 0:  # all values are equal
        return 1.0
    deviation = 2 * math.sqrt(count * (total - count) / 12 * spread)
    return math.erfc(max(0, distance - 1) / deviation / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number (Holm, 1979): below α, the chance of any false alarm is too."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for done, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - done)))
        adjusted[index] = largest
    return adjusted


def _double_ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Twice the rank of each value, counted from 1: a whole number also where ties share the mean rank."""
    ordered = np.sort(values)
    below, not_above = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return np.asarray(below + not_above + 1, np.int64)


def _ways(ranks: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """For each sum from 0 on, how many choices of `count` of the ranks have it."""
    ways = np.zeros((count + 1, int(ranks.sum()) + 1))
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    return np.asarray(ways[count])
