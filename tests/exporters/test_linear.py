"""Each kind of linear against numpy, run as pocketlm runs it.

The integer products have to be exact: on x86-64 CPUs without VNNI, sums of two products of unsigned and
signed bytes saturate at 16 bits unless ONNX Runtime is told otherwise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from helpers.tiny import Array
from pocketlm.session import open_graph
from pocketlm_exporters.decoder import Linear
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.linear import (
    BlockLinear,
    FloatLinear,
    LinearEmitter,
    RowInt8Linear,
    StaticInt8Linear,
    TappedLinear,
)
from pocketlm_exporters.processor import WEIGHT_BYTES, WeightBytes
from pocketlm_exporters.quantize.rounding import ChannelWeight, round_blocks, round_channels

WIDTHS = [(1, 1), (2, 3), (31, 17), (64, 64), (127, 33), (576, 192), (1031, 5)]
"""(inputs, outputs); with up to 1,031 inputs every sum is a whole number that float32 holds exactly."""


class Product:
    """The graph of one linear."""

    def __init__(self, folder: Path, emitter: LinearEmitter, inputs: int, *, threads: int = 2) -> None:
        g = GraphBuilder("linear")
        x = g.input("x", ir.DataType.FLOAT, ("rows", inputs))
        g.output(emitter(g, x, "linear"), "y", ir.DataType.FLOAT, ("rows", None))
        g.save(folder, "linear.onnx", "linear.onnx.data")
        self._session = open_graph(folder / "linear.onnx", threads)

    def __call__(self, rows: Array, output: str = "y") -> Array:
        result: Array = self._session.run([output], {"x": rows})[0]
        return result


def extreme_values(rows: int, inputs: int, outputs: int) -> tuple[Array, NDArray[np.int8]]:
    """Activations and weights of ±127: rows and columns of one sign, alternating ones, random ones."""
    random = np.random.default_rng(0)
    x = random.choice([-127, 127], (rows, inputs))
    w = random.choice([-127, 127], (inputs, outputs))
    x[0], w[:, 0] = 127, 127
    if rows > 2 and outputs > 2:
        x[1], w[:, 1] = -127, -127
        x[2] = np.where(np.arange(inputs) % 2, 127, -127)
        w[:, 2] = np.where(np.arange(inputs) % 2, -127, 127)
    return x.astype(np.float32), w.astype(np.int8)


def stored(w: NDArray[np.int8], weights: WeightBytes) -> ChannelWeight:
    """`w` (inputs, outputs) with scales of one."""
    signed = ChannelWeight(w, ones(w.shape[1]), 0.0)
    return signed.unsigned() if weights == "unsigned" else signed


def exact(x: Array, w: NDArray[np.int8]) -> NDArray[np.int64]:
    product: NDArray[np.int64] = np.rint(x).astype(np.int64) @ w.astype(np.int64)
    return product


def ones(outputs: int) -> Array:
    return np.ones(outputs, np.float32)


@pytest.mark.parametrize("weights", WEIGHT_BYTES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_static_product_is_exact_at_extreme_values(
    inputs: int, outputs: int, rows: int, weights: WeightBytes, tmp_path: Path
) -> None:
    x, w = extreme_values(rows, inputs, outputs)
    product = Product(tmp_path, StaticInt8Linear(stored(w, weights), None, 127.0), inputs)
    assert (product(x) == exact(x, w)).all()


@pytest.mark.parametrize("weights", WEIGHT_BYTES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_row_product_is_exact_at_extreme_values(
    inputs: int, outputs: int, rows: int, weights: WeightBytes, tmp_path: Path
) -> None:
    x, w = extreme_values(rows, inputs, outputs)
    product = Product(tmp_path, RowInt8Linear(stored(w, weights), None), inputs)
    sizes = 2.0 ** np.arange(-rows // 2, rows - rows // 2, dtype=np.float32)[:rows, None]
    # Up to the rounding of the scales' product with the whole number.
    np.testing.assert_allclose(product(x * sizes), exact(x, w) * sizes.astype(np.float64), rtol=1e-6)


def test_activations_beyond_the_range_are_clipped(tmp_path: Path) -> None:
    w = np.full((300, 4), 127, np.int8)
    product = Product(tmp_path, StaticInt8Linear(ChannelWeight(w, ones(4), 0.0), None, 127.0), 300)
    x = np.full((3, 300), 1000, np.float32)
    x[1], x[2] = -1000, -128
    assert (product(x) == np.array([[127], [-128], [-128]]) * 127 * 300).all()


@pytest.mark.parametrize("weights", WEIGHT_BYTES)
def test_every_integer_is_its_own(weights: WeightBytes, tmp_path: Path) -> None:
    """All 255 activations against all 255 weights."""
    w = np.arange(-127, 128, dtype=np.int8)[None]
    x = np.arange(-127, 128, dtype=np.float32)[:, None]
    product = Product(tmp_path, StaticInt8Linear(stored(w, weights), None, 127.0), 1)
    assert (product(x) == exact(x, w)).all()


@pytest.mark.parametrize("kind", ["static", "row"])
def test_scales_and_bias(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((48, 100)).astype(np.float32) * random.uniform(0.1, 10, (48, 1))
    bias = random.standard_normal(48).astype(np.float32)
    channels = round_channels(weight.astype(np.float32))
    x = random.uniform(-3, 3, (9, 100)).astype(np.float32)
    if kind == "static":
        emitter: LinearEmitter = StaticInt8Linear(channels, bias, 3.0)
        step = np.full((9, 1), 3.0 / 127)
    else:
        x *= 10.0 ** np.arange(-4, 5, dtype=np.float32)[:, None]
        emitter = RowInt8Linear(channels, bias)
        step = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    restored = channels.values.T.astype(np.float64) * channels.scales[:, None]
    # No activation is off by more than half a step.
    bound = 0.501 * step * np.abs(restored).sum(axis=1) + 1e-5
    assert (np.abs(Product(tmp_path, emitter, 100)(x) - (x @ restored.T + bias)) <= bound).all()


@pytest.mark.parametrize("bias", [None, 0.25])
def test_a_row_of_zeros_gives_the_bias(bias: float | None, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    channels = round_channels(random.standard_normal((16, 33)).astype(np.float32))
    biases = None if bias is None else np.full(16, bias, np.float32)
    x = random.standard_normal((3, 33)).astype(np.float32)
    x[1] = 0
    for emitter in (RowInt8Linear(channels, biases), StaticInt8Linear(channels, biases, 4.0)):
        y = Product(tmp_path, emitter, 33)(x)
        assert (y[1] == (bias or 0.0)).all()
        assert np.isfinite(y).all()


def test_a_row_scales_with_its_own_largest_value_however_small(tmp_path: Path) -> None:
    x, w = extreme_values(1, 64, 8)
    product = Product(tmp_path, RowInt8Linear(ChannelWeight(w, ones(8), 0.0), None), 64)
    np.testing.assert_allclose(product(x * 1e-30), exact(x, w) * 1e-30, rtol=1e-6)


@pytest.mark.parametrize("kind", ["static", "row", "block"])
def test_a_row_is_the_same_alone_and_in_a_batch(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((96, 200)).astype(np.float32)
    bias = random.standard_normal(96).astype(np.float32)
    emitter: LinearEmitter = {
        "static": StaticInt8Linear(round_channels(weight), bias, 4.0),
        "row": RowInt8Linear(round_channels(weight), bias),
        "block": BlockLinear(round_blocks(weight), 200, bias),
    }[kind]
    product = Product(tmp_path, emitter, 200)
    x = random.standard_normal((67, 200)).astype(np.float32)
    x[5] *= 1000
    alone = np.concatenate([product(x[n : n + 1]) for n in range(len(x))])
    # Blocks are summed up in floating point, in an order that a kernel for several rows may choose anew.
    tolerance = 1e-5 if kind == "block" else 0.0
    for size in (2, 3, 4, 8, 16, 67):
        np.testing.assert_allclose(product(x[:size]), alone[:size], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 8), (33, 5), (40, 16), (96, 33), (200, 3)])
@pytest.mark.parametrize("rows", [1, 5])
def test_block_product(inputs: int, outputs: int, rows: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((outputs, inputs)).astype(np.float32)
    weight[0, :32] *= 100  # one block's scale is nothing to the others
    bias = random.standard_normal(outputs).astype(np.float32)
    x = random.standard_normal((rows, inputs)).astype(np.float32)
    blocks = round_blocks(weight)
    y = Product(tmp_path, BlockLinear(blocks, inputs, bias), inputs)(x)
    restored = (blocks.values.astype(np.float64) - 128) * blocks.scales[..., None]
    padded = np.pad(x, ((0, 0), (0, -inputs % 32))).reshape(rows, -1, 32).astype(np.float64)
    expected = np.einsum("rbi,obi->ro", padded, restored) + bias
    # Activations may be rounded to eight bits in each block.
    steps = np.abs(padded).max(axis=-1) / 127
    bound = 0.501 * np.einsum("rb,obi->ro", steps, np.abs(restored)) + 1e-4
    assert (np.abs(y - expected) <= bound).all()


def test_float_product(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((24, 50)).astype(np.float32)
    bias = random.standard_normal(24).astype(np.float32)
    x = random.standard_normal((5, 50)).astype(np.float32)
    for each in (None, bias):
        y = Product(tmp_path, FloatLinear(Linear(24, 50, lambda: weight, each)), 50)(x)
        np.testing.assert_allclose(y, x @ weight.T + (0 if each is None else each), atol=1e-4)


def test_a_tap_shows_the_input(tmp_path: Path) -> None:
    weight = np.eye(4, dtype=np.float32) * 2
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    product = Product(tmp_path, TappedLinear(FloatLinear(Linear(4, 4, lambda: weight)), 4), 4)
    assert (product(x, "linear.tap") == x).all()
    assert (product(x) == 2 * x).all()
