"""Four-bit grids and how they are packed, against slow references."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.tiny import Array
from pocketlm_exporters.quantize.nibbles import Grid, NibbleWeight, fit_grid, pack
from pocketlm_exporters.quantize.rounding import BLOCK


def weights(bound: float) -> st.SearchStrategy[Array]:
    """(outputs, inputs), each within ±`bound`."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-bound, bound, width=32))


# Subnormal blocks too: weight decay leaves them where nothing trains.
WEIGHTS = weights(2.0**60) | weights(1.0) | weights(2.0**-125) | weights(2.0**-140)


def normal(outputs: int, inputs: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def ones(inputs: int) -> Array:
    return np.ones(inputs, np.float32)


def slow_unpack(packed: NibbleWeight, inputs: int) -> Array:
    """What MatMulNBits is documented to multiply with: (outputs, inputs), nibble by nibble."""
    outputs, blocks, _ = packed.values.shape
    weight = np.zeros((outputs, inputs), np.float32)
    for output in range(outputs):
        for n in range(inputs):
            block, place = divmod(n, BLOCK)
            code = int(packed.values[output, block, place // 2]) >> (4 * (place % 2)) & 15
            zero_point = int(packed.zero_points[output, block // 2]) >> (4 * (block % 2)) & 15
            weight[output, n] = np.float32(code - zero_point) * packed.scales[output, block]
    assert packed.zero_points.shape == (outputs, -(-blocks // 2))
    return weight


@given(WEIGHTS)
@example(np.array([[-0.703125, -0.5]], np.float32))  # whose zero point is rounded up beyond the last code
@settings(deadline=None)
def test_codes_are_the_nearest_on_a_grid_that_has_zero(weight: Array) -> None:
    grid = fit_grid(weight, ones(weight.shape[1]))
    assert np.isfinite(grid.scales).all()
    assert (grid.scales > 0).all()
    assert (grid.zero_points <= 15).all()
    codes = grid.nearest(weight)
    assert codes.dtype == np.uint8
    assert codes.shape == weight.shape
    values = grid.values(codes).astype(np.float64)
    for code in range(16):
        other = grid.values(np.full_like(codes, code)).astype(np.float64)
        # The quotient of two float32 is itself off by a share of 2⁻²⁴, at most 15 times.
        assert (np.abs(weight - values) <= np.abs(weight - other) * (1 + 1e-5) + np.abs(other) * 1e-5).all()


@given(WEIGHTS)
@settings(deadline=None)
def test_the_fitted_grid_is_no_worse_than_one_from_smallest_to_largest(weight: Array) -> None:
    grid = fit_grid(weight, ones(weight.shape[1]))
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % BLOCK))).reshape(len(weight), -1, BLOCK)
    low, high = np.minimum(padded.min(axis=-1), 0), np.maximum(padded.max(axis=-1), 0)
    scales = np.where(high - low > 1e-36, (high - low) / 15, 1).astype(np.float32)
    plain = Grid(scales, np.rint(np.clip(-low / scales, 0, 15)).astype(np.uint8))
    losses = [
        float(np.square((weight - each.values(each.nearest(weight))).astype(np.float64)).sum())
        for each in (grid, plain)
    ]
    # The exactness of float32, and squares that it has no number for.
    tolerance = 1e-12 * float(np.square(weight.astype(np.float64)).sum()) + 1e-36
    assert losses[0] <= losses[1] * (1 + 1e-4) + tolerance


def test_important_inputs_get_the_finer_grid() -> None:
    weight = normal(50, BLOCK)
    weight[:, 0] *= 3  # clipping it would help all others
    importance = ones(BLOCK)
    importance[0] = 1e4
    errors = [
        weight - (grid := fit_grid(weight, each)).values(grid.nearest(weight))
        for each in (importance, ones(BLOCK))
    ]
    assert np.square(errors[0][:, 0]).sum() < 0.2 * np.square(errors[1][:, 0]).sum()
    assert np.square(errors[0][:, 1:]).sum() > np.square(errors[1][:, 1:]).sum()


def test_sixteen_even_values_with_a_zero_are_kept_exactly() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (40, 3 * BLOCK))
    codes[:, ::BLOCK], codes[:, 1::BLOCK] = 0, 15
    zero_points = np.random.default_rng(1).integers(0, 16, (40, 3)).repeat(BLOCK, axis=1)
    weight = ((codes - zero_points) * 2.0**-6).astype(np.float32)
    grid = fit_grid(weight, ones(3 * BLOCK))
    np.testing.assert_allclose(grid.values(grid.nearest(weight)), weight, rtol=1e-6)


@pytest.mark.parametrize("nothing", [0.0, 1e-45, 2e-43, 1e-38])
def test_blocks_of_zeros_and_next_to_zero_become_zeros(nothing: float) -> None:
    weight = np.full((2, 2 * BLOCK), nothing, np.float32)
    weight[1, BLOCK:] = 1
    grid = fit_grid(weight, ones(2 * BLOCK))
    values = grid.values(grid.nearest(weight))
    assert not values[0].any()
    assert not values[1, :BLOCK].any()
    np.testing.assert_allclose(values[1, BLOCK:], 1)


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 64, 95, 161])
def test_packed_weights_are_those_on_the_grid(inputs: int) -> None:
    weight = normal(3, inputs)
    grid = fit_grid(weight, ones(inputs))
    codes = grid.nearest(weight)
    packed = pack(weight, codes, grid)
    assert packed.values.dtype == packed.zero_points.dtype == np.uint8
    assert packed.values.shape == (3, -(-inputs // BLOCK), BLOCK // 2)
    np.testing.assert_array_equal(slow_unpack(packed, inputs), grid.values(codes))
    worst = float(np.abs(weight - grid.values(codes)).max() / np.abs(weight).max())
    assert packed.worst_error == pytest.approx(worst)
    # What fills the last block up is zero on its grid.
    whole = slow_unpack(packed, packed.values.shape[1] * BLOCK)
    assert not whole[:, inputs:].any()


def test_nothing_has_no_error() -> None:
    weight = np.zeros((2, 8), np.float32)
    grid = fit_grid(weight, ones(8))
    assert pack(weight, grid.nearest(weight), grid).worst_error == 0
