"""Root-mean-square norms (arXiv 1910.07467), alone and joined to the residual addition before them."""

from __future__ import annotations

import onnx_ir as ir

from pocketlm_exporters.decoder import Array
from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder


def rms_norm(g: GraphBuilder, x: ir.Value, weight: Array, epsilon: float, path: str) -> ir.Value:
    scale = g.constant(f"{path}.weight", weight)
    return g.op("SimplifiedLayerNormalization", x, scale, name=path, axis=-1, epsilon=epsilon, stash_type=1)


def add_rms_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: Array, epsilon: float, path: str
) -> tuple[ir.Value, ir.Value]:
    """(norm(x + residual), x + residual)."""
    scale = g.constant(f"{path}.weight", weight)
    normed, _, _, total = g.ops(
        "SkipSimplifiedLayerNormalization",
        x,
        residual,
        scale,
        name=path,
        outputs=(path, "", "", f"{path}.sum"),
        domain=MICROSOFT,
        epsilon=epsilon,
    )
    return normed, total
