"""The linear layers that a decoder can be built from: a precision is a choice of these.

Each takes the builder, an input (rows, inputs) in float32 and its path in the graph, and returns the
output (rows, outputs) in float32. The integer ones compute a row from that row alone, so a result does
not depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from pocketlm_exporters.decoder import Array, Linear
from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder
from pocketlm_exporters.quantize.nibbles import NibbleWeight
from pocketlm_exporters.quantize.rounding import BLOCK, LEVELS, BlockWeight, ChannelWeight

# Quantized activations are uint8 around 128: ONNX Runtime's kernels for signed ones are up to thirty
# times slower.
ZERO_POINT = np.uint8(128)


class LinearEmitter(Protocol):
    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value: ...


@dataclass(frozen=True)
class FloatLinear:
    """float32 weights and activations: the reference."""

    linear: Linear

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        linear = self.linear
        weight = g.lazy(
            f"{path}.weight", ir.DataType.FLOAT, (linear.inputs, linear.outputs), lambda: linear.weight().T
        )
        return _add_bias(g, g.op("MatMul", x, weight, name=path), linear.bias, path)


@dataclass(frozen=True)
class TappedLinear:
    """A linear whose input becomes an output of the graph as well, for calibration to look at."""

    inner: LinearEmitter
    inputs: int

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        name = tap_name(path)
        g.output(g.op("Identity", x, name=name), name, ir.DataType.FLOAT, (None, self.inputs))
        return self.inner(g, x, path)


def tap_name(path: str) -> str:
    """The graph output that shows the input of the linear at `path`."""
    return f"{path}.tap"


@dataclass(frozen=True)
class StaticInt8Linear:
    """Integer product of eight-bit weights per output and activations with one fixed range.

    Only for inputs whose rows are all of one size, as behind a norm.
    """

    weight: ChannelWeight
    bias: Array | None
    activation_range: float  # activations beyond ±range are clipped

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        scale = np.float32(self.activation_range / LEVELS)
        quantized = _quantize(g, x, scale, path)
        return _integer_product(g, quantized, scale, self.weight, self.bias, path)


@dataclass(frozen=True)
class RowInt8Linear:
    """Integer product of eight-bit weights per output and activations scaled row by row.

    A row of zeros divides zero by zero; whatever integer the NaN becomes, the product is multiplied by
    the row's scale, which is zero.
    """

    weight: ChannelWeight
    bias: Array | None

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        magnitude = g.op("Abs", x, name=f"{path}.magnitude")
        axes = g.constant("last_axis", np.array([-1], np.int64))
        largest = g.op("ReduceMax", magnitude, axes, name=f"{path}.largest", keepdims=1)
        if path == "head":  # which may get no rows, and those ONNX Runtime does not reduce to one column
            one_column = g.constant("one_column", np.array([0, 1], np.int64))
            largest = g.op("Reshape", largest, one_column, name=f"{path}.largest_of_rows")
        unit = g.op("Div", x, largest, name=f"{path}.unit")
        scale = np.float32(1 / LEVELS)
        product = _integer_product(g, _quantize(g, unit, scale, path), scale, self.weight, None, path)
        return _add_bias(g, g.op("Mul", product, largest, name=f"{path}.scaled"), self.bias, path)


@dataclass(frozen=True)
class BlockLinear:
    """Eight-bit weights with a scale for each block: finer, and slower where there are many rows."""

    weight: BlockWeight
    inputs: int
    bias: Array | None

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        product = _block_product(g, x, self.weight, self.inputs, path, bits=8)
        return _add_bias(g, product, self.bias, path)


@dataclass(frozen=True)
class NibbleLinear:
    """Four-bit weights with a scale and a zero point for each block: half the bytes of eight bits."""

    weight: NibbleWeight
    inputs: int
    bias: Array | None

    def __call__(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
        zero_points = g.constant(f"{path}.zero_points", self.weight.zero_points.reshape(-1))
        product = _block_product(g, x, self.weight, self.inputs, path, zero_points, bits=4)
        return _add_bias(g, product, self.bias, path)


def _block_product(
    g: GraphBuilder,
    x: ir.Value,
    weight: BlockWeight | NibbleWeight,
    inputs: int,
    path: str,
    *zero_points: ir.Value,
    bits: int,
) -> ir.Value:
    return g.op(
        "MatMulNBits",
        x,
        g.constant(f"{path}.weight", weight.values),
        g.constant(f"{path}.scales", weight.scales.reshape(-1)),
        *zero_points,
        name=path,
        domain=MICROSOFT,
        K=inputs,
        N=len(weight.values),
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,  # eight-bit activations, in blocks too
    )


def _quantize(g: GraphBuilder, x: ir.Value, scale: np.float32, path: str) -> ir.Value:
    zero = g.constant("zero_point", ZERO_POINT)
    return g.op("QuantizeLinear", x, g.constant(f"{path}.range", scale), zero, name=f"{path}.quantized")


def _integer_product(
    g: GraphBuilder,
    quantized: ir.Value,
    scale: np.float32,
    weight: ChannelWeight,
    bias: Array | None,
    path: str,
) -> ir.Value:
    """QGemm, and not MatMulIntegerToFloat, which copies the scales of all columns at each call."""
    values, outputs = weight.values, len(weight.scales)
    if values.dtype == np.uint8:
        zeros = g.constant(f"zero_points.{outputs}", np.full(outputs, ZERO_POINT))
    else:  # not shared: where ONNX Runtime makes weights unsigned, it replaces each node's zero points too
        zeros = g.constant(f"{path}.zero_points", np.zeros(outputs, np.int8))
    product = g.op(
        "QGemm",
        quantized,
        g.constant(f"{path}.range", scale),
        g.constant("zero_point", ZERO_POINT),
        g.constant(f"{path}.weight", values),
        g.constant(f"{path}.scales", weight.scales),
        zeros,
        name=path,
        domain=MICROSOFT,
    )
    return _add_bias(g, product, bias, path)


def _add_bias(g: GraphBuilder, y: ir.Value, bias: Array | None, path: str) -> ir.Value:
    if bias is None:
        return y
    return g.op("Add", y, g.constant(f"{path}.bias", bias), name=f"{path}.biased")
