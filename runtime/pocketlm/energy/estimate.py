"""The last resort: joules from a process's CPU time and a figure for what a busy core takes.

It sees neither idle power nor memory nor anything beside the processor's cores, and it is as good as its
watts per core. So every reading is an estimate with an interval.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pocketlm.energy.reading import CpuSeconds, Kind, Reading, Scope
from pocketlm.errors import InvalidSettingError

TDP_VARIABLE = "POCKETLM_TDP_W"

WATTS_PER_CORE = 5.0
"""Of a busy core where the TDP is unknown: a judgement, in the middle (on a logarithmic scale) of what
0.3 to 3 times of it has to cover, 1.5 to 15 W. Below lie the cores of small boards (about 2 W) and of laptops
(15 W over 4 to 8 cores), above those of desktops (65 to 125 W over 8). The large clouds' servers take 3.5 W
(AWS), 3.8 W (Azure) and 4.3 W (Google) a hardware thread at full load, says Cloud Carbon Footprint's
methodology (appendix I, from SPECpower_ssj2008 results)."""

TDP_FACTORS = (0.5, 1.5)
"""Interval of an estimate from a known TDP on bare metal. A judgement: estimators of this kind were found up
to 40 % off beside meters (arXiv 2509.22092)."""

UNKNOWN_FACTORS = (0.3, 3.0)
"""Interval in a virtual machine, or without a TDP. A judgement: see WATTS_PER_CORE."""

_PLAUSIBLE_TDP_W = (1.0, 1000.0)  # some boards' firmware writes 4095 W for "no limit"
_FIRST_PROCESSOR_BYTES = 16 * 1024  # reading all of cpuinfo wakes every core


class CpuEstimate:
    """CPU seconds × watts per core, at least 0 and at most TDP × time."""

    source = "cpu-time"
    scope: Scope = "process"
    kind: Kind = "estimated"
    least_window_s = 1.0  # a hundred of the system's ticks
    quick = True

    def __init__(
        self,
        cpu_seconds: CpuSeconds,
        *,
        watts_per_core: float | None = None,
        tdp_w: float | None = None,
        cores: int | None = None,
        virtual: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        watts_per_core: of a busy core; default `tdp_w` / `cores`, or WATTS_PER_CORE without a TDP.
        tdp_w: thermal design power of all packages together; `cores` is the number of their cores.
        virtual: this is a virtual machine, whose CPU seconds may be another core's.

        Raises InvalidSettingError for watts or cores that are not positive, and for a TDP without cores.
        """
        for name, value in (("watts_per_core", watts_per_core), ("tdp_w", tdp_w), ("cores", cores)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidSettingError(f"{name} is {value}; a number above 0 is expected.")
        if tdp_w is not None and watts_per_core is None and cores is None:
            raise InvalidSettingError(
                f"tdp_w is {tdp_w:g} and cores is missing. Give cores, or watts_per_core."
            )
        if watts_per_core is None:
            watts_per_core = tdp_w / cores if tdp_w is not None and cores is not None else WATTS_PER_CORE
        self.watts_per_core = watts_per_core
        self.tdp_w = tdp_w
        self.virtual = virtual
        self.resolution_j: float | None = watts_per_core / _ticks_per_s()
        self._cpu_seconds = cpu_seconds
        self._clock = clock

    @property
    def factors(self) -> tuple[float, float]:
        """Lower and upper end of the interval, as shares of the estimate."""
        return UNKNOWN_FACTORS if self.virtual or self.tdp_w is None else TDP_FACTORS

    def begin(self) -> CpuWindow:
        return CpuWindow(self)

    def close(self) -> None:
        """Holds nothing."""

    def _now(self) -> tuple[float, float | str]:
        """The time, and the CPU seconds so far or why there are none."""
        now_s = self._clock()
        try:
            return now_s, self._cpu_seconds()
        # The caller's function may raise what it likes, psutil's errors for example.
        except Exception as error:
            return now_s, f"{type(error).__name__}: {error}"

    def _flags(self) -> tuple[str, ...]:
        flags = [f"estimated from processor time at {self.watts_per_core:.3g} W a core"]
        if self.virtual:
            flags.append("a virtual machine: which processor serves it, and with whom, is unknown")
        elif self.tdp_w is None:
            flags.append(f"the processor's TDP is unknown; {TDP_VARIABLE} tells it")
        return tuple(flags)


class CpuWindow:
    """One window of a `CpuEstimate`."""

    def __init__(self, probe: CpuEstimate) -> None:
        self._probe = probe
        self._began_s, self._before = probe._now()

    def end(self) -> Reading:
        probe = self._probe
        now_s, after = probe._now()
        duration_s = now_s - self._began_s
        if isinstance(self._before, str) or isinstance(after, str):
            failure = self._before if isinstance(self._before, str) else after
            reason = f"the processor time of the process could not be read ({failure})"
            return Reading(probe.source, probe.scope, "estimated", duration_s, None, reason=reason)
        most_j = math.inf if probe.tdp_w is None else probe.tdp_w * duration_s
        energy_j = min(max(0.0, after - self._before) * probe.watts_per_core, most_j)
        low, high = probe.factors
        return Reading(
            probe.source,
            probe.scope,
            "estimated",
            duration_s,
            energy_j,
            low_j=low * energy_j,
            high_j=min(high * energy_j, most_j),
            flags=probe._flags(),
        )


def find(cpu_seconds: CpuSeconds | None = None, root: Path = Path("/")) -> CpuEstimate:
    """An estimate for this machine; `cpu_seconds` is this process's by default.

    The TDP is POCKETLM_TDP_W, or what the RAPL zones under `root` say.
    Raises InvalidSettingError for a POCKETLM_TDP_W that is no positive number.
    """
    return CpuEstimate(
        cpu_seconds or process_cpu_seconds(),
        tdp_w=_tdp_from_environment() or _tdp_from_powercap(root),
        cores=_machine_cores(root),
        virtual=virtual_machine(root),
    )


def process_cpu_seconds(
    pid: int | None = None, *, root: Path = Path("/"), platform: str = sys.platform
) -> CpuSeconds:
    """What gives the CPU seconds, user and system, of this process or of another one, all threads together.

    Another process's come from /proc/PID/stat (proc_pid_stat(5), fields 14 and 15) and step in ticks of
    usually 10 ms; the function raises OSError once that process is gone. Outside Linux only this process's
    can be read: InvalidSettingError for another one.
    """
    if pid is None or pid == os.getpid():
        return time.process_time
    if not platform.startswith(("linux", "android")):
        raise InvalidSettingError(
            f"The processor time of process {pid} cannot be read on {platform}, only that of this process. "
            "Pass a function of your own as cpu_seconds, for example from psutil."
        )
    path, ticks_per_s = root / "proc" / str(pid) / "stat", _ticks_per_s()

    def seconds() -> float:
        # The second field is the program's name in parentheses, and may hold blanks and parentheses itself.
        fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks_per_s

    return seconds


def virtual_machine(root: Path = Path("/")) -> bool:
    """Whether a hypervisor shows: its flag in /proc/cpuinfo (x86), or its node (Arm, Xen)."""
    if any(
        line.startswith("flags") and "hypervisor" in line.split()
        for line in first_processor(root).splitlines()
    ):
        return True
    return any((root / node).exists() for node in ("proc/device-tree/hypervisor", "sys/hypervisor/type"))


def first_processor(root: Path = Path("/")) -> str:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    try:
        with (root / "proc" / "cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return file.read(_FIRST_PROCESSOR_BYTES).split("\n\n")[0]
    except OSError:
        return ""


def _tdp_from_environment() -> float | None:
    text = os.environ.get(TDP_VARIABLE)
    if not text:
        return None
    try:
        tdp_w = float(text)
    except ValueError:
        tdp_w = math.nan
    if not (math.isfinite(tdp_w) and tdp_w > 0):
        raise InvalidSettingError(
            f"{TDP_VARIABLE} is {text!r}; the processor's TDP in watts is expected, for example 15."
        )
    return tdp_w


def _tdp_from_powercap(root: Path) -> float | None:
    """The sum over the packages; None if one of them does not tell.

    constraint_0 is the long-term limit: its largest value is the TDP, and if the processor does not tell that
    one, the limit in force is near it (kernel.org, power/powercap).
    """
    zones = {
        name: zone  # by name, as rapl.py counts them
        for zone in (root / "sys/class/powercap").glob("intel-rapl:*")
        if zone.name.count(":") == 1 and (name := _text(zone / "name")).startswith("package-")
    }
    limits_w = [
        _plausible_w(zone / "constraint_0_max_power_uw") or _plausible_w(zone / "constraint_0_power_limit_uw")
        for zone in zones.values()
    ]
    known_w = [limit_w for limit_w in limits_w if limit_w is not None]
    return sum(known_w) if known_w and len(known_w) == len(zones) else None


def _plausible_w(path: Path) -> float | None:
    low_w, high_w = _PLAUSIBLE_TDP_W
    text = _text(path)
    watts = int(text) / 1e6 if text.isdigit() else 0.0
    return watts if low_w <= watts <= high_w else None


def _machine_cores(root: Path) -> int:
    """Physical cores of the whole machine, as its TDP is for all of them."""
    topologies = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({text for path in topologies if (text := _text(path))}) or os.cpu_count() or 1


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
