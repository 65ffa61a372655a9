"""Apple's counters, with zeus-apple-silicon played by Python."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pocketlm.energy import apple
from pocketlm.energy.apple import AppleProbe
from pocketlm.energy.powermetrics import MODEL, WITHOUT_MEMORY, PowermetricsProbe
from pocketlm.energy.reading import Absent

FIELDS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "ane_mj", "dram_mj")


class Monitor:
    """AppleEnergyMonitor: counters in mJ, windows by key, errors as its C++ has them."""

    def __init__(self, **counters_mj: int | None) -> None:
        self.counters_mj = dict.fromkeys(FIELDS) | counters_mj
        self.windows: dict[str, dict[str, int | None]] = {}

    def begin_window(self, key: str) -> None:
        if key in self.windows:
            raise RuntimeError("Measurement with specified key already exists.")
        self.windows[key] = dict(self.counters_mj)

    def end_window(self, key: str) -> Any:
        if key not in self.windows:
            raise RuntimeError("No measurement with provided key had been started.")
        before = self.windows.pop(key)
        used: dict[str, int | None] = {}
        for name, now in self.counters_mj.items():
            then = before[name]
            used[name] = None if now is None or then is None else now - then
        return SimpleNamespace(**used)

    def use(self, **millijoules: int) -> None:
        for name, value in millijoules.items():
            self.counters_mj[name] = (self.counters_mj[name] or 0) + value


def zeus(monitor: Monitor) -> Any:
    return lambda: SimpleNamespace(AppleEnergyMonitor=lambda: monitor)


def test_parts_and_total() -> None:
    monitor = Monitor(cpu_total_mj=10, gpu_mj=10, gpu_sram_mj=10, ane_mj=10, dram_mj=10)
    times = iter([5.0, 9.0])
    window = AppleProbe(monitor, lambda: next(times)).begin()
    monitor.use(cpu_total_mj=30_000, gpu_mj=2_000, gpu_sram_mj=100, ane_mj=0, dram_mj=4_000)
    reading = window.end()
    assert reading.energy_j == pytest.approx(36.0)
    assert reading.power_w == pytest.approx(9.0)
    assert reading.parts_j == pytest.approx({"cpu": 30, "gpu": 2, "gpu_sram": 0.1, "ane": 0, "dram": 4})
    assert (reading.source, reading.scope, reading.kind) == ("apple", "soc", "measured")
    assert reading.flags == (MODEL,)


def test_fields_that_a_chip_lacks() -> None:
    monitor = Monitor(cpu_total_mj=0, gpu_mj=0)
    window = AppleProbe(monitor).begin()
    monitor.use(cpu_total_mj=1_500, gpu_mj=500)
    reading = window.end()
    assert reading.energy_j == pytest.approx(2.0)
    assert dict(reading.parts_j) == {"cpu": 1.5, "gpu": 0.5}
    assert reading.flags == (MODEL, WITHOUT_MEMORY)


def test_windows_overlap() -> None:
    monitor = Monitor(cpu_total_mj=0)
    probe = AppleProbe(monitor)
    outer = probe.begin()
    monitor.use(cpu_total_mj=1_000)
    inner = probe.begin()
    monitor.use(cpu_total_mj=2_000)
    assert (inner.end().energy_j, outer.end().energy_j) == (2.0, 3.0)
    assert not monitor.windows
    probe.close()


def test_no_field_at_all() -> None:
    reading = AppleProbe(Monitor()).begin().end()
    assert (reading.energy_j, reading.reason) == (None, "macOS gives no energy of the processor here")


def test_a_processor_that_uses_nothing_is_not_believed() -> None:
    monitor = Monitor(cpu_total_mj=77, gpu_mj=0)
    times = iter([0.0, 30.0])
    window = AppleProbe(monitor, lambda: next(times)).begin()
    monitor.use(gpu_mj=500)
    reading = window.end()
    assert reading.energy_j is None
    assert str(reading.reason).startswith("the processor's counter did not move in 30 s")


def test_a_start_that_fails() -> None:
    monitor = Monitor(cpu_total_mj=0)
    monitor.windows["pocketlm-0"] = {}
    reading = AppleProbe(monitor).begin().end()
    assert reading.energy_j is None
    assert str(reading.reason).startswith("the counters could not be read at the start: Measurement with")


def test_an_end_that_fails() -> None:
    monitor = Monitor(cpu_total_mj=0)
    window = AppleProbe(monitor).begin()
    monitor.windows.clear()
    reading = window.end()
    assert reading.energy_j is None
    assert str(reading.reason).startswith("the counters could not be read at the end: No measurement")


def test_find() -> None:
    found = apple.find(zeus(Monitor()), platform="darwin")
    assert isinstance(found, AppleProbe)


def test_the_default_loads_zeus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", zeus(Monitor())())
    assert isinstance(apple.find(platform="darwin"), AppleProbe)


def test_elsewhere() -> None:
    assert apple.find(platform="linux") == Absent("apple", "Apple's energy counters are a part of macOS")


def no_zeus() -> Any:
    raise ModuleNotFoundError("No module named 'zeus_apple_silicon'")


def no_counters() -> Any:
    def fail() -> Any:
        raise RuntimeError("Failed to create IOReport subscription.")

    return SimpleNamespace(AppleEnergyMonitor=fail)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (no_zeus, "the package zeus-apple-silicon is not installed"),
        (no_counters, "zeus-apple-silicon finds no energy counters: Failed to create IOReport subscription."),
    ],
)
@pytest.mark.parametrize(("is_root", "has_tool"), [(False, True), (True, False), (True, True)])
def test_powermetrics_for_root_only(
    load: Any, reason: str, is_root: bool, has_tool: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: has_tool and path == "/usr/bin/powermetrics")
    found = apple.find(load, lambda: is_root, "darwin")
    if is_root and has_tool:
        assert isinstance(found, PowermetricsProbe)
    else:
        assert found == Absent("apple", reason, apple.INSTALL)
