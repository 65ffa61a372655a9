"""Attention over the KV cache, with rotary positions inside the node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pocketlm.manifest import GraphIO
from pocketlm_exporters.decoder import Array, DecoderConfig
from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder


def rotary_tables(config: DecoderConfig) -> tuple[Array, Array]:
    """Cosines and sines, each (context_length + 1, head_dim / 2): `read_step` may add a row."""
    positions: NDArray[np.float64] = np.arange(config.context_length + 1, dtype=np.float64)
    angles = np.outer(positions, np.asarray(config.inverse_frequencies, np.float64))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass(frozen=True)
class Step:
    """Where in the cache a step stands, and which rows attend."""

    past_lengths: ir.Value  # int32 (batch): tokens in the cache after the step, minus one
    total_length: ir.Value  # int32 scalar: the most of these, plus one
    attending: ir.Value  # int64 (rows): which tokens attend, in order
    tokens: ir.Value  # int64 (tokens): which of these rows stand for the step's tokens


def read_step(g: GraphBuilder, ids: ir.Value, past_lengths: ir.Value) -> Step:
    """What all layers share, from `ids` (batch, tokens) and `past_lengths` int32 (batch), tokens before it.

    ONNX Runtime multiplies a single row by other means than several, with another last bit, and behind it
    the rounding of activations makes that a visible difference. Several rows come out alike however they
    are split. So a lone token attends as two rows, itself twice, and what is computed for a token does not
    depend on whether it came in a prompt or was generated. The second row's keys fall behind the sequence,
    where the next token overwrites them.
    """
    first, zero, one = (g.constant(f"step.{name}", np.array(value, np.int64)) for name, value in _INDICES)
    tokens = g.op("Shape", ids, name="step.tokens", start=1, end=2)
    rows = g.op("Max", tokens, g.constant("step.fewest", np.array([2], np.int64)), name="step.rows")
    last_row = g.op("Sub", rows, first, name="step.last_row")
    past = g.op(
        "Add", past_lengths, g.op("Cast", last_row, name="step.added", to=ir.DataType.INT32), name="step.past"
    )
    longest = g.op("ReduceMax", past, name="step.longest", keepdims=0)
    total = g.op("Add", longest, g.constant("step.one", np.int32(1)), name="step.total")

    def up_to(count: ir.Value, name: str) -> ir.Value:
        return g.op("Range", zero, g.op("Squeeze", count, name=f"{name}.count"), one, name=name)

    last_token = g.op("Sub", tokens, first, name="step.last_token")
    attending = g.op("Min", up_to(rows, "step.row_numbers"), last_token, name="step.attending")
    return Step(past, total, attending, up_to(tokens, "step.token_numbers"))


_INDICES: tuple[tuple[str, int | list[int]], ...] = (("ones", [1]), ("start", 0), ("stride", 1))


def attention(
    g: GraphBuilder, qkv: ir.Value, layer: int, config: DecoderConfig, io: GraphIO, step: Step
) -> ir.Value:
    """`qkv` (batch, tokens, (heads + 2 kv_heads) × head_dim) → (batch, tokens, heads × head_dim).

    The past and present of a layer are to be bound to one buffer; the node then writes in place.
    """
    cache_shape = ("batch", config.kv_heads, "capacity", config.head_dim)
    past_key = g.input(io.past_key.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    past_value = g.input(io.past_value.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    cosines, sines = rotary_tables(config)
    name = f"layers.{layer}.attention"
    attended, present_key, present_value = g.ops(
        "GroupQueryAttention",
        g.op("Gather", qkv, step.attending, name=f"{name}.rows", axis=1),
        None,
        None,
        past_key,
        past_value,
        step.past_lengths,
        step.total_length,
        g.constant("rotary.cosines", cosines),
        g.constant("rotary.sines", sines),
        name=name,
        outputs=(name, f"{name}.key", f"{name}.value"),
        domain=MICROSOFT,
        num_heads=config.heads,
        kv_num_heads=config.kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=-1 if config.sliding_window is None else config.sliding_window,
    )
    g.output(present_key, io.present_key.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    g.output(present_value, io.present_value.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    return g.op("Gather", attended, step.tokens, name=f"{name}.tokens", axis=1)
