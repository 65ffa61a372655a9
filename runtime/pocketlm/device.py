"""What this machine is: its processor, its memory, its system.

On Linux everything is read from /proc and /sys, on macOS from sysctl and vm_stat, on Windows from the
registry and kernel32.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pocketlm.system import command_output, fields, read_int, read_text
from pocketlm.threads import processor_name

FEATURES = (
    *("sse4_2", "avx", "avx2", "f16c", "fma", "avx_vnni", "avx_vnni_int8"),
    *("avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
"""Instruction sets that matrix products can gain from, under Linux's names for them."""

_MACOS_FEATURES = {
    "hw.optional.sse4_2": "sse4_2",
    "hw.optional.avx1_0": "avx",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.f16c": "f16c",
    "hw.optional.fma": "fma",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.neon": "asimd",  # before macOS 12
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
}
# Numbers of IsProcessorFeaturePresent (winnt.h); it tells of no more than these.
_WINDOWS_FEATURES = {
    38: "sse4_2",
    39: "avx",
    40: "avx2",
    41: "avx512f",
    19: "asimd",
    43: "asimddp",
    66: "i8mm",
    68: "bf16",
    46: "sve",
    47: "sve2",
    70: "sme",
}
_PAGE_SIZE = re.compile(r"page size of (\d+) bytes")
_ARCHITECTURES = {"amd64": "x86_64", "aarch64": "arm64"}

# Part of the maker's or the product's name in the firmware's tables → hypervisor.
_VIRTUAL_PRODUCTS = {
    "QEMU": "QEMU",
    "KVM": "KVM",
    "VMware": "VMware",
    "VirtualBox": "VirtualBox",
    "innotek": "VirtualBox",
    "Parallels": "Parallels",
    "Apple Virtualization": "Apple Virtualization",
    "HVM domU": "Xen",
    "BHYVE": "bhyve",
    "Virtual Machine": "Hyper-V",
}
# These makers rent out bare metal too, so their name says something only beside a hypervisor's flag.
_CLOUDS = {"Amazon EC2": "Amazon EC2", "Google": "Google Compute Engine", "Microsoft": "Hyper-V"}


@dataclass(frozen=True)
class Memory:
    """In bytes. None is what the system does not tell."""

    total_bytes: int | None
    available_bytes: int | None
    """What this process may still take without swapping; a container's limit counts."""


@dataclass(frozen=True)
class Machine:
    """None is what it does not tell."""

    processor: str
    architecture: str  # x86_64, arm64, …
    features: tuple[str, ...]  # of FEATURES, in its order
    system: str  # operating system and its release
    microcode: str | None
    virtual_machine: str | None  # the hypervisor's name, "unknown" if only its presence shows


def describe_machine(root: Path = Path("/")) -> Machine:
    """The machine as it is now. `root` is where Linux's /proc and /sys are looked for."""
    if sys.platform == "linux":
        return _linux(root)
    return _macos() if sys.platform == "darwin" else _elsewhere()


def memory(root: Path = Path("/")) -> Memory:
    """The memory as it is now. `root` as in `describe_machine`."""
    if sys.platform == "linux":
        return _linux_memory(root)
    if sys.platform == "darwin":
        return _macos_memory()
    return _windows_memory() if sys.platform == "win32" else Memory(None, None)


def cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """Linux's /proc/cpuinfo, of each key the first value."""
    return fields(read_text(root / "proc/cpuinfo"))


def _linux(root: Path) -> Machine:
    info = cpuinfo(root)
    flags = set(info.get("flags", info.get("Features", "")).split())
    return Machine(
        processor=_linux_processor(info, root),
        architecture=_architecture(),
        features=tuple(name for name in FEATURES if name in flags),
        system=_linux_system(root),
        microcode=info.get("microcode"),
        virtual_machine=_linux_hypervisor(flags, root),
    )


def _linux_processor(info: Mapping[str, str], root: Path) -> str:
    """ARM's cpuinfo has at best the architecture for a model name; the board's name says more."""
    board = info.get("Model") or read_text(root / "proc/device-tree/model")
    return board if board and "CPU implementer" in info else processor_name(root)


def _linux_memory(root: Path) -> Memory:
    """From /proc/meminfo (proc_meminfo(5)) and the control groups' limits."""
    facts = fields(read_text(root / "proc/meminfo"))
    total, available = (_kilobytes(facts.get(key)) for key in ("MemTotal", "MemAvailable"))
    left = control_group_bytes(root)
    if left is not None and available is not None:
        available = min(available, left)
    return Memory(total, available)


def control_group_bytes(root: Path = Path("/")) -> int | None:
    """What the memory limits of this process's control groups leave (Linux, cgroup v2), of the narrowest one;
    None: there are none. `root` as in `describe_machine`."""
    lines = (read_text(root / "proc/self/cgroup") or "").splitlines()
    own = Path(next((line[3:].strip().lstrip("/") for line in lines if line.startswith("0::")), ""))
    left = [_left_bytes(root / "sys/fs/cgroup" / each) for each in (own, *own.parents)]
    return min((count for count in left if count is not None), default=None)


def _left_bytes(group: Path) -> int | None:
    limit, used = read_int(group / "memory.max"), read_int(group / "memory.current")
    if limit is None or used is None:  # no such group here, or "max": no limit
        return None
    lines = (read_text(group / "memory.stat") or "").splitlines()
    # What it caches of files and has not touched for long is given back before anything is refused.
    idle = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(0, limit - used + idle)


def _kilobytes(text: str | None) -> int | None:
    """`16000000 kB`, in bytes."""
    number, _, unit = (text or "").partition(" ")
    return int(number) * 1024 if number.isdecimal() and unit == "kB" else None


def _linux_system(root: Path) -> str:
    """Distribution and kernel."""
    release = read_text(root / "etc/os-release") or read_text(root / "usr/lib/os-release") or ""
    names = [line.partition("=")[2].strip("\"'") for line in release.splitlines() if "PRETTY_NAME=" in line]
    kernel = f"Linux {read_text(root / 'proc/sys/kernel/osrelease') or platform.release()}"
    return ", ".join([*names[:1], kernel])


def _linux_hypervisor(flags: set[str], root: Path) -> str | None:
    """x86 has a flag; elsewhere the device tree, the firmware's tables or the kernel's name tell."""
    table = root / "sys/class/dmi/id"
    product = " ".join(
        read_text(table / name) or "" for name in ("sys_vendor", "product_name", "bios_vendor")
    )
    compatible = read_text(root / "proc/device-tree/hypervisor/compatible")
    kind = read_text(root / "sys/hypervisor/type")
    kernel = (read_text(root / "proc/sys/kernel/osrelease") or "").lower()
    told = "hypervisor" in flags or compatible is not None or kind is not None
    if "microsoft" in kernel:
        return "WSL"
    if named := _named_hypervisor(product, told=told):
        return named
    known = {"xen": "Xen", "kvm": "KVM"}
    hints = f"{kind or ''} {compatible or ''}"
    return next((name for part, name in known.items() if part in hints), "unknown") if told else None


def _named_hypervisor(product: str, *, told: bool) -> str | None:
    """The hypervisor by maker and product as the firmware names them; `told`: that there is one is known."""
    table = _VIRTUAL_PRODUCTS | _CLOUDS if told else _VIRTUAL_PRODUCTS
    return next((name for part, name in table.items() if part in product), None)


def _macos() -> Machine:
    facts = fields(command_output(["/usr/sbin/sysctl", "-i", "hw", "machdep.cpu", "kern.hv_vmm_present"]))
    features = {name for key, name in _MACOS_FEATURES.items() if facts.get(key) == "1"}
    return Machine(
        processor=facts.get("machdep.cpu.brand_string") or platform.processor() or platform.machine(),
        architecture=_architecture(),
        features=tuple(name for name in FEATURES if name in features),
        system=f"macOS {platform.mac_ver()[0]}",
        microcode=facts.get("machdep.cpu.microcode_version"),
        virtual_machine="unknown" if facts.get("kern.hv_vmm_present") == "1" else None,
    )


def _macos_memory() -> Memory:
    """From sysctl and vm_stat, which counts pages: `Pages free:      12345.`"""
    total = fields(command_output(["/usr/sbin/sysctl", "-i", "hw.memsize"])).get("hw.memsize", "")
    printed = command_output(["/usr/bin/vm_stat"]) or ""
    pages, size = fields(printed), _PAGE_SIZE.search(printed)
    counts = [pages.get(f"Pages {kind}", "").rstrip(".") for kind in ("free", "inactive", "speculative")]
    known = size is not None and all(count.isdecimal() for count in counts)
    return Memory(
        int(total) if total.isdecimal() else None,
        int(size[1]) * sum(map(int, counts)) if size is not None and known else None,
    )


def _elsewhere() -> Machine:
    """Windows; on any other system what Python itself knows."""
    processor = _registry(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0")
    firmware = _registry(r"HARDWARE\DESCRIPTION\System\BIOS")
    name = processor.get("ProcessorNameString")
    product = f"{firmware.get('SystemManufacturer', '')} {firmware.get('SystemProductName', '')}"
    return Machine(
        processor=str(name).strip() if name else platform.processor() or platform.machine(),
        architecture=_architecture(),
        features=_windows_features(),
        system=f"{platform.system()} {platform.version()}",
        microcode=_windows_microcode(processor.get("Update Revision")),
        virtual_machine=_named_hypervisor(product, told=False),
    )


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX (sysinfoapi.h)."""

    _fields_: ClassVar = [
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    ]


def _windows_memory() -> Memory:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not _kernel32().GlobalMemoryStatusEx(ctypes.byref(status)):
        return Memory(None, None)
    return Memory(status.total, status.available)


def _kernel32() -> Any:
    return getattr(ctypes, "windll").kernel32  # noqa: B009  (not there for a type checker elsewhere)


def _registry(key: str) -> dict[str, object]:
    """The values of a key under HKEY_LOCAL_MACHINE; none if it does not exist."""
    if sys.platform != "win32":
        return {}
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
            count = winreg.QueryInfoKey(opened)[1]
            entries = [winreg.EnumValue(opened, number) for number in range(count)]
    except OSError:
        return {}
    return {name: value for name, value, _ in entries}


def _windows_features() -> tuple[str, ...]:
    if sys.platform != "win32":
        return ()
    present = _kernel32().IsProcessorFeaturePresent
    found = {name for number, name in _WINDOWS_FEATURES.items() if present(number)}
    return tuple(name for name in FEATURES if name in found)


def _windows_microcode(revision: object) -> str | None:
    """Eight bytes, of which Intel's revision fills the upper four and AMD's the lower."""
    if not isinstance(revision, bytes) or not any(revision):
        return None
    low, high = (int.from_bytes(revision[at : at + 4], "little") for at in (0, 4))
    return hex(high or low)


def _architecture() -> str:
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)
