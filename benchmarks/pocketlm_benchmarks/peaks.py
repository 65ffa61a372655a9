"""What the device can do at most: reading memory, multiplying matrices. A few seconds in all.

Each figure is the best of many repetitions, see `pocketlm.bandwidth`. The matrix products are the nodes that
bundles are made of, run by ONNX Runtime with the options that bundles run with: a peak that the same kernels
cannot reach would say nothing about the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pocketlm.bandwidth import SECONDS, best_rate, read_rate
from pocketlm.errors import BundleError
from pocketlm.progress import Progress, silent
from pocketlm.session import open_graph
from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder
from pocketlm_exporters.graph.linear import ZERO_POINT
from pocketlm_exporters.processor import WeightBytes, weight_bytes

# Rows of a long prompt's chunks, inputs and outputs of a large linear.
SHAPE = (512, 2048, 4096)


@dataclass(frozen=True)
class Peaks:
    """The best rates of `threads` threads together."""

    threads: int
    read_bytes_per_s: float
    int8_ops_per_s: float | None  # None where ONNX Runtime refuses the product
    fp32_flops_per_s: float | None


def measure_peaks(
    threads: int,
    progress: Progress = silent,
    *,
    seconds_each: float = SECONDS,
    buffer_bytes: int | None = None,
    shape: tuple[int, int, int] = SHAPE,
) -> Peaks:
    """Reads memory and multiplies (rows, inputs) by (inputs, outputs), each for `seconds_each` or longer.

    `buffer_bytes` is by default far more than the caches hold. Raises MemoryError without memory for it.
    """
    task, total = "Measuring the device", 3
    progress(task, 0, total, "peaks")
    read = read_rate(threads, buffer_bytes, seconds_each)
    progress(task, 1, total, "peaks")
    int8 = _matrix_rate(int8_product, shape, threads, seconds_each)
    progress(task, 2, total, "peaks")
    fp32 = _matrix_rate(fp32_product, shape, threads, seconds_each)
    progress(task, total, total, "peaks")
    return Peaks(threads, read, int8, fp32)


@dataclass(frozen=True)
class Product:
    """A graph of one matrix product, (rows, inputs) × (inputs, outputs), and an input `x` for it."""

    graph: GraphBuilder
    x: NDArray[Any]
    outputs: int


def int8_product(shape: tuple[int, int, int], weights: WeightBytes | None = None) -> Product:
    """Unsigned activations around 128 by weights as this machine likes them, with all scales one."""
    rows, inputs, outputs = shape
    random = np.random.default_rng(0)
    weight = random.integers(1, 256, (inputs, outputs), np.uint8)
    unsigned = (weights or weight_bytes()) == "unsigned"
    g = GraphBuilder("int8")
    x = g.input("x", ir.DataType.UINT8, (rows, inputs))
    weight_zero = np.full(outputs, ZERO_POINT) if unsigned else np.zeros(outputs, np.int8)
    y = g.op(
        "QGemm",
        x,
        g.constant("range", np.float32(1)),
        g.constant("zero_point", ZERO_POINT),
        g.constant("weight", weight if unsigned else (weight ^ ZERO_POINT).view(np.int8)),
        g.constant("scales", np.ones(outputs, np.float32)),
        g.constant("weight_zero_points", weight_zero),
        name="product",
        domain=MICROSOFT,
    )
    g.output(y, "y", ir.DataType.FLOAT, (rows, outputs))
    return Product(g, random.integers(1, 256, (rows, inputs), np.uint8), outputs)


def fp32_product(shape: tuple[int, int, int]) -> Product:
    """All in float32."""
    rows, inputs, outputs = shape
    random = np.random.default_rng(0)
    g = GraphBuilder("fp32")
    x = g.input("x", ir.DataType.FLOAT, (rows, inputs))
    weight = g.constant("weight", random.standard_normal((inputs, outputs), np.float32))
    g.output(g.op("MatMul", x, weight, name="product"), "y", ir.DataType.FLOAT, (rows, outputs))
    return Product(g, random.standard_normal((rows, inputs), np.float32), outputs)


class BoundProduct:
    """A product that is ready to run, in `threads` threads.

    Raises BundleError if ONNX Runtime refuses the graph.
    """

    def __init__(self, product: Product, threads: int) -> None:
        with tempfile.TemporaryDirectory(
            ignore_cleanup_errors=True
        ) as folder:  # Windows keeps what is mapped
            product.graph.save(Path(folder), "product.onnx", "product.onnx.data")
            self._session = open_graph(Path(folder) / "product.onnx", threads)
        self._x = product.x
        self.y = np.empty((len(product.x), product.outputs), np.float32)
        # A new output each time would count the system's handing out of pages as arithmetic.
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("x", self._x)
        self._binding.bind_output("y", "cpu", 0, np.float32, self.y.shape, self.y.ctypes.data)

    def run(self) -> None:
        """Writes x × weight to `y` (rows, outputs)."""
        self._session.run_with_iobinding(self._binding)


def _matrix_rate(
    make: Callable[[tuple[int, int, int]], Product], shape: tuple[int, int, int], threads: int, seconds: float
) -> float | None:
    """Multiplications and additions a second; None if ONNX Runtime refuses the graph."""
    rows, inputs, outputs = shape
    try:
        product = BoundProduct(make(shape), threads)
    except BundleError:
        return None
    return best_rate(2 * rows * inputs * outputs, product.run, seconds)
