"""Rounded weights are near the weights."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import Array
from pocketlm_exporters.quantize.rounding import BLOCK, LEVELS, BlockWeight, round_blocks, round_channels


def weights(bound: float) -> st.SearchStrategy[Array]:
    """(outputs, inputs), each within ±`bound`."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-bound, bound, width=32))


# Subnormal rows too: weight decay leaves them in embeddings that nothing trains.
WEIGHTS = weights(2.0**100) | weights(1.0) | weights(2.0**-125) | weights(2.0**-140)


def blocks_of(weight: Array) -> Array:
    """`weight` (outputs, inputs) as (outputs, blocks, BLOCK)."""
    missing = -weight.shape[1] % BLOCK
    return np.pad(weight, ((0, 0), (0, missing))).reshape(len(weight), -1, BLOCK)


def assert_within_half_a_step(weight: Array, values: Array, scales: Array) -> None:
    """`scales` fit `weight` by broadcasting."""
    error = np.abs(weight.astype(np.float64) - values.astype(np.float64) * scales)
    # The quotient of two float32 is itself off by a share of 2⁻²⁴, at most 127 times.
    assert (error <= scales.astype(np.float64) * (0.5 + LEVELS * 2.0**-22)).all()


@given(WEIGHTS)
def test_channels_are_off_by_half_a_step_at_most(weight: Array) -> None:
    rounded = round_channels(weight)
    assert rounded.values.dtype == np.int8
    assert rounded.values.shape == weight.T.shape
    assert rounded.values.flags.c_contiguous
    assert rounded.scales.shape == (len(weight),)
    assert (rounded.values >= -LEVELS).all()  # never −128: the integer product counts on it
    assert_within_half_a_step(weight, rounded.values.T, rounded.scales[:, None])


@given(WEIGHTS)
def test_blocks_are_off_by_half_a_step_at_most(weight: Array) -> None:
    rounded = round_blocks(weight)
    blocks = blocks_of(weight)
    assert rounded.values.dtype == np.uint8
    assert rounded.values.shape == blocks.shape
    assert rounded.scales.shape == blocks.shape[:2]
    assert_within_half_a_step(blocks, rounded.values.astype(np.int16) - 128, rounded.scales[..., None])


@given(WEIGHTS)
def test_the_worst_error_is_reported_as_a_share_of_the_largest_weight(weight: Array) -> None:
    channels, blocks = round_channels(weight), round_blocks(weight)
    largest = float(np.abs(weight).max())
    for rounded, exact, restored in (
        (channels, weight, channels.values.T * channels.scales[:, None]),
        (blocks, blocks_of(weight), (blocks.values.astype(np.float32) - 128) * blocks.scales[..., None]),
    ):
        worst = float(np.abs(exact - restored).max())
        assert rounded.worst_error == pytest.approx(worst / largest if largest else 0.0, abs=1e-7)
        assert rounded.worst_error <= 1.0


def test_extreme_weights_are_kept_exactly() -> None:
    weight = np.array([[-127, 127, 0, 64], [-1, 2, 2, -2]], np.float32)
    rounded = round_channels(weight)
    assert (rounded.values.T == [[-127, 127, 0, 64], [-64, 127, 127, -127]]).all()
    assert (rounded.scales == np.array([1, 2 / 127], np.float32)).all()


@pytest.mark.parametrize("nothing", [0.0, 1e-45, 2e-43, 1e-38])
def test_rows_of_zeros_and_next_to_zero_become_zeros(nothing: float) -> None:
    weight = np.full((3, 40), nothing, np.float32)
    weight[1] = 1
    channels = round_channels(weight)
    assert not channels.values[:, [0, 2]].any()
    assert np.isfinite(channels.scales).all()
    blocks = round_blocks(weight)
    assert (blocks.values[[0, 2]] == 128).all()
    assert round_blocks(np.zeros((2, 8), np.float32)).worst_error == 0


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 64])
def test_the_last_block_is_filled_up_with_zeros(inputs: int) -> None:
    rounded: BlockWeight = round_blocks(np.full((2, inputs), -0.5, np.float32))
    count = -(-inputs // BLOCK)
    assert rounded.values.shape == (2, count, BLOCK)
    flat = rounded.values.reshape(2, -1)
    assert (flat[:, :inputs] == 128 - LEVELS).all()
    assert (flat[:, inputs:] == 128).all()


def test_a_large_weight_in_one_block_costs_the_others_nothing() -> None:
    weight = np.full((1, 2 * BLOCK), 0.001, np.float32)
    weight[0, 0] = 1000
    assert not round_channels(weight).values.T[0, 1:].any()
    assert (round_blocks(weight).values[0, 1] == 128 + LEVELS).all()
