"""What could spoil a measurement, watched while it runs, and the sensors that show it coming."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pocketlm.device import cpuinfo
from pocketlm.system import command_output, fields, read_int, read_text
from pocketlm_benchmarks.device import PowerSource, governors, power_source, throttle_count

OTHERS_SHARE = 0.10  # of all processors' time, used by processes that are not ours
STEAL_SHARE = 0.02  # of all processors' time, given by the hypervisor to other machines
SWAP_BYTES = 16 << 20  # growth of what is swapped out

# Sensors of the processor itself, by the driver's name, and of these the labels for the whole of it.
_PROCESSOR_SENSORS = {"coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal"}
_WHOLE_PROCESSOR = ("Package id", "Tdie")
_PROCESSOR_ZONES = ("x86_pkg_temp", "cpu", "soc")
_PROCESSOR_COOLING = ("Processor", "cpufreq", "thermal-cpufreq", "thermal-idle")

# Bits of the Raspberry Pi firmware's get_throttled; 16 bits higher stands whether it was so since the start.
_PI_BITS = ("under-voltage", "a capped frequency", "throttling", "the soft temperature limit")
_PI_SINCE_START = 16
_MACOS_PRESSURE = ("nominal", "moderate", "heavy", "trapping", "sleeping")


@dataclass(frozen=True)
class Sensors:
    """The processor at one moment. None is what the machine does not tell."""

    temperature_c: float | None  # its hottest sensor
    frequency_hz: float | None  # mean over its cores
    throttles: int | None  # the system's counters, summed


def sensors(root: Path = Path("/")) -> Sensors:
    """A few small files are read; outside Linux nothing is told without rights or a driver."""
    return Sensors(_temperature_c(root), _frequency_hz(root), throttle_count(root))


class Conditions:
    """Watches from its creation on.

    `own_pids` are the processes that are measured, as they are when it is called; this one is always among
    them. A child that was waited for still counts, as the system adds its time to its parent's. `root` is
    where Linux's /proc and /sys are looked for.
    """

    def __init__(self, own_pids: Callable[[], Iterable[int]], root: Path = Path("/")) -> None:
        self._own_pids = own_pids
        self._root = root
        self._own_s: dict[int, float] = {}  # by process, the last that was seen of it
        self._before = self._moment()

    def flags(self) -> list[str]:
        """Sentences about what happened since the start, none if nothing did. May be called again."""
        before, now = self._before, self._moment()
        return [
            *_throttling(before, now),
            *_power(before.power, now.power),
            *_load(before, now),
            *_swapping(before.swapped_bytes, now.swapped_bytes),
            *_governors(self._root),
        ]

    def _moment(self) -> _Moment:
        root = self._root
        pids = {os.getpid(), *self._own_pids(), *self._own_s}
        seen = {pid: seconds for pid in pids if (seconds := _process_s(pid, root)) is not None}
        # On Linux the time of one that has gone is part of its parent's now.
        self._own_s = seen if sys.platform == "linux" else self._own_s | seen
        return _Moment(
            processor=_processor_time(root),
            own_s=sum(self._own_s.values()),
            throttles=throttle_count(root),
            cooling=_cooling(root),
            board=_board_throttling(root),
            pressure=_macos_pressure(),
            power=power_source(root),
            swapped_bytes=_swapped_bytes(root),
        )


@dataclass(frozen=True)
class _ProcessorTime:
    """Seconds summed over all logical processors since the system started."""

    total_s: float
    busy_s: float
    steal_s: float


@dataclass(frozen=True)
class _Moment:
    processor: _ProcessorTime | None
    own_s: float  # processor time of our processes
    throttles: int | None
    cooling: bool  # whether a cooling policy holds the processor back
    board: int | None  # get_throttled
    pressure: int | None  # index into _MACOS_PRESSURE
    power: PowerSource | None
    swapped_bytes: int | None


def _throttling(before: _Moment, now: _Moment) -> Iterator[str]:
    if before.throttles is not None and now.throttles is not None and now.throttles > before.throttles:
        times = now.throttles - before.throttles
        yield f"The processor slowed down for its temperature: its throttling counters grew by {times:,}."
    if now.cooling:
        yield "The processor is held back to cool down: let it cool and measure again."
    if now.board is not None:
        since = (now.board & ~(before.board or 0)) >> _PI_SINCE_START
        told = [name for bit, name in enumerate(_PI_BITS) if (now.board | since) >> bit & 1]
        if told:
            yield f"The board reports {', '.join(told)}: check its power supply and its cooling."
    if now.pressure:
        yield f"macOS reports {_MACOS_PRESSURE[now.pressure]} thermal pressure: the processor is slowed down."


def _power(before: PowerSource | None, now: PowerSource | None) -> Iterator[str]:
    if before and now and before != now:
        yield f"The power source changed from {before} to {now} during the measurement."
    elif now == "battery":
        yield "The machine runs on battery, which slows many machines down."


def _load(before: _Moment, now: _Moment) -> Iterator[str]:
    if before.processor is None or now.processor is None:
        return
    total_s = now.processor.total_s - before.processor.total_s
    if total_s <= 0:
        return
    busy_s = now.processor.busy_s - before.processor.busy_s
    others = (busy_s - (now.own_s - before.own_s)) / total_s
    if others > OTHERS_SHARE:
        yield f"Other processes used {others:.0%} of the processor's time: close them and measure again."
    steal = (now.processor.steal_s - before.processor.steal_s) / total_s
    if steal > STEAL_SHARE:
        yield f"The hypervisor gave {steal:.1%} of the processor's time to other machines (steal)."


def _swapping(before: int | None, now: int | None) -> Iterator[str]:
    if before is not None and now is not None and now - before > SWAP_BYTES:
        yield f"Memory ran short: {(now - before) / 1e6:,.0f} MB were swapped out during the measurement."


def _governors(root: Path) -> Iterator[str]:
    """Intel's and AMD's own drivers call a policy powersave that follows the load."""
    found = [name for name in governors(root) if name in {"powersave", "ondemand", "conservative"}]
    if not found:
        return
    driver = read_text(root / "sys/devices/system/cpu/cpufreq/policy0/scaling_driver") or ""
    held = "powersave" in found and "pstate" not in driver
    what = "is held at its lowest" if held else "follows the load, so that short work may run slower"
    yield (
        f"The processor's frequency {what} (governor {', '.join(found)}). "
        "For steady figures: cpupower frequency-set -g performance"
    )


def _processor_time(root: Path) -> _ProcessorTime | None:
    """From /proc/stat (proc_stat(5)), where a guest's time is part of the user's."""
    if sys.platform != "linux":
        times = psutil.cpu_times()
        busy_s = times.user + times.system + getattr(times, "nice", 0.0)
        return _ProcessorTime(busy_s + times.idle, busy_s, 0.0)
    line = (read_text(root / "proc/stat") or "").partition("\n")[0].split()
    if line[:1] != ["cpu"] or len(line) < 9:
        return None
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, waiting, hard, soft, steal = (int(ticks) * tick_s for ticks in line[1:9])
    busy_s = user + nice + system + hard + soft
    return _ProcessorTime(busy_s + idle + waiting + steal, busy_s, steal)


def _process_s(pid: int, root: Path) -> float | None:
    """Processor time of a process and of the children that it waited for; None if it has gone."""
    if sys.platform != "linux":
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            return None
        return float(times.user + times.system)
    # The name stands in parentheses and may hold anything, parentheses and spaces too.
    ticks = (read_text(root / "proc" / str(pid) / "stat") or "").rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") if len(ticks) == 4 else None


def _swapped_bytes(root: Path) -> int | None:
    if sys.platform != "linux":
        return int(psutil.swap_memory().used)
    memory = fields(read_text(root / "proc/meminfo"))
    total, free = (memory.get(key, "").partition(" ")[0] for key in ("SwapTotal", "SwapFree"))
    return (int(total) - int(free)) * 1024 if total.isdecimal() and free.isdecimal() else None


def _cooling(root: Path) -> bool:
    """Whether a thermal policy limits the processor right now."""
    devices = (root / "sys/class/thermal").glob("cooling_device*")
    return any(
        (read_text(device / "type") or "").startswith(_PROCESSOR_COOLING)
        and (read_int(device / "cur_state") or 0) > 0
        for device in devices
    )


def _board_throttling(root: Path) -> int | None:
    """A Raspberry Pi's get_throttled, from its kernel driver or from `vcgencmd`."""
    if "Raspberry Pi" not in (read_text(root / "proc/device-tree/model") or cpuinfo(root).get("Model", "")):
        return None
    files = (root / "sys/devices/platform").glob("soc*/*firmware/get_throttled")
    text = next((text for path in files if (text := read_text(path))), None)
    if text is None:
        text = (command_output(["vcgencmd", "get_throttled"]) or "").partition("=")[2]
    try:
        return int(text, 16)
    except ValueError:
        return None


def _macos_pressure() -> int | None:
    """The level that `notifyutil` tells, as private as stable; None elsewhere."""
    if sys.platform != "darwin":
        return None
    words = (command_output(["notifyutil", "-g", "com.apple.system.thermalpressurelevel"]) or "").split()
    if not words or not words[-1].isdecimal():
        return None
    return min(int(words[-1]), len(_MACOS_PRESSURE) - 1)


def _temperature_c(root: Path) -> float | None:
    """The hottest of the processor's own sensors, else of the thermal zones that are named after it."""
    readings = list(_processor_sensors(root))
    whole = [value for label, value in readings if label.startswith(_WHOLE_PROCESSOR)]
    values = whole or [value for _, value in readings]
    if not values:
        zones = (root / "sys/class/thermal").glob("thermal_zone*")
        values = [
            value
            for zone in zones
            if any(part in (read_text(zone / "type") or "") for part in _PROCESSOR_ZONES)
            and (value := read_int(zone / "temp")) is not None
        ]
    # A sensor that is not connected gives nonsense.
    return max((value / 1000 for value in values if 0 < value <= 150_000), default=None)


def _processor_sensors(root: Path) -> Iterator[tuple[str, int]]:
    """Label and thousandths of a degree."""
    for chip in (root / "sys/class/hwmon").glob("hwmon*"):
        if read_text(chip / "name") not in _PROCESSOR_SENSORS:
            continue
        for path in chip.glob("temp*_input"):
            value = read_int(path)
            if value is not None:
                yield read_text(path.with_name(path.name.replace("_input", "_label"))) or "", value


def _frequency_hz(root: Path) -> float | None:
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    frequencies_hz = [1e3 * kilohertz for path in files if (kilohertz := read_int(path))]
    if not frequencies_hz:
        lines = (read_text(root / "proc/cpuinfo") or "").splitlines()
        frequencies_hz = [1e6 * float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(frequencies_hz) / len(frequencies_hz) if frequencies_hz else None
