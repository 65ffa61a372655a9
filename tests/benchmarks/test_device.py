"""What the machine tells of itself, on trees and records of several machines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helpers.trees import write_tree
from pocketlm.device import Machine, Memory
from pocketlm_benchmarks import device
from pocketlm_benchmarks.device import describe_device, power_source, throttle_count

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys are Linux's")

CPU = "sys/devices/system/cpu"
POWER = "sys/class/power_supply"

LAPTOP_CPUINFO = "\n\n".join(
    f"processor\t: {cpu}\nmodel\t\t: 154\nmodel name\t: 12th Gen Intel(R) Core(TM) i7-1260P\n"
    "microcode\t: 0x435\nflags\t\t: fpu sse4_2 avx avx2 fma f16c avx_vnni avx512_vnnix\nbugs\t\t:"
    for cpu in range(4)
)
LAPTOP = {
    "proc/cpuinfo": LAPTOP_CPUINFO,
    "proc/meminfo": "MemTotal:       16000000 kB\nMemFree:         1000000 kB",
    "proc/sys/kernel/osrelease": "6.8.0-40-generic",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.1 LTS"',
    f"{CPU}/intel_pstate/no_turbo": 0,
    "sys/class/dmi/id/sys_vendor": "LENOVO",
    "sys/class/dmi/id/product_name": "21CBCTO1WW",
    f"{POWER}/AC/type": "Mains",
    f"{POWER}/AC/online": 1,
    f"{POWER}/BAT0/type": "Battery",
    f"{POWER}/BAT0/status": "Charging",
    **{
        f"{CPU}/cpu{cpu}/topology/thread_siblings_list": f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"
        for cpu in range(4)
    },
    **{f"{CPU}/cpufreq/policy{cpu}/scaling_governor": "powersave" for cpu in range(4)},
    **{f"{CPU}/cpu{cpu}/thermal_throttle/core_throttle_count": cpu for cpu in range(4)},
    **{f"{CPU}/cpu{cpu}/thermal_throttle/package_throttle_count": 10 for cpu in range(4)},
}

PI_CPUINFO = (
    "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nFeatures\t: fp asimd aes asimdhp asimddp\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nprocessor\t: 1\nCPU implementer\t: 0x41\n\n"
    "Model\t\t: Raspberry Pi 5 Model B Rev 1.0"
)


@linux_only
class TestLinux:
    def test_a_laptop(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        found = describe_device(write_tree(tmp_path, LAPTOP))
        assert found.processor == "12th Gen Intel(R) Core(TM) i7-1260P"
        assert found.architecture == "x86_64"
        assert found.features == ["sse4_2", "avx", "avx2", "f16c", "fma", "avx_vnni"]
        assert (found.physical_cores, found.logical_cores) == (2, 4)
        assert found.memory_bytes == 16_000_000 << 10
        assert found.system == "Ubuntu 24.04.1 LTS, Linux 6.8.0-40-generic"
        assert found.microcode == "0x435"
        assert found.virtual_machine is None
        assert (found.governor, found.turbo, found.power_source) == ("powersave", True, "mains")
        assert found.thermal_throttles == 0 + 1 + 2 + 3 + 4 * 10
        assert found.versions == {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("pocketlm", "onnxruntime", "numpy")},
        }

    def test_a_board(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        found = describe_device(write_tree(tmp_path, {"proc/cpuinfo": PI_CPUINFO}))
        assert found.processor == "Raspberry Pi 5 Model B Rev 1.0"
        assert found.architecture == "arm64"
        assert found.features == ["asimd", "asimddp"]
        assert (found.physical_cores, found.logical_cores) == (None, 2)
        assert (found.microcode, found.governor, found.turbo) == (None, None, None)
        assert (found.power_source, found.thermal_throttles) == (None, None)

    def test_a_machine_that_tells_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "processor", lambda: "")
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
        found = describe_device(tmp_path)
        assert (found.processor, found.architecture, found.features) == ("riscv64", "riscv64", [])
        assert found.logical_cores == 3
        assert found.memory_bytes == psutil.virtual_memory().total
        assert found.system == f"Linux {platform.release()}"

    def test_this_machine(self) -> None:
        found = describe_device()
        assert found.processor
        assert found.memory_bytes == psutil.virtual_memory().total
        assert found.logical_cores == psutil.cpu_count()
        assert found.physical_cores is None or 1 <= found.physical_cores <= found.logical_cores

    def test_governors_that_differ(self, tmp_path: Path) -> None:
        write_tree(
            tmp_path,
            {
                f"{CPU}/cpufreq/policy0/scaling_governor": "schedutil",
                f"{CPU}/cpufreq/policy4/scaling_governor": "performance",
            },
        )
        assert describe_device(tmp_path).governor == "performance, schedutil"

    @pytest.mark.parametrize(
        ("files", "turbo"),
        [
            ({"intel_pstate/no_turbo": 1}, False),
            ({"intel_pstate/no_turbo": 0}, True),
            ({"cpufreq/boost": 0}, False),
            ({"cpufreq/boost": 1}, True),
            ({"cpufreq/policy0/boost": 0, "cpufreq/policy1/boost": 1}, True),
            ({"cpufreq/policy0/boost": 0}, False),
            ({"cpufreq/boost": "?"}, None),
        ],
    )
    def test_turbo(self, files: dict[str, object], turbo: bool | None, tmp_path: Path) -> None:
        write_tree(tmp_path, {f"{CPU}/{name}": value for name, value in files.items()})
        assert describe_device(tmp_path).turbo is turbo

    @pytest.mark.parametrize(
        ("supplies", "source"),
        [
            ({}, None),
            ({"AC/type": "Mains", "AC/online": 1}, "mains"),
            ({"AC/type": "Mains", "AC/online": 0, "B/type": "Battery", "B/status": "Discharging"}, "battery"),
            # A weak charger: plugged in, though the battery gives too.
            ({"C/type": "USB", "C/online": 1, "B/type": "Battery", "B/status": "Discharging"}, "mains"),
            ({"B/type": "Battery", "B/status": "Full"}, "mains"),
            ({"B/type": "Battery", "B/status": "Discharging"}, "battery"),
            ({"M/type": "Battery", "M/scope": "Device", "M/status": "Discharging"}, None),  # a mouse
            ({"AC/type": "Mains", "AC/online": 0}, None),
        ],
    )
    def test_power_source(self, supplies: dict[str, object], source: str | None, tmp_path: Path) -> None:
        write_tree(tmp_path, {f"{POWER}/{name}": value for name, value in supplies.items()})
        assert power_source(tmp_path) == source

    def test_throttling_counters_that_cannot_be_read(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "?"})
        assert throttle_count(tmp_path) is None


class TestElsewhere:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = Machine("Test Processor", "arm64", ("asimd",), "A System 1.0", "0x1", None)
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(device, "describe_machine", lambda root: found)
        monkeypatch.setattr(device, "memory", lambda root: Memory(None, None))

    def test_cores_memory_and_power(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=False))
        found = describe_device()
        assert (found.processor, found.features, found.microcode) == ("Test Processor", ["asimd"], "0x1")
        assert (found.physical_cores, found.logical_cores, found.power_source) == (4, 8, "battery")
        assert found.memory_bytes == psutil.virtual_memory().total


def test_a_battery_of_which_nobody_knows_the_plug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=None))
    assert power_source() is None


def test_a_package_under_another_name_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = importlib.metadata.version

    def without_onnxruntime(name: str) -> str:
        if name == "onnxruntime":  # onnxruntime-gpu, say
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_onnxruntime)
    assert describe_device(tmp_path).versions.keys() == {"python", "pocketlm", "numpy"}
