"""Medians and how sure of them one can be.

Times on a shared machine have a long tail, so every figure is a median, and its interval comes from the
bootstrap (Efron, 1979), which assumes no distribution. A percentile is given only where the sample holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pocketlm_benchmarks.result import Figure, Summary

LEVEL = 0.95
P95_FROM, P99_FROM = 20, 100
"""Samples from which on a percentile is more than the maximum."""

_RESAMPLES = 2000
_BATCH = 1 << 20  # resampled values held at once
_SEED = 0


def summarize(samples: Sequence[float]) -> Summary:
    """Median, interval and percentiles of at least one sample; ValueError for none."""
    return summarize_rounds([[sample] for sample in samples])


def summarize_rounds(rounds: Sequence[Sequence[float]]) -> Summary:
    """Of all rounds' samples together, at least one; the interval holds how much the rounds differ.

    What is drawn again is whole rounds (the cluster bootstrap: Davison and Hinkley, 1997, section 3.8). The
    samples of a round resemble each other, for the device's state is the same: drawn one by one, thousands of
    gaps between tokens would give an interval that is far too narrow. A single round has only its samples.
    """
    rounds = [each for each in rounds if len(each)]
    if not rounds:
        raise ValueError("there is no sample to summarize")
    values = np.concatenate([np.asarray(each, np.float64) for each in rounds])
    drawn = rounds if len(rounds) > 1 else [[value] for value in rounds[0]]
    interval = _interval_of_rounds(drawn) if len(values) > 1 else None
    return Summary(
        n=len(values),
        median=float(np.median(values)),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        minimum=float(values.min()),
        maximum=float(values.max()),
        p95=float(np.percentile(values, 95)) if len(values) >= P95_FROM else None,
        p99=float(np.percentile(values, 99)) if len(values) >= P99_FROM else None,
    )


def figure(samples: Sequence[float]) -> Figure:
    """The median of at least one sample, with its interval."""
    summary = summarize(samples)
    return Figure(summary.median, summary.low, summary.high)


def median_interval(samples: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """The percentile bootstrap's interval of the median, the same for the same samples."""
    medians = resampled_medians(samples, np.random.default_rng(_SEED))
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _interval_of_rounds(rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    if all(len(each) == 1 for each in rounds):
        return median_interval([each[0] for each in rounds])
    drawn = np.random.default_rng(_SEED).integers(0, len(rounds), (_RESAMPLES, len(rounds)))
    counts = (drawn[:, :, None] == np.arange(len(rounds))).sum(axis=1)
    batch = max(1, _BATCH // sum(map(len, rounds)))
    parts = [
        medians_of_rounds(rounds, counts[begin : begin + batch]) for begin in range(0, _RESAMPLES, batch)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def medians_of_rounds(rounds: Sequence[Sequence[float]], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(draws) medians of all samples where round n was drawn `counts[draw, n]` times."""
    values = np.concatenate([np.asarray(each, np.float64) for each in rounds])
    order = np.argsort(values, kind="stable")
    values, round_of = values[order], np.repeat(np.arange(len(rounds)), [len(each) for each in rounds])[order]
    reached = np.cumsum(counts[:, round_of], axis=1)  # samples up to each value
    half = reached[:, -1:] / 2
    lower, upper = (reached >= half).argmax(axis=1), (reached > half).argmax(axis=1)
    return np.asarray((values[lower] + values[upper]) / 2, np.float64)


def resampled_medians(
    samples: Sequence[float] | NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples) medians of `samples` drawn with replacement."""
    values = np.asarray(samples, np.float64)
    batch = max(1, _BATCH // len(values))
    parts = [
        np.median(
            values[random.integers(0, len(values), (min(batch, _RESAMPLES - begin), len(values)))], axis=1
        )
        for begin in range(0, _RESAMPLES, batch)
    ]
    return np.concatenate(parts)


def drift(values: Sequence[float]) -> float:
    """The last third's median over the first third's; 1 for fewer than three values."""
    third = len(values) // 3
    if not third:
        return 1.0
    return float(np.median(values[-third:]) / np.median(values[:third]))


def settled(values: Sequence[float], tolerance: float = 0.02, window: int = 3) -> bool:
    """Whether the last `window` values lie within `tolerance` of their median."""
    if len(values) < window:
        return False
    last = np.asarray(values[-window:], np.float64)
    return bool(np.ptp(last) <= tolerance * np.median(last))
