"""The rank test against counting by hand and its two forms against each other; ratios and corrections."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm_benchmarks import significance
from pocketlm_benchmarks.significance import holm, rank_sum_p, ratio_of_medians

FEW = st.lists(st.integers(0, 6), min_size=1, max_size=5)  # so that there are ties


def counted_p(first: list[int], second: list[int]) -> float:
    """The share of all ways to deal the values out whose rank sum is as far from the middle."""
    values = first + second
    ranks = [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]
    middle = len(first) * (len(values) + 1) / 2
    distances = [abs(sum(chosen) - middle) for chosen in itertools.combinations(ranks, len(first))]
    seen = abs(sum(ranks[: len(first)]) - middle)
    return sum(distance >= seen - 1e-9 for distance in distances) / len(distances)


@given(FEW, FEW)
def test_the_exact_test_counts_every_way(first: list[int], second: list[int]) -> None:
    assert rank_sum_p(first, second) == pytest.approx(counted_p(first, second))


def test_a_known_value() -> None:
    # Two of the C(10, 5) = 252 ways are as extreme as a complete separation.
    assert rank_sum_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.8, 1.5])
@pytest.mark.parametrize("digits", [8, 0])  # 0: many ties
def test_the_approximation_is_near_the_exact_test(
    shift: float, digits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(3)
    first = random.standard_normal(25).round(digits).tolist()
    second = (random.standard_normal(25) + shift).round(digits).tolist()
    exact = rank_sum_p(first, second)
    monkeypatch.setattr(significance, "EXACT_UP_TO", 0)
    assert rank_sum_p(first, second) == pytest.approx(exact, rel=0.1, abs=0.005)


def test_equal_values_are_no_evidence() -> None:
    assert rank_sum_p([2.0] * 4, [2.0] * 5) == 1.0
    assert rank_sum_p([2.0] * 40, [2.0] * 50) == 1.0


def test_false_alarms_are_as_rare_as_promised() -> None:
    random = np.random.default_rng(0)
    alarms = [rank_sum_p(*random.lognormal(0, 1, (2, 10)).tolist()) < 0.05 for _ in range(400)]
    assert 0.01 < np.mean(alarms) < 0.09


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    # 4 × 0.01, 3 × 0.015, then 2 × 0.03 and at least as much for the last.
    assert holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_ratio_and_its_interval() -> None:
    random = np.random.default_rng(5)
    slow, fast = (2 * random.lognormal(0, 0.05, 40)).tolist(), random.lognormal(0, 0.05, 40).tolist()
    ratio = ratio_of_medians(slow, fast)
    assert ratio.value == pytest.approx(np.median(slow) / np.median(fast))
    assert ratio.low is not None
    assert ratio.high is not None
    assert 1.9 < ratio.low < ratio.value < ratio.high < 2.1
    assert ratio == ratio_of_medians(slow, fast)
    few = ratio_of_medians(slow[:5], fast[:5])
    assert few.low is not None
    assert few.high is not None
    assert few.high - few.low > ratio.high - ratio.low
