"""Attention over the KV cache, the only part of the graph that tells sequences apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pocketlm.manifest import GraphIO
from pocketlm_exporters.decoder import DecoderConfig
from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder
from pocketlm_exporters.graph.rotary import RotaryTables


@dataclass(frozen=True)
class Step:
    """Where in the cache a step stands; all layers' attention shares it."""

    past_lengths: ir.Value  # int32 (batch): tokens in the cache after the step, minus one
    total_length: ir.Value  # int32 scalar: the most of these, plus one
    qkv_shape: ir.Value  # int64 (3): batch, tokens, (heads + 2 kv_heads) × head_dim


def read_step(g: GraphBuilder, ids: ir.Value, past_lengths: ir.Value, config: DecoderConfig) -> Step:
    """From `ids` (batch, tokens) and `past_lengths` int32 (batch), the tokens before the step."""
    width = np.array([(config.heads + 2 * config.kv_heads) * config.head_dim], np.int64)
    shape = g.op("Shape", ids, name="step.shape")
    qkv_shape = g.op("Concat", shape, g.constant("step.width", width), name="step.qkv_shape", axis=0)
    one = g.constant("step.one", np.array([1], np.int32))
    tokens = g.op("Shape", ids, name="step.tokens", start=1, end=2)
    added = g.op("Cast", tokens, name="step.added", to=ir.DataType.INT32)
    total = g.op("Add", past_lengths, added, name="step.total")
    longest = g.op("ReduceMax", total, name="step.longest", keepdims=0)
    return Step(g.op("Sub", total, one, name="step.last"), longest, qkv_shape)


def in_sequences(g: GraphBuilder, qkv: ir.Value, step: Step, path: str) -> ir.Value:
    """(batch × tokens, (heads + 2 kv_heads) × head_dim) → (batch, tokens, the same)."""
    return g.op("Reshape", qkv, step.qkv_shape, name=path)


@dataclass(frozen=True)
class Packed:
    """Scaled queries, keys and values of all heads, to be rotated inside the attention node."""

    qkv: ir.Value  # (batch, tokens, (heads + 2 kv_heads) × head_dim)
    tables: RotaryTables


@dataclass(frozen=True)
class Apart:
    """Scaled queries and keys that are rotated already, and values."""

    queries: ir.Value  # (batch, tokens, heads × head_dim)
    keys: ir.Value  # (batch, tokens, kv_heads × head_dim)
    values: ir.Value  # as the keys


def attention(
    g: GraphBuilder, heads: Packed | Apart, layer: int, config: DecoderConfig, io: GraphIO, step: Step
) -> ir.Value:
    """`heads` → (batch × tokens, heads × head_dim).

    The past and present of a layer are to be bound to one buffer; the node then writes in place.

    The node has a sink for what a head attends to besides the tokens, here of a weight that is exactly zero:
    ONNX Runtime then takes the way by whole rows of scores, and with a scale of one its product of a lone
    query and the keys reads the keys where they are. By blocks of keys, which is its way without a sink, a
    decode step copies each block first.
    """
    cache_shape = ("batch", config.kv_heads, "capacity", config.head_dim)
    past_key = g.input(io.past_key.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    past_value = g.input(io.past_value.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    attends = config.attention[layer]
    if isinstance(heads, Packed):
        inputs: tuple[ir.Value | None, ...] = (heads.qkv, None, None)
        tables: tuple[ir.Value, ...] = (heads.tables.cosines, heads.tables.sines)
    else:
        inputs, tables = (heads.queries, heads.keys, heads.values), ()
    no_sink = g.constant("no_sink", np.full(config.heads, np.finfo(np.float32).min, np.float32))
    name = f"layers.{layer}.attention"
    attended, present_key, present_value = g.ops(
        "GroupQueryAttention",
        *inputs,
        past_key,
        past_value,
        step.past_lengths,
        step.total_length,
        *(tables or (None, None)),
        None,  # position ids
        None,  # attention bias
        no_sink,
        name=name,
        outputs=(name, f"{name}.key", f"{name}.value"),
        domain=MICROSOFT,
        num_heads=config.heads,
        kv_num_heads=config.kv_heads,
        do_rotary=int(bool(tables)),
        rotary_interleaved=0,
        local_window_size=-1 if attends.sliding_window is None else attends.sliding_window,
        scale=1.0,  # the queries are scaled already
    )
    g.output(present_key, io.present_key.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    g.output(present_value, io.present_value.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    rows = g.constant("attention.rows", np.array([-1, config.heads * config.head_dim], np.int64))
    return g.op("Reshape", attended, rows, name=f"{name}.rows")
