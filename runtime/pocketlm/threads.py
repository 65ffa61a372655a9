"""How many threads to compute with, and the processor that they run on."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

from pocketlm.errors import InvalidSettingError

THREADS_VARIABLE = "POCKETLM_THREADS"


def thread_count(threads: int | None = None) -> int:
    """`threads`, or POCKETLM_THREADS, or the physical cores that this process may use.

    Two threads on one core share its multipliers, so hardware threads only add waiting.
    Raises as `wanted_threads`.
    """
    wanted = wanted_threads(threads)
    return physical_cores() if wanted is None else wanted


def wanted_threads(threads: int | None = None) -> int | None:
    """`threads`, or POCKETLM_THREADS; None if neither says anything.

    Raises InvalidSettingError for a number out of range and a variable that is no number.
    """
    if threads is None and (text := os.environ.get(THREADS_VARIABLE)):
        try:
            threads = int(text)
        except ValueError:
            raise InvalidSettingError(
                f"{THREADS_VARIABLE} is {text!r}; a whole number of threads is expected."
            ) from None
    if threads is not None and not 1 <= threads <= 1024:
        raise InvalidSettingError(f"The number of threads is {threads}; between 1 and 1024 are expected.")
    return threads


def physical_cores() -> int:
    """Physical cores within this process's affinity and its container's quota, at least one."""
    if sys.platform == "linux":
        allowed = os.sched_getaffinity(0)
        cores = len({_siblings(cpu) for cpu in allowed})
        quota = _container_quota()
        return max(1, min(cores, round(quota)) if quota else cores)
    if sys.platform == "darwin" and (performance := _sysctl("hw.perflevel0.physicalcpu")):
        return performance  # efficiency cores would hold the others up
    # No simple way to tell cores from hardware threads here; two to a core is the common case.
    return max(1, (os.cpu_count() or 2) // 2)


def hardware_threads() -> int:
    """Threads that the processor runs at once for this process: as `physical_cores`, SMT counted."""
    if sys.platform == "linux":
        allowed = len(os.sched_getaffinity(0))
        quota = _container_quota()
        return max(1, min(allowed, round(quota)) if quota else allowed)
    return os.cpu_count() or 1


def processor_name(root: Path = Path("/")) -> str:
    """The processor as its maker calls it, or as much as the system tells. `root` is where /proc is."""
    if sys.platform == "linux":
        return _linux_processor(root) or platform.machine()
    if sys.platform == "darwin" and (brand := _sysctl_text("machdep.cpu.brand_string")):
        return brand
    return platform.processor() or platform.machine()


def _linux_processor(root: Path) -> str | None:
    """x86 has a model name; of an ARM board the board's name says more than its cores' numbers."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return _text(root / "proc/device-tree/model").strip("\0\n ") or None


def _text(path: Path) -> str:
    """The file's beginning: reading all of cpuinfo wakes every core."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(16 * 1024)
    except OSError:
        return ""


def _siblings(cpu: int) -> str:
    """A name for the core that `cpu` is a hardware thread of."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _container_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """CPUs' worth of time that control groups (version 2) grant, None if they set no bound."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _sysctl(name: str) -> int | None:
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    library = ctypes.CDLL(None)
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else value.value


def _sysctl_text(name: str) -> str | None:
    value, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(size), None, 0)
    return None if failed else value.value.decode(errors="replace")
