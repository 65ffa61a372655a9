"""What an architecture module hands to the rest of the exporter: sizes, and packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends."""

    inverse_frequencies: tuple[float, ...]  # of the rotary embedding: head_dim / 2, in radians per token
    sliding_window: int | None = None  # tokens that a query sees, itself included; None: all of them


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention, rotary positions and a gated MLP."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int  # tokens
    norm_epsilon: float
    attention: tuple[LayerAttention, ...]  # one a layer


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b. The weight is read when it is called for, so that one at a time is in memory."""

    outputs: int
    inputs: int
    weight: Callable[[], Array]  # (outputs, inputs)
    bias: Array | None = None  # (outputs)


@dataclass(frozen=True)
class DecoderWeights:
    """Weights by path.

    | linear | rows |
    | --- | --- |
    | layers.N.qkv | queries, keys, values |
    | layers.N.output | |
    | layers.N.gate_up | gates, ups |
    | layers.N.down | |
    | head | the vocabulary; absent where the embedding serves as the head |

    Norms are layers.N.attention_norm, layers.N.mlp_norm and final_norm, each (hidden). Some families have
    more: layers.N.attention_post_norm and layers.N.mlp_post_norm (hidden), behind what is added to the
    residual stream, and layers.N.query_norm and layers.N.key_norm (head_dim).

    Attention multiplies queries and keys and nothing else: what the family scales the products by is in the
    queries' rows, or in their norm.
    """

    config: DecoderConfig
    embedding: Callable[[], Array]  # (vocabulary, hidden)
    linears: Mapping[str, Linear]
    norms: Mapping[str, Array]
    hidden_map: Array | None = None
    """What the head reads, times this, is what the checkpoint's own head reads, Hugging Face's
    `last_hidden_state`: (hidden, hidden) as a matrix, (hidden) channel by channel; None: the same."""

    @property
    def rotatable(self) -> bool:
        """Whether only linears write to the residual stream, so that it can be rotated."""
        return not any(path.endswith("post_norm") for path in self.norms)
