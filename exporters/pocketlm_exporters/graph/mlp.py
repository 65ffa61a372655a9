"""The gated MLP's activation (GLU variants, arXiv 2002.05202)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder


def swiglu(g: GraphBuilder, gate_up: ir.Value, intermediate: int, path: str) -> ir.Value:
    """silu(gate) × up: `gate_up` (…, 2 × intermediate) → (…, intermediate)."""
    gate, up = _split(g, gate_up, intermediate, path)
    # QuickGelu with alpha 1 is silu in one node.
    activated = g.op("QuickGelu", gate, name=f"{path}.silu", domain=MICROSOFT, alpha=1.0)
    return g.op("Mul", activated, up, name=f"{path}.activation")


def geglu(g: GraphBuilder, gate_up: ir.Value, intermediate: int, path: str) -> ir.Value:
    """gelu(gate) × up, in the approximation by tanh: `gate_up` (…, 2 × intermediate) → (…, intermediate)."""
    gate, up = _split(g, gate_up, intermediate, path)
    activated = g.op("FastGelu", gate, name=f"{path}.gelu", domain=MICROSOFT)
    return g.op("Mul", activated, up, name=f"{path}.activation")


def _split(g: GraphBuilder, gate_up: ir.Value, intermediate: int, path: str) -> tuple[ir.Value, ir.Value]:
    sizes = g.constant("gate_up_sizes", np.array([intermediate, intermediate], np.int64))
    gate, up = g.ops(
        "Split", gate_up, sizes, name=f"{path}.split", outputs=(f"{path}.gate", f"{path}.up"), axis=-1
    )
    return gate, up
