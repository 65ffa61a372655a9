"""Attention over the KV cache."""

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


def read_step(g: GraphBuilder, ids: ir.Value, past_lengths: ir.Value) -> Step:
    """From `ids` (batch, tokens) and `past_lengths` int32 (batch), the tokens before the step."""
    one = g.constant("step.one", np.array([1], np.int32))
    tokens = g.op("Shape", ids, name="step.tokens", start=1, end=2)
    added = g.op("Cast", tokens, name="step.added", to=ir.DataType.INT32)
    total = g.op("Add", past_lengths, added, name="step.total")
    longest = g.op("ReduceMax", total, name="step.longest", keepdims=0)
    return Step(past_lengths=g.op("Sub", total, one, name="step.last"), total_length=longest)


@dataclass(frozen=True)
class Packed:
    """Queries, keys and values of all heads in one value, to be rotated inside the attention node."""

    qkv: ir.Value  # (batch, tokens, (heads + 2 kv_heads) × head_dim)
    tables: RotaryTables


@dataclass(frozen=True)
class Apart:
    """Queries and keys that are rotated already, and values."""

    queries: ir.Value  # (batch, tokens, heads × head_dim)
    keys: ir.Value  # (batch, tokens, kv_heads × head_dim)
    values: ir.Value  # as the keys


def attention(
    g: GraphBuilder, heads: Packed | Apart, layer: int, config: DecoderConfig, io: GraphIO, step: Step
) -> ir.Value:
    """`heads` → (batch, tokens, heads × head_dim).

    The past and present of a layer are to be bound to one buffer; the node then writes in place.
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
    name = f"layers.{layer}.attention"
    attended, present_key, present_value = g.ops(
        "GroupQueryAttention",
        *inputs,
        past_key,
        past_value,
        step.past_lengths,
        step.total_length,
        *tables,
        name=name,
        outputs=(name, f"{name}.key", f"{name}.value"),
        domain=MICROSOFT,
        num_heads=config.heads,
        kv_num_heads=config.kv_heads,
        do_rotary=int(bool(tables)),
        rotary_interleaved=0,
        local_window_size=-1 if attends.sliding_window is None else attends.sliding_window,
        **({} if attends.scale is None else {"scale": attends.scale}),
    )
    g.output(present_key, io.present_key.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    g.output(present_value, io.present_value.format(layer=layer), ir.DataType.FLOAT, cache_shape)
    return attended
