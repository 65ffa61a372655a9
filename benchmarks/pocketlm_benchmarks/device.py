"""What a result says of the machine: what `pocketlm.device` finds, and settings that decide its speed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Literal

import psutil

from pocketlm.device import describe_machine, memory
from pocketlm.system import read_int, read_text
from pocketlm_benchmarks.result import Device

PowerSource = Literal["mains", "battery"]


def describe_device(root: Path = Path("/")) -> Device:
    """The machine as it is now. `root` is where Linux's /proc and /sys are looked for."""
    machine = describe_machine(root)
    on_linux = sys.platform == "linux"
    return Device(
        processor=machine.processor,
        architecture=machine.architecture,
        features=list(machine.features),
        physical_cores=_linux_cores(root) if on_linux else psutil.cpu_count(logical=False),
        logical_cores=_linux_logical_cores(root) if on_linux else os.cpu_count() or 1,
        memory_bytes=memory(root).total_bytes or int(psutil.virtual_memory().total),
        system=machine.system,
        microcode=machine.microcode,
        virtual_machine=machine.virtual_machine,
        governor=", ".join(governors(root)) or None,
        turbo=_turbo(root),
        power_source=power_source(root),
        thermal_throttles=throttle_count(root),
        versions=_versions(),
    )


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


def _linux_cores(root: Path) -> int | None:
    """Distinct cores among those that are online."""
    topologies = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({siblings for path in topologies if (siblings := read_text(path))}) or None


def _linux_logical_cores(root: Path) -> int:
    lines = (read_text(root / "proc/cpuinfo") or "").splitlines()
    return sum(line.startswith("processor") for line in lines) or os.cpu_count() or 1


def _turbo(root: Path) -> bool | None:
    """Whether the processor may run above its base frequency."""
    cpu = root / "sys/devices/system/cpu"
    if (off := read_int(cpu / "intel_pstate/no_turbo")) is not None:
        return not off
    boosts = [cpu / "cpufreq/boost", *(cpu / "cpufreq").glob("policy*/boost")]
    values = [value for path in boosts if (value := read_int(path)) is not None]
    return any(values) if values else None


def _versions() -> dict[str, str]:
    """Of what computes here; a package that was installed under another name is left out."""
    found = {"python": platform.python_version()}
    for package in ("pocketlm", "onnxruntime", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
