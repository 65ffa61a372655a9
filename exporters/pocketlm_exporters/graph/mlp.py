"""The gated MLP's activation: silu(gate) × up (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder


def swiglu(g: GraphBuilder, gate_up: ir.Value, intermediate: int, path: str) -> ir.Value:
    """`gate_up` (…, 2 × intermediate) → (…, intermediate)."""
    sizes = g.constant("gate_up_sizes", np.array([intermediate, intermediate], np.int64))
    gate, up = g.ops(
        "Split", gate_up, sizes, name=f"{path}.split", outputs=(f"{path}.gate", f"{path}.up"), axis=-1
    )
    # QuickGelu with alpha 1 is silu in one node.
    activated = g.op("QuickGelu", gate, name=f"{path}.silu", domain=MICROSOFT, alpha=1.0)
    return g.op("Mul", activated, up, name=f"{path}.activation")
