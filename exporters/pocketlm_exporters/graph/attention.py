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
    """Cosines and sines, each (context_length, head_dim / 2)."""
    positions: NDArray[np.float64] = np.arange(config.context_length, dtype=np.float64)
    angles = np.outer(positions, np.asarray(config.inverse_frequencies, np.float64))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass(frozen=True)
class Step:
    """What all layers' attention shares: where in the cache a step stands, and the rotary tables."""

    past_lengths: ir.Value  # int32 (batch): tokens in the cache after the step, minus one
    total_length: ir.Value  # int32 scalar: the most of these, plus one
    cosines: ir.Value
    sines: ir.Value


def read_step(g: GraphBuilder, ids: ir.Value, past_lengths: ir.Value, config: DecoderConfig) -> Step:
    """From `ids` (batch, tokens) and `past_lengths` int32 (batch), the tokens before the step."""
    cosines, sines = rotary_tables(config)
    one = g.constant("step.one", np.array([1], np.int32))
    tokens = g.op("Shape", ids, name="step.tokens", start=1, end=2)
    added = g.op("Cast", tokens, name="step.added", to=ir.DataType.INT32)
    total = g.op("Add", past_lengths, added, name="step.total")
    longest = g.op("ReduceMax", total, name="step.longest", keepdims=0)
    return Step(
        past_lengths=g.op("Sub", total, one, name="step.last"),
        total_length=longest,
        cosines=g.constant("rotary.cosines", cosines),
        sines=g.constant("rotary.sines", sines),
    )


def attention(
    g: GraphBuilder, qkv: ir.Value, layer: int, config: DecoderConfig, io: GraphIO, step: Step
) -> ir.Value:
    """`qkv` (batch, tokens, (heads + 2 kv_heads) × head_dim) → (batch, tokens, heads × head_dim).

    The past and present of a layer are to be bound to one buffer; the node then writes in place.
    """
    cache_shape = ("batch", config.kv_heads, "capacity", config.head_dim)
    past_key = g.input(io.past_key.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    past_value = g.input(io.past_value.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    name = f"layers.{layer}.attention"
    attended, present_key, present_value = g.ops(
        "GroupQueryAttention",
        qkv,
        None,
        None,
        past_key,
        past_value,
        step.past_lengths,
        step.total_length,
        step.cosines,
        step.sines,
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
    return attended
