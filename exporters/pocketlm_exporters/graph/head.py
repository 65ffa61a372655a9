"""From the last layer to logits, or hidden states, for the rows that are asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pocketlm.manifest import GraphIO
from pocketlm_exporters.decoder import Array, DecoderWeights
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.linear import LinearEmitter

_END = np.array([np.iinfo(np.int64).max])


def select_rows(g: GraphBuilder, x: ir.Value, rows: ir.Value, path: str) -> ir.Value:
    """(batch × tokens, width) → (rows, width)."""
    return g.op("Gather", x, rows, name=path)


def output_rows(
    g: GraphBuilder, normed: ir.Value, head: LinearEmitter, weights: DecoderWeights, io: GraphIO
) -> None:
    """`normed` (rows, hidden) → the graph's logits, and its hidden states where `io` names them.

    ONNX Runtime computes all outputs, whichever are wanted. So each row goes one way only: the first ones,
    none by default, become hidden states, the others logits.
    """
    config = weights.config
    if io.hidden is not None and io.hidden_rows is not None:
        count = g.optional_input(io.hidden_rows, np.zeros(1, np.int64))
        begin, end = g.constant("first_row", np.zeros(1, np.int64)), g.constant("end_of_rows", _END)
        axis = g.constant("axis_of_rows", np.zeros(1, np.int64))
        first = g.op("Slice", normed, begin, count, axis, name="hidden.rows")
        hidden = _mapped(g, first, weights.hidden_map)
        g.output(hidden, io.hidden, ir.DataType.FLOAT, ("hidden_rows", config.hidden))
        normed = g.op("Slice", normed, count, end, axis, name="head.rows")
    g.output(head(g, normed, "head"), io.logits, ir.DataType.FLOAT, ("logit_rows", config.vocabulary))


def _mapped(g: GraphBuilder, hidden: ir.Value, hidden_map: Array | None) -> ir.Value:
    """See `DecoderWeights.hidden_map`."""
    if hidden_map is None:
        return hidden
    by = g.constant("hidden.map", hidden_map)
    return g.op("MatMul" if hidden_map.ndim == 2 else "Mul", hidden, by, name="hidden.mapped")
