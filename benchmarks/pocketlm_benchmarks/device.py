"""What the machine is: its processor, its memory and the settings that decide how fast it runs.

On Linux everything is read from /proc and /sys, on macOS from sysctl, on Windows from the registry.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil

from pocketlm_benchmarks.result import Device
from pocketlm_benchmarks.system import command_output, fields, read_int, read_text

PowerSource = Literal["mains", "battery"]

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


def describe_device(root: Path = Path("/")) -> Device:
    """The machine as it is now. `root` is where Linux's /proc and /sys are looked for."""
    if sys.platform == "linux":
        return _linux(root)
    return _macos() if sys.platform == "darwin" else _elsewhere()


def cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """Linux's /proc/cpuinfo, of each key the first value."""
    return fields(read_text(root / "proc/cpuinfo"))


def governors(root: Path = Path("/")) -> list[str]:
    """The frequency policies in force, without repetition; none where the system does not tell."""
    files = (root / "sys/devices/system/cpu/cpufreq").glob("policy*/scaling_governor")
    return sorted({governor for path in files if (governor := read_text(path))})


def throttle_count(root: Path = Path("/")) -> int | None:
    """How often the processor slowed down for its temperature since it started, summed over its cores.

    From the kernel's thermal_throttle counters, which only Intel's processors have.
    """
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    counts = [count for path in files if (count := read_int(path)) is not None]
    return sum(counts) if counts else None


def power_source(root: Path = Path("/")) -> PowerSource | None:
    """Where the power comes from now; None for a machine without a battery that tells nothing of its plug."""
    if sys.platform != "linux":
        battery = psutil.sensors_battery()
        if battery is None or battery.power_plugged is None:
            return None
        return "mains" if battery.power_plugged else "battery"
    plugs, batteries = [], []
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if read_text(supply / "scope") == "Device":  # a mouse's or a keyboard's
            continue
        if read_text(supply / "type") == "Battery":
            batteries.append(read_text(supply / "status"))
        else:
            plugs.append(read_int(supply / "online"))
    if any(plugs):
        return "mains"
    if batteries:
        return "battery" if "Discharging" in batteries else "mains"
    return None


def _linux(root: Path) -> Device:
    info = cpuinfo(root)
    flags = set(info.get("flags", info.get("Features", "")).split())
    return Device(
        processor=_linux_processor(info, root),
        architecture=_architecture(),
        features=[name for name in FEATURES if name in flags],
        physical_cores=_linux_cores(root),
        logical_cores=_linux_logical_cores(root),
        memory_bytes=_linux_memory(root),
        system=_linux_system(root),
        microcode=info.get("microcode"),
        virtual_machine=_linux_hypervisor(flags, root),
        governor=", ".join(governors(root)) or None,
        turbo=_turbo(root),
        power_source=power_source(root),
        thermal_throttles=throttle_count(root),
        versions=_versions(),
    )


def _linux_processor(info: Mapping[str, str], root: Path) -> str:
    """ARM's cpuinfo has at best the architecture for a model name; the board's name says more."""
    on_arm = "CPU implementer" in info
    board = info.get("Model") or read_text(root / "proc/device-tree/model")
    names = (board, info.get("model name")) if on_arm else (info.get("model name"), board)
    return next((name for name in names if name), platform.processor() or platform.machine())


def _linux_cores(root: Path) -> int | None:
    """Distinct cores among those that are online."""
    topologies = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({siblings for path in topologies if (siblings := read_text(path))}) or None


def _linux_logical_cores(root: Path) -> int:
    lines = (read_text(root / "proc/cpuinfo") or "").splitlines()
    return sum(line.startswith("processor") for line in lines) or os.cpu_count() or 1


def _linux_memory(root: Path) -> int:
    total = fields(read_text(root / "proc/meminfo")).get("MemTotal", "").split()
    return int(total[0]) * 1024 if total else int(psutil.virtual_memory().total)


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


def _turbo(root: Path) -> bool | None:
    """Whether the processor may run above its base frequency."""
    cpu = root / "sys/devices/system/cpu"
    if (off := read_int(cpu / "intel_pstate/no_turbo")) is not None:
        return not off
    boosts = [cpu / "cpufreq/boost", *(cpu / "cpufreq").glob("policy*/boost")]
    values = [value for path in boosts if (value := read_int(path)) is not None]
    return any(values) if values else None


def _macos() -> Device:
    facts = fields(command_output(["/usr/sbin/sysctl", "-i", "hw", "machdep.cpu", "kern.hv_vmm_present"]))
    features = {name for key, name in _MACOS_FEATURES.items() if facts.get(key) == "1"}
    return Device(
        processor=facts.get("machdep.cpu.brand_string") or platform.processor() or platform.machine(),
        architecture=_architecture(),
        features=[name for name in FEATURES if name in features],
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=os.cpu_count() or 1,
        memory_bytes=int(psutil.virtual_memory().total),
        system=f"macOS {platform.mac_ver()[0]}",
        microcode=facts.get("machdep.cpu.microcode_version"),
        virtual_machine="unknown" if facts.get("kern.hv_vmm_present") == "1" else None,
        governor=None,
        turbo=None,
        power_source=power_source(),
        thermal_throttles=None,
        versions=_versions(),
    )


def _elsewhere() -> Device:
    """Windows; on any other system what Python itself knows."""
    processor = _registry(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0")
    firmware = _registry(r"HARDWARE\DESCRIPTION\System\BIOS")
    name = processor.get("ProcessorNameString")
    product = f"{firmware.get('SystemManufacturer', '')} {firmware.get('SystemProductName', '')}"
    return Device(
        processor=str(name).strip() if name else platform.processor() or platform.machine(),
        architecture=_architecture(),
        features=_windows_features(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=os.cpu_count() or 1,
        memory_bytes=int(psutil.virtual_memory().total),
        system=f"{platform.system()} {platform.version()}",
        microcode=_windows_microcode(processor.get("Update Revision")),
        virtual_machine=_named_hypervisor(product, told=False),
        governor=None,
        turbo=None,
        power_source=power_source(),
        thermal_throttles=None,
        versions=_versions(),
    )


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


def _windows_features() -> list[str]:
    if sys.platform != "win32":
        return []
    import ctypes

    present = ctypes.windll.kernel32.IsProcessorFeaturePresent
    found = {name for number, name in _WINDOWS_FEATURES.items() if present(number)}
    return [name for name in FEATURES if name in found]


def _windows_microcode(revision: object) -> str | None:
    """Eight bytes, of which Intel's revision fills the upper four and AMD's the lower."""
    if not isinstance(revision, bytes) or not any(revision):
        return None
    low, high = (int.from_bytes(revision[at : at + 4], "little") for at in (0, 4))
    return hex(high or low)


def _architecture() -> str:
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def _versions() -> dict[str, str]:
    """Of what computes here; a package that was installed under another name is left out."""
    found = {"python": platform.python_version()}
    for package in ("pocketlm", "onnxruntime", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
