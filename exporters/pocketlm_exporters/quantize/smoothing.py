"""Evens out activation channels before rounding, SmoothQuant's way (arXiv 2211.10438).

A linear's input channel that is far larger than the others wastes the range of its row. Dividing it by s
and multiplying the weight's column by s changes nothing but what rounding costs. The division is folded
into the layer that makes the channel: values for the attention's output linear, ups for the down linear,
the norm for what stands behind one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pocketlm_exporters.decoder import Array, DecoderConfig, DecoderWeights, Linear

# What makes each linear's input: a linear whose last outputs these are, or a norm.
_MAKERS = {"output": "qkv", "down": "gate_up"}
_NORMS = {"qkv": "attention_norm", "gate_up": "mlp_norm"}


def smoothing_scales(
    weights: DecoderWeights, largest: Mapping[str, Array], alpha: float, *, behind_norms: bool = False
) -> dict[str, Array]:
    """What to divide each input channel of linears by, as (inputs) by the linear's path.

    These are the output and down linears, and `behind_norms` those that read from the residual stream too
    (not the head, whose weights may be the embedding's). `largest` holds the largest magnitude of each input
    channel (inputs) by path; `alpha` (0 … 1) is how much of the difficulty moves from activations to weights.
    """
    config = weights.config
    scales: dict[str, Array] = {}
    for n in range(config.layers):
        for kind in (*_MAKERS, *(_NORMS if behind_norms else ())):
            path = f"layers.{n}.{kind}"
            activations, columns = largest[path], np.abs(weights.linears[path].weight()).max(axis=0)
            if kind == "output":
                # The heads of a group read the same values, so they share their scales.
                activations, columns = (_shared_by_group(each, config) for each in (activations, columns))
            scales[path] = _scales(activations, columns, alpha)
    return scales


def smooth(weights: DecoderWeights, scales: Mapping[str, Array]) -> DecoderWeights:
    """The same decoder with linears' inputs divided by `scales`, folded into what makes them."""
    config = weights.config
    linears, norms = dict(weights.linears), dict(weights.norms)
    for path, divisors in scales.items():
        layer, _, kind = path.rpartition(".")
        linears[path] = _scale_inputs(linears[path], divisors)
        if kind in _NORMS:
            norms[f"{layer}.{_NORMS[kind]}"] = norms[f"{layer}.{_NORMS[kind]}"] / divisors
        else:
            maker = f"{layer}.{_MAKERS[kind]}"
            made = divisors if kind == "down" else _one_of_each_group(divisors, config)
            linears[maker] = _divide_last_outputs(linears[maker], made)
    return replace(weights, linears=linears, norms=norms)


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
