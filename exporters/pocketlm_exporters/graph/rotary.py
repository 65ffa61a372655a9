"""Rotary positions (RoFormer, arXiv 2104.09864), as tables of all positions or as the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder


@dataclass(frozen=True)
class RotaryTables:
    cosines: ir.Value  # (context_length, head_dim / 2)
    sines: ir.Value


def rotary_tables(g: GraphBuilder, inverse_frequencies: Sequence[float], context_length: int) -> RotaryTables:
    """Stored in the file, for the attention node to look positions up in."""
    positions: NDArray[np.float64] = np.arange(context_length, dtype=np.float64)
    angles = np.outer(positions, np.asarray(inverse_frequencies, np.float64))
    return RotaryTables(
        cosines=g.constant("rotary.cosines", np.cos(angles).astype(np.float32)),
        sines=g.constant("rotary.sines", np.sin(angles).astype(np.float32)),
    )


@dataclass(frozen=True)
class Positions:
    """The positions of a step's tokens, and where their rows stand in `RotaryRows`."""

    each: ir.Value  # float64 (batch × tokens, 1)
    rows: ir.Value  # int64 (batch, tokens)


def step_positions(g: GraphBuilder, ids: ir.Value, past_lengths: ir.Value) -> Positions:
    """From `ids` (batch, tokens) and `past_lengths` int32 (batch), the tokens before the step."""
    zero, one = (g.constant(f"positions.{n}", np.array(n, np.int64)) for n in (0, 1))
    last_axis = g.constant("last_axis", np.array([-1], np.int64))
    shape = g.op("Shape", ids, name="positions.shape")
    tokens = g.op("Gather", shape, one, name="positions.tokens")
    steps = g.op("Range", zero, tokens, one, name="positions.steps")
    past = g.op("Cast", past_lengths, name="positions.past_int64", to=ir.DataType.INT64)
    column = g.op("Unsqueeze", past, last_axis, name="positions.past")
    positions = g.op("Add", column, steps, name="positions")
    flat = g.op(
        "Reshape", positions, g.constant("column", np.array([-1, 1], np.int64)), name="positions.column"
    )
    rows = g.op("Range", zero, g.op("Size", ids, name="positions.count"), one, name="positions.range")
    return Positions(
        each=g.op("Cast", flat, name="positions.float64", to=ir.DataType.DOUBLE),
        rows=g.op("Reshape", rows, shape, name="positions.rows"),
    )


@dataclass(frozen=True)
class RotaryRows:
    cosines: ir.Value  # (batch × tokens, head_dim / 2)
    sines: ir.Value
    rows: ir.Value  # int64 (batch, tokens)


def rotary_rows(
    g: GraphBuilder, positions: Positions, inverse_frequencies: Sequence[float], path: str
) -> RotaryRows:
    """Computed for the positions of the step only: tables for long contexts and wide heads take a good part
    of a small model's file. In double precision, as the angles are large."""
    frequencies = g.constant(f"{path}.frequencies", np.asarray([inverse_frequencies], np.float64))
    angles = g.op("Mul", positions.each, frequencies, name=f"{path}.angles")
    cosines, sines = (
        g.op("Cast", g.op(op, angles, name=f"{path}.{op}"), name=f"{path}.{name}", to=ir.DataType.FLOAT)
        for op, name in (("Cos", "cosines"), ("Sin", "sines"))
    )
    return RotaryRows(cosines, sines, positions.rows)


def rotate(g: GraphBuilder, x: ir.Value, rotary: RotaryRows, path: str) -> ir.Value:
    """`x` (batch, tokens, any number of heads × head_dim), each head turned by its token's position."""
    return g.op("RotaryEmbedding", x, rotary.rows, rotary.cosines, rotary.sines, name=path, domain=MICROSOFT)
