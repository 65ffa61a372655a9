"""Medians, intervals and percentiles, against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm_benchmarks.statistics import (
    drift,
    figure,
    median_interval,
    medians_of_rounds,
    settled,
    summarize,
    summarize_rounds,
)

SAMPLES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


@given(SAMPLES)
def test_the_interval_holds_the_median_and_lies_in_the_sample(samples: list[float]) -> None:
    summary = summarize(samples)
    assert summary.n == len(samples)
    assert summary.median == pytest.approx(float(np.median(samples)))
    if len(samples) == 1:
        assert summary.low is summary.high is None
    else:
        assert summary.low is not None
        assert summary.high is not None
        assert min(samples) <= summary.low <= summary.median <= summary.high <= max(samples)
    assert (summary.minimum, summary.maximum) == (min(samples), max(samples))


@given(SAMPLES, st.floats(0.01, 100))
def test_figures_scale_with_their_unit(samples: list[float], unit: float) -> None:
    scaled = summarize([unit * sample for sample in samples])
    assert scaled.median == pytest.approx(unit * summarize(samples).median)


@pytest.mark.parametrize(
    ("n", "p95", "p99"), [(1, False, False), (19, False, False), (20, True, False), (100, True, True)]
)
def test_a_percentile_needs_its_sample(n: int, p95: bool, p99: bool) -> None:
    summary = summarize([float(value) for value in range(n)])
    assert (summary.p95 is not None, summary.p99 is not None) == (p95, p99)


def test_percentiles_are_in_order() -> None:
    summary = summarize([float(value) for value in range(1, 201)])
    assert summary.p95 == pytest.approx(190.05)
    assert summary.p99 == pytest.approx(198.01)


def test_no_sample_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no sample"):
        summarize([])


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    true = math.exp(0)
    covered = sum(
        low <= true <= high
        for low, high in (median_interval(random.lognormal(0, 0.5, 25)) for _ in range(200))
    )
    assert 0.88 <= covered / 200 <= 1


def test_the_same_samples_give_the_same_interval() -> None:
    samples = [3.0, 1.0, 2.0, 5.0]
    assert figure(samples) == figure(samples)


def test_more_resamples_than_fit_at_once_are_drawn_in_batches() -> None:
    low, high = median_interval(np.arange(3000.0))
    assert 1300 < low < 1500 < high < 1700


@pytest.mark.parametrize(
    ("values", "expected"), [([], 1), ([1, 9], 1), ([10, 10, 10, 8, 8, 8], 0.8), ([1, 5, 2], 2)]
)
def test_drift(values: list[float], expected: float) -> None:
    assert drift(values) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 1.0], False), ([5.0, 1.0, 1.01, 1.0], True), ([1.0, 1.0, 1.05], False)],
)
def test_settled(values: list[float], expected: bool) -> None:
    assert settled(values) is expected


class TestRounds:
    def test_an_interval_covers_what_it_says_where_rounds_differ(self) -> None:
        random = np.random.default_rng(1)
        by_round = pooled = 0
        for _ in range(60):
            rounds = [
                (10 + 0.3 * random.standard_normal() + 0.1 * random.standard_normal(20)) for _ in range(10)
            ]
            samples = np.concatenate(rounds).tolist()
            summary, plain = summarize_rounds([each.tolist() for each in rounds]), summarize(samples)
            assert summary.median == plain.median
            by_round += (summary.low or 0) <= 10 <= (summary.high or 0)
            pooled += (plain.low or 0) <= 10 <= (plain.high or 0)
        assert by_round >= 50
        assert pooled < 40

    def test_one_sample_a_round_is_the_plain_bootstrap(self) -> None:
        samples = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
        assert summarize_rounds([[value] for value in samples]) == summarize(samples)

    def test_a_single_round_tells_its_own_spread_only(self) -> None:
        assert summarize_rounds([[1.0, 2.0, 4.0], []]) == summarize([1.0, 2.0, 4.0])

    def test_a_resampled_median_is_that_of_the_pooled_samples(self) -> None:
        rounds = [[1.0, 5.0], [2.0], [7.0, 8.0, 9.0]]
        counts = np.array([each for each in itertools.product(range(4), repeat=3) if sum(each) == 3])
        pooled = [
            np.median(np.concatenate([np.repeat(r, n) for r, n in zip(rounds, each, strict=True)]))
            for each in counts
        ]
        assert medians_of_rounds(rounds, counts).tolist() == pooled
