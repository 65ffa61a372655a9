"""From logits to one index: steps 5 to 9 of `pocketlm.sampling`.

Each step is a pure function; steps 6 to 8 return ascending indices of what they keep. "Weights" are
probabilities before they are divided by their sum: the largest is 1. Of equals the first ranks first.

`choose` does them all, mostly without looking at every token, as the exponentials of a whole vocabulary take
longer than all the rest. It begins with the likely tokens, and knows of the others only how much they weigh
at most. Where that leaves a step undecided it begins again with every token, so that its choice is always
the one of the plain steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)
_BLOCK = 64
_FEW = 1024  # weights that are cumulated as quickly in one level as in two
_LEFT_OUT = 1e-3  # what the tokens that `choose` leaves out at first weigh together at most
_EXP_SLACK = 1e-6  # rounding moves an exponential in single precision by less, relative to it
_SUM_SLACK = 1e-9  # rounding moves a sum in double precision by less, relative to it


class Others(NamedTuple):
    """What is known of the tokens that were left out."""

    each: float  # none weighs more
    total: float  # nor do they together


NONE = Others(0.0, 0.0)


class Undecided(Exception):  # noqa: N818 - not a failure
    """The tokens that were left out could change what a step keeps."""


def choose(
    logits: Floats,
    uniform: float,
    *,
    peak: float,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Steps 5 to 9 for `logits` (tokens), of which `peak` is the largest and finite.

    `temperature` is above 0, `uniform` of [0, 1).
    """
    with np.errstate(over="ignore"):  # Differences beyond float32 are −inf, hence weights of 0.
        if 0 < top_k < logits.size:
            # Before the temperature, which changes no order: only k logits need an exponential.
            near, others = keep_top_k(logits, top_k), NONE
        else:
            near, others = _likely(logits, peak, temperature, min_p if top_p == 1 else 0.0)
        try:
            weights = softmax_weights(logits[near], temperature)
            return int(near[_pick(weights, uniform, top_p, min_p, others)])
        except Undecided:
            return _pick(softmax_weights(logits, temperature), uniform, top_p, min_p)


def _likely(logits: Floats, peak: float, temperature: float, min_p: float) -> tuple[Indices, Others]:
    """Ascending indices of the tokens that matter, and what the others weigh at most."""
    nats = math.log(logits.size / _LEFT_OUT)
    if min_p > 0:
        nats = min(nats, 1e-3 - math.log(min_p))  # A bit more than min_p keeps, for the rounding.
    threshold = np.float32(peak - temperature * nats)
    near = np.flatnonzero(logits >= threshold)
    # Rounding keeps the order of differences and quotients, and that of exponentials but for a hair.
    weights = softmax_weights(np.array([peak, threshold], dtype=np.float32), temperature)
    each = float(weights[1]) * (1 + _EXP_SLACK)
    return near, Others(each, each * (logits.size - near.size))


def _pick(weights: Floats, uniform: float, top_p: float, min_p: float, others: Others = NONE) -> int:
    """Steps 7 to 9. Raises Undecided."""
    kept: Indices | None = None
    if top_p < 1:
        kept, others = keep_top_p(weights, top_p, others), NONE
        weights = weights[kept]
    if min_p > 0:
        chosen, others = keep_min_p(weights, min_p, others), NONE
        kept, weights = (chosen if kept is None else kept[chosen]), weights[chosen]
    index = draw(weights, uniform, others)
    return index if kept is None else int(kept[index])


def softmax_weights(logits: Floats, temperature: float = 1.0, out: Floats | None = None) -> Floats:
    """Step 5 and the exponential: exp((logits − max) / temperature), so the largest weight is 1."""
    weights: Floats = np.subtract(logits, logits.max(), out=out)
    if temperature != 1:
        np.divide(weights, np.float32(min(max(temperature, TINY), _HUGE)), out=weights)
    np.exp(weights, out=weights)
    return weights


def keep_top_k(logits: Floats, k: int) -> Indices:
    """Step 6: the `k` largest, 0 < k ≤ number of logits."""
    near = _at_least_kth_group(logits, k)
    values = logits[near]
    return near[_largest(values, _kth_largest(values, k), k)]


def _at_least_kth_group(logits: Floats, k: int) -> Indices:
    """The `k` largest and few others; only one pass goes over all logits."""
    # The k-th largest of the maxima of disjoint groups bounds the k-th largest logit from below, and only
    # groups whose maximum reaches it have logits that do.
    groups = logits[: logits.size // _BLOCK * _BLOCK].reshape(_BLOCK, -1)
    maxima = groups.max(axis=0)
    if k > maxima.size:
        return np.arange(logits.size)
    bound = _kth_largest(maxima, k)
    hot = np.flatnonzero(maxima >= bound)
    if hot.size > maxima.size // 8:  # Gathering costs more than another pass.
        return np.flatnonzero(logits >= bound)
    member, group = np.divmod(np.flatnonzero(groups.take(hot, axis=1) >= bound), hot.size)
    rest = np.flatnonzero(logits[groups.size :] >= bound)
    return np.concatenate([member * maxima.size + hot[group], groups.size + rest])


def keep_top_p(weights: Floats, p: float, others: Others = NONE) -> Indices:
    """Step 7: the fewest of the largest weights whose sum reaches `p` of the whole, but at least one.

    Raises Undecided if that depends on `others`.
    """
    total = float(weights.sum(dtype=np.float64))
    slack = _SUM_SLACK if others.total else 0.0
    least, most = p * total * (1 - slack), p * (total + others.total) * (1 + slack)
    # Saves sorting the long tail. Mostly the few weights above the first threshold are enough. Those above
    # the second always are, as all others together hold less than 1 − p, except that rounding may make them
    # miss by a hair.
    for threshold in ((1 - p) * total / 32, (1 - p) * total / weights.size, 0.0):
        near = np.flatnonzero(weights >= threshold)
        values = weights[near]
        if near.size and values.sum(dtype=np.float64) >= most:
            break
    descending = np.sort(values)[::-1]
    reached = descending.cumsum(dtype=np.float64).searchsorted([least, most])
    count = min(int(reached[0]) + 1, values.size)
    smallest = descending[count - 1]
    if others.total and (reached[0] != reached[1] or reached[1] == values.size or smallest <= others.each):
        raise Undecided
    return near[_largest(values, smallest, count)]


def keep_min_p(weights: Floats, p: float, others: Others = NONE) -> Indices:
    """Step 8: weights of at least `p` times the largest. Raises Undecided if `others` has such."""
    least = np.float32(p) * weights.max()
    if others.total and others.each >= least:
        raise Undecided
    return np.flatnonzero(weights >= least)


def draw(weights: Floats, uniform: float, others: Others = NONE) -> int:
    """Step 9: the index where the cumulated weights pass `uniform` (of [0, 1)) of their sum.

    Raises Undecided if that depends on `others`, which lie anywhere among them.
    """
    # In two levels, as cumulating a whole vocabulary would take longer than all the rest.
    size = weights.size if weights.size <= _FEW else math.isqrt(weights.size)
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, size), dtype=np.float64)
    total = float(blocks.sum())
    target, highest = uniform * total, 0.0
    if others.total:
        # They add to the target what they weigh times `uniform`, and to the cumulated weights what those
        # weigh that come before.
        slack = _SUM_SLACK * (total + others.total)
        highest = target + uniform * others.total + slack
        target -= (1 - uniform) * others.total + slack
        if target < 0:
            raise Undecided
    block, before = _passed(blocks, target) if blocks.size > 1 else (0, 0.0)
    inside = weights[block * size : (block + 1) * size]
    index, before_inside = _passed(inside, target - before)
    if others.total and before + before_inside + float(inside[index]) <= highest:
        raise Undecided
    return block * size + index


def _passed(weights: NDArray[np.floating], target: float) -> tuple[int, float]:
    """The first index where the cumulated weights pass `target`, and the sum of those before it."""
    sums = weights.cumsum(dtype=np.float64)
    # Never beyond the last weight above 0, where rounding may put a target just under the sum.
    last = int(sums.searchsorted(sums[-1], side="left"))
    index = min(int(sums.searchsorted(target, side="right")), last)
    return index, float(sums[index - 1]) if index else 0.0


def _kth_largest(values: Floats, k: int) -> np.float32:
    return np.float32(np.partition(values, values.size - k)[values.size - k])


def _largest(values: Floats, smallest: np.float32, count: int) -> Indices:
    """Ascending indices of the `count` largest, the last of which is `smallest`; of equals, the first."""
    indices = np.flatnonzero(values >= smallest)
    surplus = indices.size - count
    if surplus == 0:
        return indices
    ties = np.flatnonzero(values[indices] == smallest)
    return np.delete(indices, ties[-surplus:])
