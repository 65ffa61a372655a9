"""How many threads a model computes with."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from pocketlm import threads
from pocketlm.errors import InvalidSettingError
from pocketlm.threads import (
    hardware_threads,
    physical_cores,
    processor_name,
    thread_count,
    wanted_threads,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="affinity and /sys are Linux's")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETLM_THREADS", raising=False)


def test_the_argument_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLM_THREADS", "3")
    assert thread_count(5) == 5
    assert thread_count() == 3


@pytest.mark.parametrize("text", [None, ""])
def test_the_physical_cores_by_default(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        monkeypatch.setenv("POCKETLM_THREADS", text)
    monkeypatch.setattr(threads, "physical_cores", lambda: 17)
    assert thread_count() == 17


def test_what_nobody_asks_for_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_threads() is None
    monkeypatch.setenv("POCKETLM_THREADS", "3")
    assert wanted_threads() == 3
    assert wanted_threads(5) == 5


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_counts_out_of_range(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"number of threads is {count}; between 1 and 1024"
    with pytest.raises(InvalidSettingError, match=message):
        thread_count(count)
    monkeypatch.setenv("POCKETLM_THREADS", str(count))
    with pytest.raises(InvalidSettingError, match=message):
        thread_count()


@pytest.mark.parametrize("text", ["many", "2.5", " "])
def test_a_variable_that_is_no_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLM_THREADS", text)
    with pytest.raises(InvalidSettingError, match=f"POCKETLM_THREADS is '{text}'; a whole number"):
        thread_count()


def test_at_least_one_core_and_no_more_than_there_are() -> None:
    assert 1 <= physical_cores() <= hardware_threads() <= (os.cpu_count() or 1)


@linux_only
class TestLinux:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Eight hardware threads on four cores."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
        monkeypatch.setattr(threads, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
        monkeypatch.setattr(threads, "_container_quota", lambda: None)

    @pytest.mark.usefixtures("machine")
    def test_hardware_threads_of_a_core_count_once(self) -> None:
        assert physical_cores() == 4

    @pytest.mark.usefixtures("machine")
    @pytest.mark.parametrize(("allowed", "cores"), [({0}, 1), ({0, 4}, 1), ({0, 1, 4}, 2)])
    def test_affinity(self, allowed: set[int], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
        assert physical_cores() == cores

    @pytest.mark.usefixtures("machine")
    @pytest.mark.parametrize(("quota", "count"), [(None, 8), (0.2, 1), (5.0, 5), (64.0, 8)])
    def test_hardware_threads(self, quota: float | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "_container_quota", lambda: quota)
        assert hardware_threads() == count

    @pytest.mark.usefixtures("machine")
    @pytest.mark.parametrize(("quota", "cores"), [(0.2, 1), (1.0, 1), (1.9, 2), (2.2, 2), (64.0, 4)])
    def test_container_quota(self, quota: float, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "_container_quota", lambda: quota)
        assert physical_cores() == cores

    @pytest.mark.parametrize(
        ("files", "name"),
        [
            ({"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC: 9B14\n"}, "AMD EPYC: 9B14"),
            (
                {"proc/cpuinfo": "BogoMIPS : 1\n", "proc/device-tree/model": "Raspberry Pi 5\0"},
                "Raspberry Pi 5",
            ),
            ({"proc/cpuinfo": "model name :\n"}, "riscv64"),
            ({}, "riscv64"),
        ],
    )
    def test_the_processors_name(
        self, files: dict[str, str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        assert processor_name(tmp_path) == name

    def test_cores_without_topology_are_their_own(self) -> None:
        assert threads._siblings(10**9) == "1000000000"


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1.5),
        ("400000 100000\n", 4.0),
        ("", None),
        ("nonsense", None),
        (None, None),
    ],
)
def test_reading_the_quota(text: str | None, quota: float | None, tmp_path: Path) -> None:
    path = tmp_path / "cpu.max"
    if text is not None:
        path.write_text(text)
    assert threads._container_quota(path) == quota


@pytest.mark.parametrize(("performance", "cores"), [(6, 6), (None, 4), (0, 4)])
def test_macos_counts_performance_cores(
    performance: int | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(threads, "_sysctl", lambda name: performance)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert physical_cores() == cores


@pytest.mark.parametrize(("count", "cores"), [(16, 8), (1, 1), (None, 1)])
def test_elsewhere_two_hardware_threads_make_a_core(
    count: int | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert physical_cores() == cores
    assert hardware_threads() == (count or 1)


@pytest.mark.parametrize(
    ("system", "brand", "processor", "name"),
    [
        ("darwin", "Apple M4", "arm", "Apple M4"),
        ("darwin", None, "arm", "arm"),
        ("win32", None, "Intel64 Family 6", "Intel64 Family 6"),
        ("win32", None, "", "AMD64"),
    ],
)
def test_the_processors_name_elsewhere(
    system: str, brand: str | None, processor: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(threads, "_sysctl_text", lambda name: brand)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    assert processor_name() == name
