"""From the last layer to logits, for the rows that are asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pocketlm.manifest import GraphIO
from pocketlm_exporters.decoder import DecoderConfig
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.linear import LinearEmitter


def select_rows(g: GraphBuilder, x: ir.Value, rows: ir.Value, width: int, path: str) -> ir.Value:
    """(batch, tokens, width) → (1, rows, width)."""
    flat = g.op(
        "Reshape", x, g.constant(f"{path}.shape", np.array([1, -1, width], np.int64)), name=f"{path}.flat"
    )
    return g.op("Gather", flat, rows, name=path, axis=1)


def output_logits(
    g: GraphBuilder, normed: ir.Value, head: LinearEmitter, config: DecoderConfig, io: GraphIO
) -> None:
    """`normed` (1, rows, hidden) → the graph's logits (rows, vocabulary)."""
    rows = g.op("Squeeze", normed, g.constant("first_axis", np.array([0], np.int64)), name="rows")
    g.output(head(g, rows, "head"), io.logits, ir.DataType.FLOAT, ("rows", config.vocabulary))
