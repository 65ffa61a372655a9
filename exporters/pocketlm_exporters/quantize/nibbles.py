"""Four-bit weights in blocks: the grids to round to, and the bytes they are stored as. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pocketlm_exporters.quantize.rounding import BLOCK

T = TypeVar("T", bound=np.generic)

TOP = 15  # codes are 0 … 15

# How much narrower than a block's extremes its grid may be: clipping them can cost less than a coarse step.
_SHRINKS = np.linspace(1.0, 0.7, 7)
_NEXT_TO_ZERO = TOP * np.finfo(np.float32).tiny  # a block with nothing larger would have a subnormal scale


@dataclass(frozen=True)
class Grid:
    """The sixteen values of each BLOCK inputs of an output: (code − zero_point) × scale, code in 0 … 15."""

    scales: NDArray[np.float32]  # (outputs, blocks)
    zero_points: NDArray[np.uint8]  # (outputs, blocks), 0 … 15: zero itself is always on the grid

    def nearest(self, weight: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The codes (outputs, inputs) next to `weight` (outputs, inputs)."""
        blocks = in_blocks(weight)
        codes = _nearest(blocks, self.scales[..., None], self.zero_points[..., None])
        return codes.reshape(len(weight), -1)[:, : weight.shape[1]].astype(np.uint8)

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What `codes` (outputs, inputs) stand for, in the same shape."""
        offsets = in_blocks(codes).astype(np.float32) - self.zero_points[..., None]
        values = (offsets * self.scales[..., None]).reshape(len(codes), -1)
        return np.ascontiguousarray(values[:, : codes.shape[1]])


@dataclass(frozen=True)
class NibbleWeight:
    """Codes on a grid as ONNX Runtime's MatMulNBits wants them: two a byte, the first in the lower half."""

    values: NDArray[np.uint8]  # (outputs, blocks, BLOCK / 2)
    scales: NDArray[np.float32]  # (outputs, blocks)
    zero_points: NDArray[np.uint8]  # (outputs, ⌈blocks / 2⌉)
    worst_error: float


def fit_grid(weight: NDArray[np.float32], importance: NDArray[np.float32]) -> Grid:
    """The grid for `weight` (outputs, inputs) that rounding to nearest loses least on.

    A loss is a squared error times the `importance` (inputs) of its input. Each block's range is its
    smallest to its largest weight and zero, or a part of that, whichever is best.
    """
    blocks, weighting = in_blocks(weight), in_blocks(importance[None])
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    width = high - low
    flat = width <= _NEXT_TO_ZERO
    scales = np.ones_like(width)
    zero_points = np.zeros_like(width)
    least = np.full(width.shape, np.inf, np.float32)
    for shrink in _SHRINKS:
        scale = np.where(flat, 1, width * np.float32(shrink / TOP)).astype(np.float32)
        exact = np.where(flat, 0, -low * np.float32(shrink) / scale)
        # Rounding may take a block without positive weights just beyond the last code.
        for zero_point in (np.floor(exact), np.minimum(np.ceil(exact), TOP)):
            codes = _nearest(blocks, scale[..., None], zero_point[..., None])
            errors = blocks - (codes - zero_point[..., None]) * scale[..., None]
            loss = (np.square(errors) * weighting).sum(axis=-1)
            better = loss < least
            least[better] = loss[better]
            scales[better] = scale[better]
            zero_points[better] = zero_point[better]
    return Grid(scales, zero_points.astype(np.uint8))


def pack(weight: NDArray[np.float32], codes: NDArray[np.uint8], grid: Grid) -> NibbleWeight:
    """`codes` (outputs, inputs) on `grid` as they are stored, beside what they lose of `weight`.

    The last block is filled up with zeros of the grid.
    """
    outputs, inputs = codes.shape
    filled = np.repeat(grid.zero_points, BLOCK, axis=1)
    filled[:, :inputs] = codes
    largest = float(np.abs(weight).max())
    return NibbleWeight(
        values=_in_pairs(filled).reshape(outputs, -1, BLOCK // 2),
        scales=grid.scales,
        zero_points=_in_pairs(grid.zero_points),
        worst_error=float(np.abs(weight - grid.values(codes)).max()) / largest if largest else 0.0,
    )


def in_blocks(rows: NDArray[T]) -> NDArray[T]:
    """(rows, inputs) → (rows, blocks, BLOCK), the last block filled up with zeros."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    return padded.reshape(len(rows), -1, BLOCK)


def _nearest(
    blocks: NDArray[np.float32],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.float32] | NDArray[np.uint8],
) -> NDArray[np.float32]:
    codes: NDArray[np.float32] = np.clip(np.rint(blocks / scales + zero_points), 0, TOP)
    return codes


def _in_pairs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(rows, n) of four bits → (rows, ⌈n / 2⌉) bytes."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << np.uint8(4))
