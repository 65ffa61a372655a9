"""Rounding to nearest: float32 weights → eight-bit integers and scales. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

LEVELS = 127  # symmetric eight bits: −127 … 127
BLOCK = 32  # inputs that share a scale in a BlockWeight

# Scales of rows with nothing larger would be subnormal: too coarse to divide by, or zero.
_NEXT_TO_ZERO = LEVELS * np.finfo(np.float32).tiny


@dataclass(frozen=True)
class ChannelWeight:
    """One scale for each output: w[o, i] ≈ values[i, o] × scales[o]; unsigned values are 128 too large."""

    values: NDArray[np.int8] | NDArray[np.uint8]  # (inputs, outputs), as integer matrix products want it
    scales: NDArray[np.float32]  # (outputs)
    worst_error: float

    def unsigned(self) -> ChannelWeight:
        """The same weights as unsigned bytes around 128."""
        return replace(self, values=self.values.view(np.uint8) ^ np.uint8(128))


@dataclass(frozen=True)
class BlockWeight:
    """One scale for each BLOCK inputs of an output: w ≈ (values − 128) × scale."""

    values: NDArray[np.uint8]  # (outputs, blocks, BLOCK)
    scales: NDArray[np.float32]  # (outputs, blocks)
    worst_error: float


def round_channels(weight: NDArray[np.float32]) -> ChannelWeight:
    """`weight` (outputs, inputs) with a scale for each output."""
    scales = _scales(weight)
    values = np.rint(weight / scales[:, None])
    worst = _worst_error(weight, values * scales[:, None])
    return ChannelWeight(np.ascontiguousarray(values.astype(np.int8).T), scales, worst)


def round_blocks(weight: NDArray[np.float32]) -> BlockWeight:
    """`weight` (outputs, inputs) with a scale for each block of inputs, the last one filled up with zeros."""
    outputs, inputs = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    scales = _scales(padded)
    values = np.rint(padded / scales[..., None])
    worst = _worst_error(padded, values * scales[..., None])
    return BlockWeight((values + 128).astype(np.uint8), scales, worst)


def _scales(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Per last axis. Rows of zeros get the scale one: they round to zeros with any."""
    largest = np.abs(weight).max(axis=-1)
    return np.where(largest > _NEXT_TO_ZERO, largest / LEVELS, 1).astype(np.float32)


def _worst_error(weight: NDArray[np.float32], rounded: NDArray[np.float32]) -> float:
    largest = float(np.abs(weight).max())
    return float(np.abs(weight - rounded).max()) / largest if largest else 0.0
