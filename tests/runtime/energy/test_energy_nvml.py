"""NVIDIA cards, with pynvml played by Python."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from pocketlm.energy import nvml
from pocketlm.energy.nvml import NvmlProbe
from pocketlm.energy.reading import Absent


class FakeNvml:
    """As much of pynvml as is called. A card's counter is millijoules, or a text for an error."""

    class NVMLError(Exception):
        pass

    def __init__(self, *counters_mj: int | str, init: str | None = None) -> None:
        self.counters_mj: list[int | str] = list(counters_mj)
        self.init_error = init
        self.running = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error:
            raise self.NVMLError(self.init_error)
        self.running += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.running -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.counters_mj)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, card: int) -> int:  # noqa: N802
        counter_mj = self.counters_mj[card]
        if isinstance(counter_mj, str):
            raise self.NVMLError(counter_mj)
        return counter_mj


def probe_of(library: FakeNvml) -> NvmlProbe:
    found = nvml.find(lambda: library)
    assert isinstance(found, NvmlProbe)
    return found


def test_cards_are_summed() -> None:
    library = FakeNvml(5_000_000_000_000, 700)
    probe = probe_of(library)
    window = probe.begin()
    library.counters_mj = [5_000_000_012_500, 1_200]
    reading = window.end()
    assert reading.energy_j == pytest.approx(13.0)
    assert reading.parts_j == pytest.approx({"gpu0": 12.5, "gpu1": 0.5})
    assert (reading.source, reading.scope, reading.kind, reading.flags) == ("nvml", "gpu", "measured", ())


def test_duration_is_the_clocks() -> None:
    library = FakeNvml(0)
    times = iter([10.0, 14.0])
    window = NvmlProbe(library, {"gpu0": 0}, clock=lambda: next(times)).begin()
    library.counters_mj = [8_000]
    reading = window.end()
    assert (reading.duration_s, reading.power_w) == (4.0, 2.0)


def test_windows_overlap() -> None:
    library = FakeNvml(0)
    probe = probe_of(library)
    outer = probe.begin()
    library.counters_mj = [1_000]
    inner = probe.begin()
    library.counters_mj = [3_000]
    assert inner.end().energy_j == pytest.approx(2)
    library.counters_mj = [4_000]
    assert outer.end().energy_j == pytest.approx(4)


def test_a_card_that_does_not_count_is_left_out_and_named() -> None:
    library = FakeNvml("Not Supported", 10)
    probe = probe_of(library)
    window = probe.begin()
    library.counters_mj = ["Not Supported", 20]
    reading = window.end()
    assert dict(reading.parts_j) == pytest.approx({"gpu1": 0.01})
    assert reading.flags == ("gpu0 does not count its energy (Not Supported)",)


@pytest.mark.parametrize("moment", ["start", "end"])
def test_a_card_that_is_lost(moment: str) -> None:
    library = FakeNvml(10)
    probe = probe_of(library)
    if moment == "start":
        library.counters_mj = ["GPU is lost"]
    window = probe.begin()
    library.counters_mj = [20] if moment == "start" else ["GPU is lost"]
    reading = window.end()
    assert (reading.energy_j, reading.reason) == (None, "NVML fails: GPU is lost")


def test_a_counter_that_goes_back() -> None:
    library = FakeNvml(10_000)
    window = probe_of(library).begin()
    library.counters_mj = [40]
    reading = window.end()
    assert reading.energy_j is None
    assert reading.reason == "a card's counter went back; was its driver loaded anew?"


def test_a_window_too_short_for_the_counter() -> None:
    window = probe_of(FakeNvml(10)).begin()
    reading = window.end()
    assert reading.energy_j is None
    assert str(reading.reason).startswith("no card refreshed its counter")


def test_close_shuts_nvml_down() -> None:
    library = FakeNvml(10)
    probe = probe_of(library)
    assert library.running == 1
    probe.close()
    assert library.running == 0


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (FakeNvml(), "there is no NVIDIA card here"),
        (FakeNvml("Not Supported"), "gpu0 does not count its energy (Not Supported)"),
        (
            FakeNvml(init="NVML Shared Library Not Found"),
            "no NVIDIA driver answers: NVML Shared Library Not Found",
        ),
    ],
)
def test_absent(library: FakeNvml, reason: str) -> None:
    assert nvml.find(lambda: library) == Absent("nvml", reason)
    assert library.running == 0


def test_a_driver_that_lists_no_cards() -> None:
    class Unlisted(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:  # noqa: N802
            raise self.NVMLError("Insufficient Permissions")

    library = Unlisted(1)
    assert nvml.find(lambda: library) == Absent("nvml", "NVML lists no cards: Insufficient Permissions")
    assert library.running == 0


def test_the_package_is_missing() -> None:
    def load() -> Any:
        raise ModuleNotFoundError("No module named 'pynvml'")

    found = nvml.find(load)
    assert isinstance(found, Absent)
    assert found.remedy == "pip install nvidia-ml-py"


def test_the_default_loads_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(3)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert isinstance(nvml.find(), NvmlProbe)
