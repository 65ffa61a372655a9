"""The device's peaks: that the work is done and counted right, never how fast it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from pocketlm import bandwidth
from pocketlm.errors import BundleError
from pocketlm_benchmarks import peaks
from pocketlm_benchmarks.peaks import (
    BoundProduct,
    fp32_product,
    int8_product,
    measure_peaks,
)

SHAPE = (5, 32, 48)


@pytest.mark.parametrize("weights", ["signed", "unsigned"])
def test_the_integer_product(weights: Literal["signed", "unsigned"]) -> None:
    product = int8_product(SHAPE, weights)
    bound = BoundProduct(product, threads=1)
    bound.run()
    random = np.random.default_rng(0)
    weight = random.integers(1, 256, SHAPE[1:], np.uint8).astype(np.int64) - 128
    np.testing.assert_array_equal(bound.y, (product.x.astype(np.int64) - 128) @ weight)


def test_the_float_product() -> None:
    product = fp32_product(SHAPE)
    bound = BoundProduct(product, threads=1)
    bound.run()
    weight = np.random.default_rng(0).standard_normal(SHAPE[1:], np.float32)
    np.testing.assert_allclose(bound.y, product.x @ weight, rtol=1e-4, atol=1e-4)


def test_measures_all_three() -> None:
    calls: list[tuple[str, int, int, str]] = []
    found = measure_peaks(
        2, lambda *call: calls.append(call), seconds_each=0.0, buffer_bytes=1 << 16, shape=SHAPE
    )
    assert found.threads == 2
    for rate in (found.read_bytes_per_s, found.int8_ops_per_s, found.fp32_flops_per_s):
        assert rate is not None
        assert 0 < rate < math.inf
    assert calls == [("Measuring the device", done, 3, "peaks") for done in range(4)]


def test_work_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (peaks, bandwidth):
        monkeypatch.setattr(module, "best_rate", lambda work, run, seconds: work)
    found = measure_peaks(2, seconds_each=0.0, buffer_bytes=1 << 16, shape=SHAPE)
    assert found.read_bytes_per_s == 4 * (1 << 16)  # four passes in one run
    assert found.int8_ops_per_s == found.fp32_flops_per_s == 2 * 5 * 32 * 48


def test_a_product_that_the_runtime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Path, threads: int) -> None:
        raise BundleError("no such operator")

    monkeypatch.setattr(peaks, "open_graph", refuse)
    found = measure_peaks(1, seconds_each=0.0, buffer_bytes=1 << 16, shape=SHAPE)
    assert (found.int8_ops_per_s, found.fp32_flops_per_s) == (None, None)
