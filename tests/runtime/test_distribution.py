"""`choose` beside the plain steps, and each step beside its reference."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling_reference import ranked, reference_choice, reference_draw, reference_top_p, row
from pocketlm.distribution import (
    Floats,
    Others,
    Undecided,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    softmax_weights,
)
from pocketlm.sampling import Sampling

properties = settings(deadline=None, max_examples=60)

# Whole numbers as weights, and shares in 1024ths: everything is exact, down to ties.
whole_numbers = st.one_of(
    st.lists(st.integers(0, 50), min_size=1, max_size=70).filter(any),
    st.builds(
        lambda seed, size: np.random.default_rng(seed).geometric(0.002, size).tolist(),
        st.integers(0, 2**32),
        st.integers(1, 2000),
    ),
)
shares = st.integers(0, 1024).map(lambda share: share / 1024)


@given(whole_numbers, st.data())
@properties
def test_top_k_keeps_the_k_largest(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    assert keep_top_k(row(values), k).tolist() == sorted(ranked(values)[:k])


@given(st.integers(0, 2**32), st.integers(64, 5000), st.integers(1, 60))
@properties
def test_top_k_on_a_vocabulary(seed: int, size: int, k: int) -> None:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values[values < -1] = -np.inf
    assert keep_top_k(values, k).tolist() == sorted(ranked(values.tolist())[:k])


@given(whole_numbers, shares)
@properties
def test_top_p_keeps_the_fewest_that_hold_the_share(weights: list[int], p: float) -> None:
    kept = keep_top_p(row(weights), p)
    assert kept.tolist() == reference_top_p(weights, p)
    assert len(kept) >= 1


@given(whole_numbers, shares)
@properties
def test_min_p_keeps_what_is_likely_enough(weights: list[int], p: float) -> None:
    kept = [i for i, weight in enumerate(weights) if weight >= p * max(weights)]
    assert keep_min_p(row(weights), p).tolist() == kept


@given(whole_numbers, shares.filter(lambda share: share < 1))
@properties
def test_draw_inverts_the_cumulated_weights(weights: list[int], uniform: float) -> None:
    assert draw(row(weights), uniform) == reference_draw(weights, uniform)


@pytest.mark.parametrize("size", [1, 3, 64, 65, 1000, 4097])
def test_draw_never_goes_beyond_the_last_weight(size: int) -> None:
    weights = np.zeros(size + 7, dtype=np.float32)
    weights[:size] = 0.1
    assert draw(weights, math.nextafter(1, 0)) == size - 1
    assert draw(weights, 0.0) == 0
    assert draw(weights[::-1], 0.0) == 7


peaked_rows = st.builds(
    lambda seed, size, spread, grid: (
        np.round(np.random.default_rng(seed).standard_normal(size) * spread * grid).astype(np.float32)
        / np.float32(grid)
    ),
    st.integers(0, 2**32),
    st.integers(1, 3000),
    st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    st.sampled_from([1, 4, 1024]),  # ties are frequent, then rare
)


@given(
    logits=peaked_rows,
    masked=st.sampled_from([0.0, 0.5, 0.999]),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
    temperature=st.sampled_from([1e-6, 0.3, 0.7, 1.0, 1.7, 20.0]),
    top_k=st.sampled_from([0, 0, 1, 40, 700]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.9999, 1.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.05, 0.5, 1.0]),
)
@settings(properties, max_examples=300)
def test_choose_is_bit_for_bit_what_the_plain_steps_choose(
    logits: Floats, masked: float, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits[1:][np.random.default_rng(0).random(logits.size - 1) < masked] = -np.inf
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    chosen = choose(
        logits,
        uniform,
        peak=float(logits.max()),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    assert chosen == reference_choice(logits, uniform, sampling)


@given(peaked_rows, st.sampled_from([0.0, 0.3, 0.9, 0.999]), st.floats(0, 1, exclude_max=True), st.data())
@settings(properties, max_examples=200)
def test_what_is_left_out_never_changes_what_is_decided(
    logits: Floats, p: float, uniform: float, data: st.DataObject
) -> None:
    weights = softmax_weights(logits)
    threshold = data.draw(st.sampled_from(sorted(set(weights.tolist()))))
    near, left_out = np.flatnonzero(weights >= threshold), weights[weights < threshold]
    others = Others(float(left_out.max(initial=0)), float(left_out.sum(dtype=np.float64)) * 1.5)
    for step, of_all in (
        (lambda: near[keep_top_p(weights[near], p, others)].tolist(), keep_top_p(weights, p).tolist()),
        (lambda: near[keep_min_p(weights[near], p, others)].tolist(), keep_min_p(weights, p).tolist()),
        (lambda: int(near[draw(weights[near], uniform, others)]), draw(weights, uniform)),
    ):
        with contextlib.suppress(Undecided):
            assert step() == of_all


@pytest.mark.parametrize("top_p", [1.0, 0.99995])
def test_choose_finds_tokens_that_it_left_out_at_first(top_p: float) -> None:
    logits = np.full(3000, -15.0, dtype=np.float32)
    logits[-1] = 0.0
    sampling = Sampling(temperature=1.0, top_p=top_p)
    chosen = choose(logits, 1e-4, peak=0.0, temperature=1.0, top_p=top_p)
    assert chosen == reference_choice(logits, 1e-4, sampling) < 2999


def test_steps_are_undecided_only_where_others_matter() -> None:
    weights, others = row([1.0, 0.5]), Others(each=0.1, total=0.25)
    assert keep_top_p(weights, 0.5, others).tolist() == [0]
    with pytest.raises(Undecided):
        keep_top_p(weights, 0.6, others)  # 1.0 reaches 60 % of 1.5 and not of 1.75
    with pytest.raises(Undecided):
        keep_top_p(weights, 0.9, others)
    with pytest.raises(Undecided):
        keep_top_p(weights, 0.3, Others(each=1.0, total=1.0))  # which of the equals is the first
    assert keep_min_p(weights, 0.2, others).tolist() == [0, 1]
    with pytest.raises(Undecided):
        keep_min_p(weights, 0.1, others)
    assert draw(weights, 0.3, others) == 0
    for uniform in (0.0, 0.65, 0.9):
        with pytest.raises(Undecided):
            draw(weights, uniform, others)


@pytest.mark.parametrize("size", [1, 100, 64 * 9 + 5])
def test_weights_do_not_depend_on_their_neighbours(size: int) -> None:
    """An exponential is the same in a whole row and among the few that are kept."""
    logits = (np.random.default_rng(size).standard_normal(size) * 9).astype(np.float32)
    some = np.flatnonzero(logits >= np.median(logits))
    for temperature in (0.7, 1.0):
        whole = softmax_weights(logits, temperature)[some]
        np.testing.assert_array_equal(softmax_weights(logits[some], temperature), whole)


def test_a_huge_temperature_is_uniform() -> None:
    weights = softmax_weights(row([-50.0, 0.0, 50.0]), 1e9)
    np.testing.assert_allclose(weights, 1.0, atol=1e-6)
