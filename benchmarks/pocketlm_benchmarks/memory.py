"""How much memory a process holds, its own apart from what it maps from files."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from pocketlm.system import fields, read_text
from pocketlm_benchmarks.result import Memory

UNKNOWN = Memory(peak_bytes=None, anonymous_bytes=None, file_bytes=None)


def memory_of(pid: int, root: Path = Path("/")) -> Memory:
    """The memory of process `pid`: all None if it has gone or is another user's.

    On Linux from /proc/PID/status (proc_pid_status(5)): VmHWM, RssAnon, and RssFile with RssShmem. `root` is
    where /proc is looked for. Windows tells the peak alone, macOS none of the three.
    """
    if sys.platform != "linux":
        return _elsewhere(pid)
    status = fields(read_text(root / "proc" / str(pid) / "status"))
    mapped, shared = _bytes(status, "RssFile"), _bytes(status, "RssShmem")
    return Memory(
        peak_bytes=_bytes(status, "VmHWM"),
        anonymous_bytes=_bytes(status, "RssAnon"),
        file_bytes=None if mapped is None else mapped + (shared or 0),
    )


def own_bytes(pid: int) -> int:
    """Its memory without what it maps from files; with it where the system does not tell that apart.

    Raises psutil.Error for a process that has gone or is another user's, there.
    """
    own = memory_of(pid).anonymous_bytes
    return int(psutil.Process(pid).memory_info().rss) if own is None else own


def _bytes(status: dict[str, str], key: str) -> int | None:
    """A value such as `1234 kB`; a process that has ended but was not waited for has none."""
    number, _, unit = status.get(key, "").partition(" ")
    return int(number) * 1024 if number.isdecimal() and unit == "kB" else None


def _elsewhere(pid: int) -> Memory:
    try:
        peak: int | None = getattr(psutil.Process(pid).memory_info(), "peak_wset", None)
    except psutil.Error:
        return UNKNOWN
    return Memory(peak_bytes=peak, anonymous_bytes=None, file_bytes=None)
