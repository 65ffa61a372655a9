"""What the device can do at most: reading memory, multiplying matrices. A few seconds in all.

Each figure is the best of many repetitions, as in STREAM (McCalpin, 1995): whatever else runs can only slow
one down, and each takes milliseconds, so none is fast by chance. The matrix products are the nodes that
bundles are made of, run by ONNX Runtime with the options that bundles run with: a peak that the same kernels
cannot reach would say nothing about the model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil
from numpy.typing import NDArray

from pocketlm.errors import BundleError
from pocketlm.progress import Progress, silent
from pocketlm.session import open_graph
from pocketlm_benchmarks.system import read_text
from pocketlm_exporters.graph.builder import MICROSOFT, GraphBuilder
from pocketlm_exporters.graph.linear import ZERO_POINT
from pocketlm_exporters.processor import WeightBytes, weight_bytes

Bytes = NDArray[np.uint8]

SECONDS_EACH = 0.8
_LEAST_REPETITIONS = 3

_LEAST_BUFFER = 256 << 20
_CACHE_FOLD = 4  # how many times larger than all last-level caches together the buffer is
_MEMORY_SHARE = 8  # the buffer takes an eighth of the memory that is free at most
_PASSES = 4  # over the buffer in one run, so that handing it to the threads does not count

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
    seconds_each: float = SECONDS_EACH,
    buffer_bytes: int | None = None,
    shape: tuple[int, int, int] = SHAPE,
) -> Peaks:
    """Reads memory and multiplies (rows, inputs) by (inputs, outputs), each for `seconds_each` or longer.

    `buffer_bytes` is by default far more than the caches hold. Raises MemoryError without memory for it.
    """
    task, total = "Measuring the device", 3
    progress(task, 0, total, "peaks")
    read = _read_rate(threads, buffer_bytes or buffer_size(), seconds_each)
    progress(task, 1, total, "peaks")
    int8 = _matrix_rate(int8_product, shape, threads, seconds_each)
    progress(task, 2, total, "peaks")
    fp32 = _matrix_rate(fp32_product, shape, threads, seconds_each)
    progress(task, total, total, "peaks")
    return Peaks(threads, read, int8, fp32)


def best_rate(
    work: float, run: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Units of `work` a second in the fastest of the runs that fit into `seconds`, three at least.

    One more comes before them, to warm up: threads, pages, frequency.
    """
    run()
    shortest, repetitions, begun = float("inf"), 0, clock()
    end = begun + seconds
    while repetitions < _LEAST_REPETITIONS or begun < end:
        run()
        now = clock()
        shortest, begun, repetitions = min(shortest, now - begun), now, repetitions + 1
    return work / shortest


def buffer_size(root: Path = Path("/")) -> int:
    """Bytes to read so that the caches do not matter; a smaller machine's memory bounds them."""
    caches: dict[tuple[str | None, str | None], int] = {}
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        if (size := _cache_bytes(read_text(index / "size"))) is not None:
            caches[read_text(index / "level"), read_text(index / "shared_cpu_list")] = size
    last = max((level or "" for level, _ in caches), default="")
    cached = sum(size for (level, _), size in caches.items() if level == last)
    wanted = max(_LEAST_BUFFER, _CACHE_FOLD * cached)
    return min(wanted, int(psutil.virtual_memory().available) // _MEMORY_SHARE)


def _cache_bytes(text: str | None) -> int | None:
    """A size as Linux writes it: 512K."""
    number = (text or "").removesuffix("K")
    return int(number) << 10 if number.isdecimal() else None


def read_all(parts: Sequence[Bytes], pool: ThreadPoolExecutor, passes: int = _PASSES) -> int:
    """The largest byte of all parts, each read `passes` times by a thread of its own.

    NumPy's maximum of bytes is vectorized on every processor, costs next to nothing beside the reading, and
    lets go of the interpreter's lock.
    """
    return max(pool.map(lambda part: max(int(part.max()) for _ in range(passes)), parts))


def _read_rate(threads: int, size: int, seconds: float) -> float:
    """Bytes a second."""
    with ThreadPoolExecutor(threads) as pool:
        # Written, as memory that never was is one page of zeros; and by the threads, so that the system puts
        # it near them where memory has places.
        parts = list(pool.map(lambda _: np.ones(size // threads, np.uint8), range(threads)))
        work = _PASSES * sum(part.nbytes for part in parts)
        return best_rate(work, lambda: read_all(parts, pool), seconds)


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
