"""From the last layer to logits, for the rows that are asked for."""

from __future__ import annotations

import onnx_ir as ir

from pocketlm.manifest import GraphIO
from pocketlm_exporters.decoder import DecoderConfig
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.linear import LinearEmitter


def select_rows(g: GraphBuilder, x: ir.Value, rows: ir.Value, path: str) -> ir.Value:
    """(batch × tokens, width) → (rows, width)."""
    return g.op("Gather", x, rows, name=path)


def output_logits(
    g: GraphBuilder, normed: ir.Value, head: LinearEmitter, config: DecoderConfig, io: GraphIO
) -> None:
    """`normed` (rows, hidden) → the graph's logits (rows, vocabulary)."""
    g.output(head(g, normed, "head"), io.logits, ir.DataType.FLOAT, ("rows", config.vocabulary))
