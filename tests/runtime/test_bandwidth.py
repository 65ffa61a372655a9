"""How fast memory is read: that the work is done and counted right, never how fast it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.trees import write_tree
from pocketlm import bandwidth
from pocketlm.bandwidth import best_rate, buffer_size, read_all, read_rate
from pocketlm.device import Memory


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


def test_a_rate() -> None:
    assert 0 < read_rate(2, buffer_bytes=1 << 16, seconds=0.0) < math.inf


def test_all_passes_of_all_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "best_rate", lambda work, run, seconds: work)
    assert read_rate(2, buffer_bytes=1 << 16) == 4 * (1 << 16)


class TestBufferSize:
    @pytest.fixture(autouse=True)
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bandwidth, "memory", lambda root: Memory(None, 64 << 30))

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
        monkeypatch.setattr(bandwidth, "memory", lambda root: Memory(1 << 30, 512 << 20))
        assert buffer_size(tmp_path) == 64 << 20

    def test_memory_that_the_system_does_not_tell(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bandwidth, "memory", lambda root: Memory(None, None))
        assert buffer_size(tmp_path) == 256 << 20
