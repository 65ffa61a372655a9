"""Stored embeddings against numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from helpers.tiny import Array
from pocketlm.session import open_graph
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.embedding import (
    BlockEmbedding,
    EmbeddingEmitter,
    FloatEmbedding,
    TiedBlockEmbedding,
    TiedBlockHead,
    TiedFloatHead,
)
from pocketlm_exporters.quantize.rounding import BlockWeight, round_blocks

IDS = np.array([0, 3, 3, 6, 1])


def look_up(folder: Path, emitter: EmbeddingEmitter, hidden: int) -> Array:
    g = GraphBuilder("embedding")
    ids = g.input("ids", ir.DataType.INT64, ("tokens",))
    g.output(emitter(g, ids), "rows", ir.DataType.FLOAT, ("tokens", hidden))
    g.save(folder, "embedding.onnx", "embedding.onnx.data")
    rows: Array = open_graph(folder / "embedding.onnx", 1).run(["rows"], {"ids": IDS})[0]
    return rows


@pytest.mark.parametrize("hidden", [8, 32, 40, 64, 100])
@pytest.mark.parametrize("kind", [BlockEmbedding, TiedBlockEmbedding])
def test_blocks_are_restored_exactly(
    kind: Callable[[BlockWeight, int], EmbeddingEmitter], hidden: int, tmp_path: Path
) -> None:
    table = np.random.default_rng(0).standard_normal((7, hidden)).astype(np.float32)
    table[3] *= 1000
    blocks = round_blocks(table)
    restored = (blocks.values.astype(np.float32) - 128) * blocks.scales[..., None]
    rows = look_up(tmp_path, kind(blocks, hidden), hidden)
    assert (rows == restored.reshape(7, -1)[IDS, :hidden]).all()


def test_float_rows_are_as_they_were(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float32)
    assert (look_up(tmp_path, FloatEmbedding(lambda: table, 7, 12), 12) == table[IDS]).all()


def test_a_tied_head_shares_the_table(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((700, 40)).astype(np.float32)
    embedding = FloatEmbedding(lambda: table, 700, 40)
    g = GraphBuilder("tied")
    ids = g.input("ids", ir.DataType.INT64, ("tokens",))
    logits = TiedFloatHead(embedding)(g, embedding(g, ids), "head")
    g.output(logits, "logits", ir.DataType.FLOAT, ("tokens", 700))
    g.save(tmp_path, "tied.onnx", "tied.onnx.data")
    found = open_graph(tmp_path / "tied.onnx", 1).run(["logits"], {"ids": IDS})[0]
    np.testing.assert_allclose(found, table[IDS] @ table.T, atol=1e-4)
    assert (tmp_path / "tied.onnx.data").stat().st_size < 1.5 * table.nbytes


@pytest.mark.parametrize("hidden", [40, 64])
def test_a_tied_head_shares_the_blocks(hidden: int, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((700, hidden)).astype(np.float32)
    embedding = TiedBlockEmbedding(round_blocks(table), hidden)
    g = GraphBuilder("tied")
    ids = g.input("ids", ir.DataType.INT64, ("tokens",))
    logits = TiedBlockHead(embedding)(g, embedding(g, ids), "head")
    g.output(logits, "logits", ir.DataType.FLOAT, ("tokens", 700))
    g.save(tmp_path, "tied.onnx", "tied.onnx.data")
    found = open_graph(tmp_path / "tied.onnx", 1).run(["logits"], {"ids": IDS})[0]
    expected = table[IDS] @ table.T
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert (tmp_path / "tied.onnx.data").stat().st_size < 0.6 * table.nbytes
