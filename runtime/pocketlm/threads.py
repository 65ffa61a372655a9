"""How many threads to compute with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pocketlm.errors import InvalidSettingError

THREADS_VARIABLE = "POCKETLM_THREADS"


def thread_count(threads: int | None = None) -> int:
    """`threads`, or POCKETLM_THREADS, or the physical cores that this process may use.

    Two threads on one core share its multipliers, so hardware threads only add waiting.
    """
    if threads is None and (text := os.environ.get(THREADS_VARIABLE)):
        try:
            threads = int(text)
        except ValueError:
            raise InvalidSettingError(
                f"{THREADS_VARIABLE} is {text!r}; a whole number of threads is expected."
            ) from None
    if threads is None:
        return physical_cores()
    if not 1 <= threads <= 1024:
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
    import ctypes

    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    library = ctypes.CDLL(None)
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else value.value
