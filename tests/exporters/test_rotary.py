"""Rotary rows computed in the graph, against a rotation of complex numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from helpers.tiny import Array
from pocketlm.session import open_graph
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.rotary import rotary_rows, rotate, step_positions

FREQUENCIES = tuple(10_000.0 ** (-pair / 8) for pair in range(8))


def rotated(folder: Path, x: Array, past: list[int]) -> Array:
    batch, tokens, width = x.shape
    g = GraphBuilder("rotary")
    ids = g.input("ids", ir.DataType.INT64, ("batch", "tokens"))
    lengths = g.input("lengths", ir.DataType.INT32, ("batch",))
    rows = rotary_rows(g, step_positions(g, ids, lengths), FREQUENCIES, "rotary")
    value = g.input("x", ir.DataType.FLOAT, ("batch", "tokens", width))
    g.output(rotate(g, value, rows, "y"), "y", ir.DataType.FLOAT, ("batch", "tokens", width))
    g.save(folder, "rotary.onnx", "rotary.onnx.data")
    feeds = {"ids": np.zeros((batch, tokens), np.int64), "lengths": np.array(past, np.int32), "x": x}
    result: Array = open_graph(folder / "rotary.onnx", 1).run(["y"], feeds)[0]
    return result


def expected(x: Array, past: list[int]) -> Array:
    """Half a head is the real, half the imaginary part; each row begins at its own position."""
    batch, tokens, width = x.shape
    heads = x.reshape(batch, tokens, width // 16, 2, 8).astype(np.float64)
    positions = np.array(past)[:, None] + np.arange(tokens)
    turn = np.exp(1j * positions[:, :, None, None] * np.array(FREQUENCIES))
    turned = (heads[..., 0, :] + 1j * heads[..., 1, :]) * turn
    return np.stack([turned.real, turned.imag], axis=-2).reshape(x.shape).astype(np.float32)


def test_each_row_starts_where_its_past_ends(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 48)).astype(np.float32)
    past = [0, 7, 300]
    np.testing.assert_allclose(rotated(tmp_path, x, past), expected(x, past), atol=1e-5)


def test_far_positions_are_exact(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32)
    np.testing.assert_allclose(rotated(tmp_path, x, [131_000]), expected(x, [131_000]), atol=1e-5)
