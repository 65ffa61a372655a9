"""What sampling does, one token at a time: the slow reference of `pocketlm.sampling`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pocketlm.sampling import Sampling


def row(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def ranked(values: Sequence[float]) -> list[int]:
    """Ids by falling value; of equals, the lowest first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def reference_top_p(weights: Sequence[float], p: float) -> list[int]:
    order, held = ranked(weights), 0.0
    for count, index in enumerate(order, start=1):
        held += weights[index]
        if held >= p * sum(weights):
            return sorted(order[:count])
    raise AssertionError("all of them hold any share")


def reference_draw(weights: Sequence[float], uniform: float) -> int:
    passed = 0.0
    for index, weight in enumerate(weights):
        passed += weight
        if passed > uniform * sum(weights):
            return index
    raise AssertionError("uniform is below 1")


def reference_distribution(
    logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> dict[int, float]:
    """The steps as the module's docstring gives them, one token at a time, in double precision."""
    values = list(map(float, logits))
    for token, bias in sampling.logit_bias.items():
        values[token] += bias
    for token in {*prompt, *answer}:
        if values[token] > 0:
            values[token] /= sampling.repetition_penalty
        else:
            values[token] *= sampling.repetition_penalty
    for token, count in Counter(answer).items():
        values[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature == 0:
        return {ranked(values)[0]: 1.0}
    kept = sorted(ranked(values)[: sampling.top_k or len(values)])
    highest = max(values)
    weights = [math.exp((values[token] - highest) / sampling.temperature) for token in kept]
    if sampling.top_p < 1:
        chosen = reference_top_p(weights, sampling.top_p)
        kept, weights = [kept[i] for i in chosen], [weights[i] for i in chosen]
    if sampling.min_p > 0:
        chosen = [i for i, weight in enumerate(weights) if weight >= sampling.min_p * max(weights)]
        kept, weights = [kept[i] for i in chosen], [weights[i] for i in chosen]
    return dict(zip(kept, weights, strict=True))


def reference_choice(logits: NDArray[np.float32], uniform: float, sampling: Sampling) -> int:
    """Steps 5 to 9 with the weights in single precision, all of them, and sums as exact as doubles."""
    kept = sorted(ranked(logits.tolist())[: sampling.top_k or logits.size])
    scaled = (logits[kept] - logits.max()) / np.float32(sampling.temperature)
    weights = np.exp(scaled).tolist()
    if sampling.top_p < 1:
        held, needed, count = Fraction(0), sampling.top_p * math.fsum(weights), 0
        order = ranked(weights)
        while not count or held < needed:
            held, count = held + Fraction(weights[order[count]]), count + 1
        chosen = sorted(order[:count])
        kept, weights = [kept[i] for i in chosen], [weights[i] for i in chosen]
    if sampling.min_p > 0:
        least = np.float32(sampling.min_p) * np.float32(max(weights))
        chosen = [i for i, weight in enumerate(weights) if weight >= least]
        kept, weights = [kept[i] for i in chosen], [weights[i] for i in chosen]
    passed, target = Fraction(0), uniform * math.fsum(weights)
    for token, weight in zip(kept, weights, strict=True):
        passed += Fraction(weight)
        if passed > target:
            return token
    raise AssertionError("uniform is below 1")
