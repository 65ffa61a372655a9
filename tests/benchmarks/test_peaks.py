"""The device's peaks: that the work is done and counted right, never how fast it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import psutil
import pytest

from helpers.trees import write_tree
from pocketlm.errors import BundleError
from pocketlm_benchmarks import peaks
from pocketlm_benchmarks.peaks import (
    BoundProduct,
    best_rate,
    buffer_size,
    fp32_product,
    int8_product,
    measure_peaks,
    read_all,
)

SHAPE = (5, 32, 48)


class Clock:
    """Tells the times it was given, one after the other."""

    def __init__(self, *times: float) -> None:
        self._times: Iterator[float] = iter(times)

    def __call__(self) -> float:
        return next(self._times)


def test_the_best_of_at_least_three() -> None:
    runs: list[None] = []
    rate = best_rate(100.0, lambda: runs.append(None), 0.5, Clock(10.0, 12.0, 12.5, 14.0))
    assert rate == 100.0 / 0.5
    assert len(runs) == 1 + 3  # one to warm up


def test_as_many_as_fit_into_the_time() -> None:
    rate = best_rate(8.0, lambda: None, 5.0, Clock(0.0, 1.0, 2.0, 3.0, 4.0, 4.5, 8.0))
    assert rate == 8.0 / 0.5


@pytest.mark.parametrize(("part", "place"), [(0, 0), (0, 999), (2, 500), (2, 999)])
def test_every_byte_is_read(part: int, place: int) -> None:
    parts = [np.ones(1000, np.uint8) for _ in range(3)]
    parts[part][place] = 200
    with ThreadPoolExecutor(3) as pool:
        assert read_all(parts, pool) == 200


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
    monkeypatch.setattr(peaks, "best_rate", lambda work, run, seconds: work)
    found = measure_peaks(2, seconds_each=0.0, buffer_bytes=1 << 16, shape=SHAPE)
    assert found.read_bytes_per_s == 4 * (1 << 16)  # four passes in one run
    assert found.int8_ops_per_s == found.fp32_flops_per_s == 2 * 5 * 32 * 48


def test_a_product_that_the_runtime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Path, threads: int) -> None:
        raise BundleError("no such operator")

    monkeypatch.setattr(peaks, "open_graph", refuse)
    found = measure_peaks(1, seconds_each=0.0, buffer_bytes=1 << 16, shape=SHAPE)
    assert (found.int8_ops_per_s, found.fp32_flops_per_s) == (None, None)


class TestBufferSize:
    @pytest.fixture(autouse=True)
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 << 30))

    def cache(self, cpu: int, level: int, size: str, shared: str) -> dict[str, object]:
        index = f"sys/devices/system/cpu/cpu{cpu}/cache/index{level}"
        return {f"{index}/level": level, f"{index}/size": size, f"{index}/shared_cpu_list": shared}

    def test_without_a_word_of_caches(self, tmp_path: Path) -> None:
        assert buffer_size(tmp_path) == 256 << 20

    def test_four_times_all_caches_of_the_last_level(self, tmp_path: Path) -> None:
        for cpu in range(4):
            write_tree(tmp_path, self.cache(cpu, 2, "2048K", str(cpu)))
            write_tree(tmp_path, self.cache(cpu, 3, "98304K", "0-1" if cpu < 2 else "2-3"))
        assert buffer_size(tmp_path) == 4 * 2 * (96 << 20)

    def test_small_caches(self, tmp_path: Path) -> None:
        assert buffer_size(write_tree(tmp_path, self.cache(0, 2, "512K", "0"))) == 256 << 20

    def test_a_size_that_is_none(self, tmp_path: Path) -> None:
        assert buffer_size(write_tree(tmp_path, self.cache(0, 3, "huge", "0"))) == 256 << 20

    def test_little_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=512 << 20))
        assert buffer_size(tmp_path) == 64 << 20
