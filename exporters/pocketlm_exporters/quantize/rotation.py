"""Rotates the residual stream, so that a few huge channels no longer set the scale for all others.

QuaRot (arXiv 2404.00456), its first rotation: a root-mean-square norm does not change when its input is
rotated, so every weight that writes to the residual stream is rotated forth and every weight that reads
from it back, with the norms' own weights folded into the readers. The function computed is the same and
nothing is left to do at run time. Behind a norm, rows then look like Gaussian noise of size one, whatever
the token: one fixed activation range serves them all.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pocketlm_exporters.decoder import Array, DecoderWeights, Linear

_SEED = 576


def rotate(weights: DecoderWeights) -> DecoderWeights:
    """The same decoder in a rotated residual stream, the norms' weights folded into what reads them."""
    config, norms = weights.config, weights.norms
    rotation = random_rotation(config.hidden)
    linears: dict[str, Linear] = {}
    for n in range(config.layers):
        layer = f"layers.{n}"
        for reader, norm in (("qkv", "attention_norm"), ("gate_up", "mlp_norm")):
            path = f"{layer}.{reader}"
            linears[path] = _reader(weights.linears[path], norms[f"{layer}.{norm}"], rotation)
        for writer in ("output", "down"):
            path = f"{layer}.{writer}"
            linears[path] = _writer(weights.linears[path], rotation)
    # A tied head takes part of its own: norm and rotation make it differ from the embedding.
    head = weights.linears.get("head") or Linear(config.vocabulary, config.hidden, weights.embedding)
    linears["head"] = _reader(head, norms["final_norm"], rotation)
    hidden_map: Array = rotation.T * norms["final_norm"]
    return replace(
        weights,
        embedding=lambda: weights.embedding() @ rotation,
        linears=linears,
        norms={path: np.ones_like(norm) for path, norm in norms.items()},
        hidden_map=hidden_map if weights.hidden_map is None else hidden_map * weights.hidden_map,
    )


def random_rotation(size: int) -> Array:
    """A fixed orthogonal matrix (size, size), uniformly distributed (Mezzadri, math-ph/0609050)."""
    gaussian = np.random.default_rng(_SEED).standard_normal((size, size))
    q, r = np.linalg.qr(gaussian)
    rotation: Array = (q * np.sign(np.diagonal(r))).astype(np.float32)
    return rotation


def _reader(linear: Linear, norm: Array, rotation: Array) -> Linear:
    """W diag(norm) R: takes the rotated stream behind a norm without weights."""

    def weight() -> Array:
        scaled: Array = linear.weight() * norm
        return scaled @ rotation

    return replace(linear, weight=weight)


def _writer(linear: Linear, rotation: Array) -> Linear:
    """Rᵀ W and Rᵀ b: writes to the rotated stream."""
    back: Array = rotation.T
    return replace(
        linear,
        weight=lambda: back @ linear.weight(),
        bias=None if linear.bias is None else linear.bias @ rotation,
    )
