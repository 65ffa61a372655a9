"""The processor, the memory and the system, on trees and records of several machines."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from helpers.trees import write_tree
from pocketlm import device
from pocketlm.device import FEATURES, Memory, describe_machine, memory

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys are Linux's")

JETSON_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16 sve\nCPU implementer\t: 0x41"
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB"
GROUP = "sys/fs/cgroup"
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                1000.
Pages active:                              5000.
Pages inactive:                              20.
Pages speculative:                          300.
"""


@linux_only
class TestLinux:
    def test_a_board_that_only_its_device_tree_names(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"proc/cpuinfo": JETSON_CPUINFO})
        write_tree(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"})
        found = describe_machine(tmp_path)
        assert found.processor == "NVIDIA Jetson Orin Nano"
        assert found.features == ("asimd", "i8mm", "bf16", "sve")

    def test_this_machine(self) -> None:
        found = describe_machine()
        assert found.processor
        assert set(found.features) <= set(FEATURES)
        assert found.system.rpartition(" ")[2] == platform.release()

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
        assert describe_machine(tmp_path).virtual_machine == hypervisor

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
        assert describe_machine(tmp_path).virtual_machine == hypervisor

    def test_memory(self, tmp_path: Path) -> None:
        assert memory(write_tree(tmp_path, {"proc/meminfo": MEMINFO})) == Memory(
            16_000_000 << 10, 8_000_000 << 10
        )

    def test_this_machines_memory(self) -> None:
        found = memory()
        assert found.total_bytes == psutil.virtual_memory().total
        assert found.available_bytes is not None
        assert 0 < found.available_bytes <= found.total_bytes

    @pytest.mark.parametrize(
        ("limit", "used", "available"),
        [
            ("max", 1 << 30, 8_000_000 << 10),
            (4 << 30, 1 << 30, (3 << 30) + 4096),
            (64 << 30, 1 << 30, 8_000_000 << 10),
            (1 << 30, 2 << 30, 0),
        ],
    )
    def test_a_containers_memory(self, limit: object, used: int, available: int, tmp_path: Path) -> None:
        stat = "anon 7\ninactive_file 4096\nactive_file 99"
        write_tree(
            tmp_path,
            {
                "proc/meminfo": MEMINFO,
                f"{GROUP}/memory.max": limit,
                f"{GROUP}/memory.current": used,
                f"{GROUP}/memory.stat": stat,
            },
        )
        assert memory(tmp_path) == Memory(16_000_000 << 10, available)

    def test_memory_that_nobody_tells(self, tmp_path: Path) -> None:
        assert memory(write_tree(tmp_path, {"proc/meminfo": "MemTotal: much"})) == Memory(None, None)


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
        monkeypatch.setattr(device, "command_output", lambda command: printed.get(Path(command[0]).name))
        return printed

    def test_apple_silicon(self, commands: dict[str, str | None]) -> None:
        commands["sysctl"] = SYSCTL.format(0)
        found = describe_machine()
        assert (found.processor, found.architecture, found.system) == ("Apple M1", "arm64", "macOS 15.1")
        assert found.features == ("asimd", "asimddp")
        assert (found.virtual_machine, found.microcode) == (None, None)

    def test_a_virtual_machine(self, commands: dict[str, str | None]) -> None:
        commands["sysctl"] = SYSCTL.format(1)
        assert describe_machine().virtual_machine == "unknown"

    def test_without_sysctl(self, commands: dict[str, str | None]) -> None:
        commands["sysctl"] = None
        found = describe_machine()
        assert (found.processor, found.features, found.virtual_machine) == ("arm", (), None)

    def test_memory(self, commands: dict[str, str | None]) -> None:
        commands["sysctl"] = "hw.memsize: 17179869184"
        commands["vm_stat"] = VM_STAT
        assert memory() == Memory(16 << 30, (1000 + 20 + 300) * 16384)

    @pytest.mark.parametrize("printed", [None, "Pages free: many.", VM_STAT.replace("page size", "size")])
    def test_memory_that_nobody_counts(self, printed: str | None, commands: dict[str, str | None]) -> None:
        commands["vm_stat"] = printed
        assert memory() == Memory(None, None)


class TestWindows:
    @pytest.fixture(autouse=True)
    def windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(platform, "machine", lambda: "AMD64")
        monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
        monkeypatch.setattr(platform, "system", lambda: "Windows")
        monkeypatch.setattr(platform, "version", lambda: "10.0.22631")
        kernel32 = SimpleNamespace(
            IsProcessorFeaturePresent=lambda number: number in {38, 39, 40},
            GlobalMemoryStatusEx=self.fill_in,
        )
        monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)

    def fill_in(self, argument: Any) -> int:
        status = argument._obj
        assert status.length == ctypes.sizeof(status) == 64
        status.total, status.available = 16 << 30, 5 << 30
        return 1

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
        found = describe_machine()
        assert (found.processor, found.architecture) == ("AMD Ryzen 7 7840U", "x86_64")
        assert found.features == ("sse4_2", "avx", "avx2")
        assert (found.microcode, found.virtual_machine) == (microcode, None)
        assert found.system == "Windows 10.0.22631"

    def test_a_virtual_machine(self, registry: dict[str, dict[str, Any]]) -> None:
        registry["BIOS"] = {
            "SystemManufacturer": "Microsoft Corporation",
            "SystemProductName": "Virtual Machine",
        }
        assert describe_machine().virtual_machine == "Hyper-V"

    @pytest.mark.usefixtures("registry")
    def test_a_registry_that_tells_nothing(self) -> None:
        found = describe_machine()
        assert (found.processor, found.microcode) == ("Intel64 Family 6", None)

    def test_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert memory() == Memory(16 << 30, 5 << 30)
        monkeypatch.setattr(ctypes.windll.kernel32, "GlobalMemoryStatusEx", lambda status: 0)  # type: ignore[attr-defined]
        assert memory() == Memory(None, None)


def test_another_system_tells_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    monkeypatch.setattr(platform, "processor", lambda: "")
    found = describe_machine()
    assert found.processor == platform.machine()
    assert (found.features, found.microcode) == ((), None)
    assert memory() == Memory(None, None)
