"""The estimate from processor time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.powercap import Clock, add_cores, add_cpuinfo, add_zone
from pocketlm.energy import estimate
from pocketlm.energy.estimate import CpuEstimate, process_cpu_seconds, virtual_machine
from pocketlm.energy.reading import Reading
from pocketlm.errors import InvalidSettingError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETLM_TDP_W", raising=False)


def measure(used_s: float, seconds: float, **settings: object) -> Reading:
    """A window of so many seconds in which the process uses so many CPU seconds."""
    clock, used = Clock(), [7.0]
    probe = CpuEstimate(lambda: used[0], clock=clock, **settings)  # type: ignore[arg-type]
    window = probe.begin()
    clock.now_s += seconds
    used[0] += used_s
    reading = window.end()
    probe.close()
    return reading


def test_without_a_tdp() -> None:
    reading = measure(4.0, 2.0)
    assert (reading.energy_j, reading.low_j, reading.high_j) == pytest.approx((20, 6, 60))
    assert (reading.source, reading.scope, reading.kind) == ("cpu-time", "process", "estimated")
    assert reading.duration_s == 2
    assert reading.flags == (
        "estimated from processor time at 5 W a core",
        "the processor's TDP is unknown; POCKETLM_TDP_W tells it",
    )


def test_with_a_tdp_on_bare_metal() -> None:
    reading = measure(2.0, 2.0, tdp_w=40.0, cores=4)
    assert (reading.energy_j, reading.low_j, reading.high_j) == pytest.approx((20, 10, 30))
    assert reading.flags == ("estimated from processor time at 10 W a core",)


def test_with_a_tdp_in_a_virtual_machine() -> None:
    reading = measure(2.0, 2.0, tdp_w=40.0, cores=4, virtual=True)
    assert (reading.energy_j, reading.low_j, reading.high_j) == pytest.approx((20, 6, 60))
    assert reading.flags[1:] == ("a virtual machine: which processor serves it, and with whom, is unknown",)


def test_watts_per_core_that_the_caller_knows() -> None:
    reading = measure(2.0, 2.0, watts_per_core=2.5)
    assert (reading.energy_j, reading.high_j) == pytest.approx((5, 15))
    assert measure(2.0, 2.0, watts_per_core=2.5, tdp_w=100.0).energy_j == pytest.approx(5)


@settings(deadline=None)
@given(
    used_s=st.floats(-10, 1000), seconds=st.floats(0, 100), tdp_w=st.floats(1, 500), cores=st.integers(1, 256)
)
def test_never_below_nothing_nor_above_the_tdp(
    used_s: float, seconds: float, tdp_w: float, cores: int
) -> None:
    reading = measure(used_s, seconds, tdp_w=tdp_w, cores=cores)
    assert reading.energy_j is not None
    assert reading.low_j is not None
    assert reading.high_j is not None
    assert 0 <= reading.low_j <= reading.energy_j <= reading.high_j <= tdp_w * reading.duration_s


def test_the_resolution_is_a_tick() -> None:
    probe = CpuEstimate(lambda: 0.0, watts_per_core=3.0)
    assert probe.resolution_j == pytest.approx(3.0 / os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_process_that_is_gone(fails_at: int) -> None:
    values: list[float | Exception] = [1.0, 1.0]
    values[fails_at] = ProcessLookupError("no process 12")

    def cpu_seconds() -> float:
        value = values.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    reading = CpuEstimate(cpu_seconds, clock=Clock()).begin().end()
    assert reading.energy_j is None
    assert reading.reason == (
        "the processor time of the process could not be read (ProcessLookupError: no process 12)"
    )


@pytest.mark.parametrize("name", ["watts_per_core", "tdp_w", "cores"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InvalidSettingError, match=rf"{name} is {value}; a number above 0 is expected"):
        CpuEstimate(lambda: 0.0, **{name: value})  # type: ignore[arg-type]


def test_a_tdp_without_cores() -> None:
    with pytest.raises(InvalidSettingError, match=r"tdp_w is 15 and cores is missing\. Give cores"):
        CpuEstimate(lambda: 0.0, tdp_w=15.0)


class TestFind:
    def test_a_machine_that_tells_nothing(self, tmp_path: Path) -> None:
        probe = estimate.find(root=tmp_path)
        assert (probe.tdp_w, probe.watts_per_core, probe.virtual) == (None, 5.0, False)

    def test_the_variable_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_TDP_W", "28")
        add_zone(tmp_path, "intel-rapl:0", "package-0", limits_uw={"max_power_uw": 15_000_000})
        add_cores(tmp_path, ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"])
        probe = estimate.find(lambda: 3.0, tmp_path)
        assert (probe.tdp_w, probe.watts_per_core) == (28.0, 7.0)

    @pytest.mark.parametrize("text", ["much", "0", "-15", "nan", "inf", "15 W"])
    def test_a_wrong_variable(self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_TDP_W", text)
        with pytest.raises(InvalidSettingError, match=f"POCKETLM_TDP_W is '{text}'; the processor's TDP"):
            estimate.find(root=tmp_path)

    @pytest.mark.parametrize(
        ("limits_uw", "tdp_w"),
        [
            ({"max_power_uw": 15_000_000, "power_limit_uw": 25_000_000}, 15.0),
            ({"max_power_uw": 0, "power_limit_uw": 25_000_000}, 25.0),
            ({"power_limit_uw": 4_095_875_000}, None),  # "no limit"
            ({"max_power_uw": -1}, None),
            ({}, None),
        ],
    )
    def test_what_the_zones_say(self, limits_uw: dict[str, int], tdp_w: float | None, tmp_path: Path) -> None:
        add_zone(tmp_path, "intel-rapl:0", "package-0", limits_uw=limits_uw)
        add_zone(tmp_path, "intel-rapl:0:0", "dram", limits_uw={"max_power_uw": 7_000_000})
        add_zone(tmp_path, "intel-rapl:1", "psys", limits_uw={"max_power_uw": 60_000_000})
        for twin in ("intel-rapl-mmio:0", "intel-rapl:2"):
            add_zone(tmp_path, twin, "package-0", limits_uw=limits_uw)
        assert estimate.find(root=tmp_path).tdp_w == tdp_w

    def test_packages_are_summed_and_share_the_cores(self, tmp_path: Path) -> None:
        for number in (0, 1):
            add_zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", limits_uw={"max_power_uw": 10**8})
        add_cores(tmp_path, [str(cpu) for cpu in range(8)])
        probe = estimate.find(root=tmp_path)
        assert (probe.tdp_w, probe.watts_per_core) == (200.0, 25.0)

    def test_a_package_that_does_not_tell_leaves_the_sum_unknown(self, tmp_path: Path) -> None:
        add_zone(tmp_path, "intel-rapl:0", "package-0", limits_uw={"max_power_uw": 10**8})
        add_zone(tmp_path, "intel-rapl:1", "package-1")
        assert estimate.find(root=tmp_path).tdp_w is None

    def test_in_a_virtual_machine(self, tmp_path: Path) -> None:
        add_cpuinfo(tmp_path, flags="fpu hypervisor")
        assert estimate.find(root=tmp_path).virtual


class TestVirtualMachine:
    @pytest.mark.parametrize(
        ("flags", "virtual"), [("fpu hypervisor avx", True), ("fpu avx", False), ("fpu hypervisors", False)]
    )
    def test_the_flag_of_the_first_processor(self, flags: str, virtual: bool, tmp_path: Path) -> None:
        add_cpuinfo(tmp_path, flags=flags)
        assert virtual_machine(tmp_path) is virtual

    @pytest.mark.parametrize("node", ["proc/device-tree/hypervisor/compatible", "sys/hypervisor/type"])
    def test_the_nodes(self, node: str, tmp_path: Path) -> None:
        assert not virtual_machine(tmp_path)
        (tmp_path / node).parent.mkdir(parents=True)
        (tmp_path / node).write_text("xen")
        assert virtual_machine(tmp_path)


class TestProcessCpuSeconds:
    def test_this_process(self) -> None:
        for pid in (None, os.getpid()):
            assert process_cpu_seconds(pid, platform="win32") is time.process_time

    def test_another_process(self, tmp_path: Path) -> None:
        (tmp_path / "proc/12").mkdir(parents=True)
        stat = tmp_path / "proc/12/stat"
        ticks = os.sysconf("SC_CLK_TCK")
        name = ") R 9 9 (a b)"
        stat.write_text(
            f"12 ({name}) S 1 12 12 0 -1 4194560 5 6 7 8 {3 * ticks} {ticks} 99 98 20 0 4 0 1 2\n"
        )
        seconds = process_cpu_seconds(12, root=tmp_path, platform="linux")
        assert seconds() == pytest.approx(4.0)
        stat.unlink()
        with pytest.raises(FileNotFoundError):
            seconds()

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
    def test_a_real_process(self) -> None:
        work = "total = sum(range(4_000_000)); print('done', flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            assert process_cpu_seconds(child.pid)() > 0
            child.communicate(b"\n")

    @pytest.mark.parametrize("platform", ["darwin", "win32"])
    def test_another_process_elsewhere(self, platform: str) -> None:
        with pytest.raises(
            InvalidSettingError, match=f"process 12 cannot be read on {platform}, only that of"
        ):
            process_cpu_seconds(12, platform=platform)
