"""What the machine tells of itself, on trees and records of several machines."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from helpers.trees import write_tree
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
JETSON_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16 sve\nCPU implementer\t: 0x41"


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

    def test_a_board_that_only_its_device_tree_names(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"proc/cpuinfo": JETSON_CPUINFO})
        write_tree(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"})
        found = describe_device(tmp_path)
        assert found.processor == "NVIDIA Jetson Orin Nano"
        assert found.features == ["asimd", "i8mm", "bf16", "sve"]

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
        ("files", "hypervisor"),
        [
            ({}, "unknown"),
            ({"sys/class/dmi/id/sys_vendor": "QEMU"}, "QEMU"),
            ({"sys/class/dmi/id/sys_vendor": "VMware, Inc."}, "VMware"),
            ({"sys/class/dmi/id/sys_vendor": "Amazon EC2"}, "Amazon EC2"),
            ({"sys/class/dmi/id/product_name": "Google Compute Engine"}, "Google Compute Engine"),
            (
                {
                    "sys/class/dmi/id/sys_vendor": "Microsoft Corporation",
                    "sys/class/dmi/id/product_name": "Virtual Machine",
                },
                "Hyper-V",
            ),
            ({"sys/hypervisor/type": "xen"}, "Xen"),
            ({"proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2"}, "WSL"),
        ],
    )
    def test_hypervisors_behind_the_flag(
        self, files: dict[str, object], hypervisor: str, tmp_path: Path
    ) -> None:
        write_tree(tmp_path, {"proc/cpuinfo": "processor : 0\nflags : fpu hypervisor avx2", **files})
        assert describe_device(tmp_path).virtual_machine == hypervisor

    @pytest.mark.parametrize(
        ("files", "hypervisor"),
        [
            ({"proc/device-tree/hypervisor/compatible": "linux,kvm\0"}, "KVM"),
            ({"sys/class/dmi/id/product_name": "KVM Virtual Machine"}, "KVM"),
            (
                {"sys/class/dmi/id/product_name": "Apple Virtualization Generic Platform"},
                "Apple Virtualization",
            ),
            ({"sys/class/dmi/id/sys_vendor": "Amazon EC2"}, None),  # a bare-metal instance
            ({"sys/class/dmi/id/sys_vendor": "Microsoft Corporation"}, None),  # a Surface
            ({"sys/class/dmi/id/sys_vendor": "Google"}, None),  # a Chromebook
        ],
    )
    def test_hypervisors_without_a_flag(
        self, files: dict[str, object], hypervisor: str | None, tmp_path: Path
    ) -> None:
        write_tree(tmp_path, {"proc/cpuinfo": JETSON_CPUINFO, **files})
        assert describe_device(tmp_path).virtual_machine == hypervisor

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


SYSCTL = """hw.ncpu: 8
hw.model: MacBookAir10,1
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 0
hw.optional.arm.FEAT_BF16: 0
machdep.cpu.brand_string: Apple M1
kern.hv_vmm_present: {}"""


class TestMacos:
    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
        """What programs print, by name; to be filled."""
        printed: dict[str, str | None] = {}
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        monkeypatch.setattr(platform, "processor", lambda: "arm")
        monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
        monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=False))
        monkeypatch.setattr(device, "command_output", lambda command: printed.get(Path(command[0]).name))
        return printed

    def test_apple_silicon(self, commands: dict[str, str | None]) -> None:
        commands["sysctl"] = SYSCTL.format(0)
        found = describe_device()
        assert (found.processor, found.architecture, found.system) == ("Apple M1", "arm64", "macOS 15.1")
        assert found.features == ["asimd", "asimddp"]
        assert found.physical_cores == 4
        assert (found.virtual_machine, found.microcode, found.power_source) == (None, None, "battery")

    def test_a_virtual_machine(self, commands: dict[str, str | None]) -> None:
        commands["sysctl"] = SYSCTL.format(1)
        assert describe_device().virtual_machine == "unknown"

    def test_without_sysctl(self, commands: dict[str, str | None]) -> None:
        commands["sysctl"] = None
        found = describe_device()
        assert (found.processor, found.features, found.virtual_machine) == ("arm", [], None)


class TestWindows:
    @pytest.fixture(autouse=True)
    def windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(platform, "machine", lambda: "AMD64")
        monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
        monkeypatch.setattr(platform, "system", lambda: "Windows")
        monkeypatch.setattr(platform, "version", lambda: "10.0.22631")
        monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=True))
        present = SimpleNamespace(IsProcessorFeaturePresent=lambda number: number in {38, 39, 40})
        monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=present), raising=False)

    @pytest.fixture
    def registry(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
        """Values by the last part of their key; to be filled."""
        keys: dict[str, dict[str, Any]] = {}

        class Key:
            def __init__(self, hive: str, path: str) -> None:
                if (name := path.rpartition("\\")[2]) not in keys:
                    raise FileNotFoundError(path)
                self.entries = list(keys[name].items())

            def __enter__(self) -> Key:
                return self

            def __exit__(self, *error: object) -> None: ...

        winreg = SimpleNamespace(
            HKEY_LOCAL_MACHINE="HKLM",
            OpenKey=Key,
            QueryInfoKey=lambda key: (0, len(key.entries), 0),
            EnumValue=lambda key, number: (*key.entries[number], 1),
        )
        monkeypatch.setitem(sys.modules, "winreg", winreg)
        return keys

    @pytest.mark.parametrize(
        ("revision", "microcode"),
        [
            (b"\0\0\0\0\x35\x04\0\0", "0x435"),
            (b"\x12\x34\0\0\0\0\0\0", "0x3412"),
            (b"\0" * 8, None),
            (7, None),
        ],
    )
    def test_a_machine(
        self, revision: object, microcode: str | None, registry: dict[str, dict[str, Any]]
    ) -> None:
        registry["0"] = {"ProcessorNameString": "AMD Ryzen 7 7840U  ", "Update Revision": revision}
        registry["BIOS"] = {"SystemManufacturer": "Framework", "SystemProductName": "Laptop 13"}
        found = describe_device()
        assert (found.processor, found.architecture) == ("AMD Ryzen 7 7840U", "x86_64")
        assert found.features == ["sse4_2", "avx", "avx2"]
        assert (found.microcode, found.virtual_machine, found.power_source) == (microcode, None, "mains")
        assert found.system == "Windows 10.0.22631"

    def test_a_virtual_machine(self, registry: dict[str, dict[str, Any]]) -> None:
        registry["BIOS"] = {
            "SystemManufacturer": "Microsoft Corporation",
            "SystemProductName": "Virtual Machine",
        }
        assert describe_device().virtual_machine == "Hyper-V"

    @pytest.mark.usefixtures("registry")
    def test_a_registry_that_tells_nothing(self) -> None:
        found = describe_device()
        assert (found.processor, found.microcode) == ("Intel64 Family 6", None)


def test_another_system_tells_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None)
    found = describe_device()
    assert found.processor == platform.machine()
    assert (found.features, found.power_source, found.microcode) == ([], None, None)


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
