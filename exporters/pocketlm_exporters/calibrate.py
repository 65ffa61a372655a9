"""Runs the fp32 graph over a text and collects what quantization has to know about activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocketlm.manifest import GraphIO
from pocketlm.progress import Progress
from pocketlm.session import open_graph
from pocketlm_exporters.decoder import Array, DecoderConfig
from pocketlm_exporters.graph.linear import ZERO_POINT, tap_name
from pocketlm_exporters.quantize.rounding import LEVELS

WINDOW = 256  # tokens that see each other

_RANGES = np.arange(3.0, 6.25, 0.25)


class ActivationStatistics:
    """Of each linear's input, by the linear's path; gathered as rows come by, none are kept."""

    def __init__(self) -> None:
        self.largest: dict[str, Array] = {}
        """The largest magnitude in each channel (inputs)."""
        self._losses: dict[str, NDArray[np.float64]] = {}

    def add(self, path: str, rows: Array) -> None:
        """Takes in `rows` (tokens, inputs) of the linear at `path`."""
        largest = np.abs(rows).max(axis=0)
        self.largest[path] = np.maximum(self.largest.get(path, largest), largest)
        losses = np.array([_rounding_loss(rows, bound) for bound in _RANGES])
        self._losses[path] = self._losses.get(path, np.zeros(len(_RANGES))) + losses

    def best_range(self, path: str) -> float:
        """The fixed range ±r with the least squared error of rounding and clipping together.

        It is looked for between 3 and 6: rows behind the norm of a rotated model are nearly Gaussian with a
        root mean square of one.
        """
        return float(_RANGES[self._losses[path].argmin()])


def calibrate(
    graph: Path,
    config: DecoderConfig,
    io: GraphIO,
    windows: Sequence[Sequence[int]],
    *,
    threads: int,
    progress: Progress,
) -> ActivationStatistics:
    """Statistics over `windows` of a text, see `visit_inputs`."""
    statistics = ActivationStatistics()
    visit_inputs(graph, config, io, windows, statistics.add, threads=threads, progress=progress)
    return statistics


def visit_inputs(
    graph: Path,
    config: DecoderConfig,
    io: GraphIO,
    windows: Sequence[Sequence[int]],
    visit: Callable[[str, Array], None],
    *,
    threads: int,
    progress: Progress,
) -> None:
    """Runs a graph with tapped linears over `windows` of a text, each from an empty context.

    Calls `visit` with the path and the inputs (tokens, inputs) of each linear, window by window.
    """
    session = open_graph(graph, threads)
    taps = [output.name for output in session.get_outputs() if output.name.endswith(tap_name(""))]
    done, total = 0, sum(map(len, windows))
    for window in windows:
        progress("Calibrating", done, total, "tokens")
        for tap, rows in zip(taps, session.run(taps, _feeds(window, config, io)), strict=True):
            visit(tap.removesuffix(tap_name("")), rows.reshape(-1, rows.shape[-1]))
        done += len(window)
    progress("Calibrating", total, total, "tokens")


def _feeds(window: Sequence[int], config: DecoderConfig, io: GraphIO) -> dict[str, NDArray[np.generic]]:
    tokens = len(window)
    empty = np.zeros((1, config.kv_heads, tokens, config.head_dim), np.float32)
    caches = [io.past_key.format(layer=n) for n in range(config.layers)]
    caches += [io.past_value.format(layer=n) for n in range(config.layers)]
    return {
        io.input_ids: np.array([window], np.int64),
        io.past_lengths: np.zeros(1, np.int32),
        io.logit_rows: np.arange(tokens),  # all of them, so that the last layer sees every row
        **dict.fromkeys(caches, empty),
    }


def _rounding_loss(rows: Array, bound: float) -> float:
    step = np.float32(bound / LEVELS)
    rounded = np.clip(np.rint(rows / step), -int(ZERO_POINT), LEVELS) * step
    return float(np.square(rows - rounded).sum(dtype=np.float64))
