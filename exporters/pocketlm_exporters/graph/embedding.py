"""From token ids (tokens) to rows of float32 (tokens, hidden), in the ways in which a table can be stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from pocketlm_exporters.decoder import Array
from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder
from pocketlm_exporters.quantize.rounding import BLOCK, BlockWeight

TABLE = "embedding.weight"


class EmbeddingEmitter(Protocol):
    def __call__(self, g: GraphBuilder, ids: ir.Value) -> ir.Value: ...


def flat(g: GraphBuilder, ids: ir.Value) -> ir.Value:
    """(batch, tokens) → (batch × tokens): but for attention, a token is a row whatever sequence it is of."""
    return g.op("Reshape", ids, g.constant("one_axis", np.array([-1], np.int64)), name="ids.flat")


@dataclass(frozen=True)
class FloatEmbedding:
    table: Callable[[], Array]  # (vocabulary, hidden)
    vocabulary: int
    hidden: int

    def __call__(self, g: GraphBuilder, ids: ir.Value) -> ir.Value:
        return g.op("Gather", self.stored(g), ids, name="embedding")

    def stored(self, g: GraphBuilder) -> ir.Value:
        return g.lazy(TABLE, ir.DataType.FLOAT, (self.vocabulary, self.hidden), self.table)


@dataclass(frozen=True)
class TiedFloatHead:
    """The embedding's own table as the head: one copy in the file."""

    embedding: FloatEmbedding

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        return g.op("FusedMatMul", x, self.embedding.stored(g), name=path, domain=MICROSOFT, transB=1)


@dataclass(frozen=True)
class BlockEmbedding:
    """Eight bits with a scale for each block of a row."""

    table: BlockWeight
    hidden: int

    def __call__(self, g: GraphBuilder, ids: ir.Value) -> ir.Value:
        rows = self.table.values.reshape(len(self.table.values), -1)
        return g.op(
            "GatherBlockQuantized",
            g.constant(TABLE, np.ascontiguousarray(rows[:, : self.hidden])),
            ids,
            g.constant("embedding.scales", self.table.scales),
            name="embedding",
            domain=MICROSOFT,
            bits=8,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )


@dataclass(frozen=True)
class TiedBlockEmbedding:
    """As BlockEmbedding, stored in the shape that a head needs: one copy in the file for both."""

    table: BlockWeight
    hidden: int

    def __call__(self, g: GraphBuilder, ids: ir.Value) -> ir.Value:
        values, scales = self.stored(g)
        # Of a constant, so done once at load: scales are to have the table's rank.
        per_block = g.op(
            "Unsqueeze",
            scales,
            g.constant("last_axis", np.array([-1], np.int64)),
            name="embedding.scales_of_blocks",
        )
        blocks = g.op(
            "GatherBlockQuantized",
            values,
            ids,
            per_block,
            name="embedding.blocks",
            domain=MICROSOFT,
            bits=8,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=2,
        )
        rows = g.constant("embedding.rows", np.array([0, -1], np.int64))
        padded = g.op("Reshape", blocks, rows, name="embedding.padded")
        if self.hidden % BLOCK == 0:
            return padded
        zero, end, axis = (
            g.constant(f"embedding.{name}", np.array([n], np.int64))
            for name, n in (("begin", 0), ("end", self.hidden), ("axis", 1))
        )
        return g.op("Slice", padded, zero, end, axis, name="embedding")

    def stored(self, g: GraphBuilder) -> tuple[ir.Value, ir.Value]:
        """Values (vocabulary, blocks, BLOCK) and scales (vocabulary, blocks)."""
        return g.constant(TABLE, self.table.values), g.constant("embedding.scales", self.table.scales)


@dataclass(frozen=True)
class TiedBlockHead:
    """The embedding's own blocks as the head."""

    embedding: TiedBlockEmbedding

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        values, scales = self.embedding.stored(g)
        return g.op(
            "MatMulNBits",
            x,
            values,
            scales,
            name=path,
            domain=MICROSOFT,
            K=self.embedding.hidden,
            N=len(self.embedding.table.values),
            bits=8,
            block_size=BLOCK,
            accuracy_level=4,  # eight-bit activations, in blocks too
        )
