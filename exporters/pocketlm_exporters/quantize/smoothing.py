"""Evens out activation channels before rounding, SmoothQuant's way (arXiv 2211.10438).

A linear's input channel that is far larger than the others wastes the range of its row. Dividing it by s
and multiplying the weight's column by s changes nothing but what rounding costs. The division is folded
into the layer that makes the channel: values for the attention's output linear, ups for the down linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pocketlm_exporters.decoder import Array, DecoderConfig, DecoderWeights, Linear


def smoothing_scales(weights: DecoderWeights, largest: Mapping[str, Array], alpha: float) -> dict[str, Array]:
    """What to divide each input channel of the output and down linears by, as (inputs) by the linear's path.

    `largest` holds the largest magnitude of each input channel (inputs) by path; `alpha` (0 … 1) is how
    much of the difficulty moves from activations to weights.
    """
    config = weights.config
    scales: dict[str, Array] = {}
    for n in range(config.layers):
        for path in (f"layers.{n}.output", f"layers.{n}.down"):
            activations, columns = largest[path], np.abs(weights.linears[path].weight()).max(axis=0)
            if path.endswith("output"):
                # The heads of a group read the same values, so they share their scales.
                activations, columns = (_shared_by_group(each, config) for each in (activations, columns))
            scales[path] = _scales(activations, columns, alpha)
    return scales


def smooth(weights: DecoderWeights, scales: Mapping[str, Array]) -> DecoderWeights:
    """The same decoder with linears' inputs divided by `scales`, folded into the linears that make them."""
    config = weights.config
    linears = dict(weights.linears)
    for n in range(config.layers):
        for reader, maker in (("output", "qkv"), ("down", "gate_up")):
            read_path, make_path = f"layers.{n}.{reader}", f"layers.{n}.{maker}"
            divisors = scales[read_path]
            linears[read_path] = _scale_inputs(linears[read_path], divisors)
            made = divisors if reader == "down" else _one_of_each_group(divisors, config)
            linears[make_path] = _divide_last_outputs(linears[make_path], made)
    return replace(weights, linears=linears)


def _shared_by_group(channels: Array, config: DecoderConfig) -> Array:
    """The largest over a group's heads, for each of its heads: (heads × head_dim) both ways."""
    groups = channels.reshape(config.kv_heads, -1, config.head_dim)
    return np.broadcast_to(groups.max(axis=1, keepdims=True), groups.shape).reshape(-1)


def _one_of_each_group(channels: Array, config: DecoderConfig) -> Array:
    """(heads × head_dim), shared by groups → (kv_heads × head_dim)."""
    return channels.reshape(config.kv_heads, -1, config.head_dim)[:, 0].reshape(-1)


def _scales(activations: Array, columns: Array, alpha: float) -> Array:
    """activations^alpha / columns^(1 − alpha); one for channels that never fire or that nobody reads."""
    tiny = np.float32(1e-5)
    scales = np.maximum(activations, tiny) ** alpha / np.maximum(columns, tiny) ** (1 - alpha)
    dead = (activations < tiny) | (columns < tiny)
    return np.where(dead, 1, np.clip(scales, 1e-4, 1e4)).astype(np.float32)


def _scale_inputs(linear: Linear, scales: Array) -> Linear:
    return replace(linear, weight=lambda: linear.weight() * scales)


def _divide_last_outputs(linear: Linear, divisors: Array) -> Linear:
    """Values are the last rows of qkv, and ups those of gate_up."""
    rows = np.ones(linear.outputs, np.float32)
    rows[-len(divisors) :] /= divisors
    return replace(
        linear,
        weight=lambda: linear.weight() * rows[:, None],
        bias=None if linear.bias is None else linear.bias * rows,
    )
