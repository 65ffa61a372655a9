"""GPTQ against a slow reference, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from helpers.tiny import Array
from pocketlm_exporters.quantize.gptq import DAMPING, SHRINKAGE, gptq, loss, shrunk
from pocketlm_exporters.quantize.nibbles import Grid, fit_grid
from pocketlm_exporters.quantize.rounding import BLOCK


def correlated_rows(tokens: int, inputs: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((tokens, inputs)) @ random.standard_normal((inputs, inputs))
    sizes = 10.0 ** random.uniform(-1, 1, inputs)
    return (mixed * sizes).astype(np.float32)


def problem(outputs: int, inputs: int, tokens: int, seed: int = 0) -> tuple[Array, Array, Grid]:
    weight = np.random.default_rng(seed + 1).standard_normal((outputs, inputs)).astype(np.float32)
    rows = correlated_rows(tokens, inputs, seed)
    gram = rows.T @ rows
    return weight, gram, fit_grid(weight, np.diagonal(gram))


def slow_gptq(weight: Array, gram: Array, grid: Grid) -> NDArray[np.uint8]:
    """Optimal brain quantization's own formulas (arXiv 2208.11580) in float64, the inverse shrunk each step.

    The weights that are left move by −error / [H⁻¹]ₙₙ · [H⁻¹]ₙ, and then n is eliminated from H⁻¹.
    """
    left = weight.astype(np.float64)
    inverse = np.linalg.inv(shrunk(gram).astype(np.float64))
    codes = np.zeros(weight.shape, np.uint8)
    for n in np.argsort(-np.diagonal(gram), kind="stable"):
        scale, zero_point = grid.scales[:, n // BLOCK], grid.zero_points[:, n // BLOCK]
        codes[:, n] = np.clip(np.rint(left[:, n] / scale + zero_point), 0, 15)
        error = left[:, n] - (codes[:, n] - zero_point.astype(np.float64)) * scale
        left -= np.outer(error / inverse[n, n], inverse[n])
        inverse -= np.outer(inverse[:, n], inverse[n]) / inverse[n, n]
    return codes


def losses(weight: Array, gram: Array, grid: Grid, codes: NDArray[np.uint8]) -> Array:
    return loss(weight - grid.values(codes), gram)


@pytest.mark.parametrize(("outputs", "inputs", "tokens"), [(5, 8, 100), (16, 96, 500), (33, 100, 60)])
def test_codes_are_those_of_the_slow_reference(outputs: int, inputs: int, tokens: int) -> None:
    weight, gram, grid = problem(outputs, inputs, tokens)
    codes, expected = gptq(weight, gram, grid), slow_gptq(weight, gram, grid)
    nearest = grid.nearest(weight)
    kept = losses(weight, gram, grid, expected) <= losses(weight, gram, grid, nearest)
    expected = np.where(kept[:, None], expected, nearest)
    # A weight half-way between two codes may go either way, and those behind it follow.
    assert (codes == expected).mean() > 0.99
    np.testing.assert_allclose(
        losses(weight, gram, grid, codes).sum(), losses(weight, gram, grid, expected).sum(), rtol=0.02
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 100), st.integers(0, 1000))
def test_no_output_is_worse_than_rounded_to_nearest(
    outputs: int, inputs: int, tokens: int, seed: int
) -> None:
    weight, gram, grid = problem(outputs, inputs, tokens, seed)
    found = losses(weight, gram, grid, gptq(weight, gram, grid))
    nearest = losses(weight, gram, grid, grid.nearest(weight))
    assert (found <= nearest * (1 + 1e-5) + 1e-5).all()


def test_correlated_inputs_lose_far_less_than_rounded_to_nearest() -> None:
    weight, gram, grid = problem(32, 96, 200)
    found = losses(weight, gram, grid, gptq(weight, gram, grid)).sum()
    assert found < 0.6 * losses(weight, gram, grid, grid.nearest(weight)).sum()


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weight, _, grid = problem(8, 64, 10)
    gram = np.diag(np.arange(1, 65, dtype=np.float32))
    assert (gptq(weight, gram, grid) == grid.nearest(weight)).all()


@pytest.mark.parametrize("dead", [[3], [0, 1, 2], list(range(40))])
def test_inputs_that_never_fire(dead: list[int]) -> None:
    weight, gram, grid = problem(8, 40, 100)
    gram[dead], gram[:, dead] = 0, 0
    codes = gptq(weight, gram, grid)
    assert (codes[:, dead] == grid.nearest(weight)[:, dead]).all()
    assert np.isfinite(losses(weight, gram, grid, codes)).all()


def test_the_loss_is_that_of_the_outputs() -> None:
    rows = correlated_rows(50, 20)
    error = np.random.default_rng(3).standard_normal((7, 20)).astype(np.float32)
    expected = np.square(rows.astype(np.float64) @ error.T).sum(axis=0)
    np.testing.assert_allclose(loss(error, rows.T @ rows), expected, rtol=1e-4)


def test_shrinking_strengthens_the_diagonal_and_nothing_else() -> None:
    _, gram, _ = problem(1, 12, 40)
    result = shrunk(gram)
    diagonal = np.diagonal(gram).astype(np.float64)
    expected = diagonal * (1 + SHRINKAGE) + DAMPING * diagonal.mean()
    np.testing.assert_allclose(np.diagonal(result), expected, rtol=1e-6)
    off = ~np.eye(12, dtype=bool)
    np.testing.assert_array_equal(result[off], gram[off])
