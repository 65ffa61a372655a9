"""Rounding that makes up for itself: GPTQ (arXiv 2210.17323).

Rounding to nearest makes each weight's error small; what counts is the error of the output. That is
tr(E G Eᵀ) for the weight's error E (outputs, inputs) and the Gram matrix G = Xᵀ X (inputs, inputs) of the
layer's inputs, gathered in calibration. GPTQ rounds one input's weights after the other and moves what it
lost to the weights that are still to be rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pocketlm_exporters.quantize.nibbles import TOP, Grid
from pocketlm_exporters.quantize.rounding import BLOCK

DAMPING = 0.01
"""What is added to the Gram matrix's diagonal, as a share of its mean (the paper's 1 %)."""

SHRINKAGE = 0.5
"""What is added to each element of the diagonal beside that, as a share of the element itself.

Calibration sees about a thousand rows, no more than a linear has inputs, and much of what these correlate is
chance. This weakens all correlations alike, shrinkage to the diagonal as Ledoit and Wolf's (2004). What it
gains on SmolLM2-135M is in docs/quantization.md.
"""

_TOGETHER = 32  # inputs after which the errors are carried on to all that follow, in one product


def gptq(weight: NDArray[np.float32], gram: NDArray[np.float32], grid: Grid) -> NDArray[np.uint8]:
    """Codes (outputs, inputs) on `grid` for `weight` (outputs, inputs).

    Inputs are rounded in the order of their size (the paper's activation order), each on the grid of its own
    block. An output for which rounding to nearest is better after all gets that.
    """
    order = np.argsort(-np.diagonal(gram), kind="stable")
    factor = _inverse_factor(gram[np.ix_(order, order)])
    left = np.ascontiguousarray(weight.T[order])  # (inputs, outputs): what is still to be rounded
    codes = np.empty(left.shape, np.uint8)
    for begin in range(0, len(order), _TOGETHER):
        end = min(begin + _TOGETHER, len(order))
        errors = np.empty((end - begin, weight.shape[0]), np.float32)
        for n in range(begin, end):
            column = order[n]
            scale, zero = grid.scales[:, column // BLOCK], grid.zero_points[:, column // BLOCK]
            code = np.clip(np.rint(left[n] / scale + zero), 0, TOP)
            codes[column] = code
            errors[n - begin] = (left[n] - (code - zero) * scale) / factor[n, n]
            left[n + 1 : end] -= factor[n, n + 1 : end, None] * errors[n - begin]
        left[end:] -= factor[begin:end, end:].T @ errors
    rounded, nearest = np.ascontiguousarray(codes.T), grid.nearest(weight)
    losses = [loss(weight - grid.values(each), gram) for each in (rounded, nearest)]
    return np.where((losses[0] <= losses[1])[:, None], rounded, nearest)


def loss(error: NDArray[np.float32], gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """The squared error of each output (outputs), summed over the rows that `gram` was made of."""
    squared: NDArray[np.float32] = ((error @ gram) * error).sum(axis=1)
    return squared


def shrunk(gram: NDArray[np.float32]) -> NDArray[np.float64]:
    """`gram` with DAMPING and SHRINKAGE: positive definite, even where no input was ever but zero."""
    result = gram.astype(np.float64)
    diagonal = np.diagonal(result)
    damping = DAMPING * float(diagonal.mean()) or 1.0
    np.fill_diagonal(result, diagonal * (1 + SHRINKAGE) + damping)
    return result


def _inverse_factor(gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """Upper triangular U with UᵀU the inverse of the shrunk Gram matrix.

    With the matrix flipped both ways, its Cholesky factor is upper triangular in the original order.
    """
    upper = np.linalg.cholesky(shrunk(gram)[::-1, ::-1])[::-1, ::-1]
    factor: NDArray[np.float32] = np.linalg.inv(upper).astype(np.float32)
    return factor
