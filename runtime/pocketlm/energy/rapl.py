"""RAPL, the energy counters of Intel's and AMD's processors, through Linux's powercap tree.

    /sys/class/powercap/intel-rapl:0     package-0: cores, graphics and the rest of one processor
                        intel-rapl:0:0   core, uncore, dram: domains below it
                        intel-rapl:1     package-1, or psys: the platform, which holds the package
                        intel-rapl-mmio:0  the same package again, through other registers

The joules of a reading are the packages' sum. Core and uncore are inside a package and only parts; dram is a
domain of its own, psys holds the package, so both are parts as well and never added: the scope stays the
package. intel-rapl-mmio is ignored, as it would count the package twice.

Source: kernel.org, "Power Capping Framework" (power/powercap), and Intel's Software Developer's Manual,
volume 3B, "Platform specific power management support". perf's `power/energy-*` events are the same counters
behind permissions that are no wider, so they are not used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocketlm.energy.estimate import UNKNOWN_FACTORS, first_processor, virtual_machine
from pocketlm.energy.reading import Absent, Kind, Reading, Scope

SOURCE = "rapl"

UDEV_RULE = (
    'SUBSYSTEM=="powercap", KERNEL=="intel-rapl:*", ACTION=="add", '
    'RUN+="/bin/chgrp energy /sys%p/energy_uj", RUN+="/bin/chmod g+r /sys%p/energy_uj"'
)
"""Lets a group read the counters. MODE and GROUP would not do: they are for device nodes, not for sysfs."""

PERMISSION_REMEDY = f"""\
Let a group read the counters; they can leak what other programs compute, so do not open them to everyone.
As root: groupadd --system energy; usermod --append --groups energy YOUR_NAME
then write into /etc/udev/rules.d/70-energy.rules the line
{UDEV_RULE}
then: udevadm control --reload; udevadm trigger --subsystem-match=powercap --action=add
and log in again."""

CONTAINER_REMEDY = (
    "Run outside of the container, or start it with --security-opt systempaths=unconfined (Docker) "
    "or --security-opt unmask=/sys/devices/virtual/powercap (Podman)."
)

_HIGHEST_POWER_W = 300.0  # of one package, to tell whether its counter can have wrapped twice
_ZONE = re.compile(r"intel-rapl:\d+")
_SUBZONE = re.compile(r"intel-rapl:\d+:\d+")
_PACKAGE = re.compile(r"package-\d+(-die-\d+)?")


class CounterError(Exception):
    """Two values of a counter that tell nothing about what lies between them."""


@dataclass(frozen=True)
class Zone:
    """One counter."""

    name: str  # package-0, package-0/dram, psys
    energy: Path
    range_uj: int | None  # where it wraps
    counts: bool  # whether its joules are in the total


def spent_uj(before_uj: int, after_uj: int, range_uj: int | None) -> int:
    """What a counter has moved on, from 0 to `range_uj` and round again, if it wrapped once at most.

    Raises CounterError for a counter that fell although its range is unknown, or that exceeds its range.
    """
    if range_uj is None:
        if after_uj < before_uj:
            raise CounterError(f"fell from {before_uj} to {after_uj} µJ, and max_energy_range_uj is missing")
        return after_uj - before_uj
    if not (0 <= before_uj <= range_uj and 0 <= after_uj <= range_uj):
        raise CounterError(f"went from {before_uj} to {after_uj} µJ, outside of 0 to {range_uj}")
    return (after_uj - before_uj) % (range_uj + 1)


class RaplProbe:
    """The processor packages of this machine. In a virtual machine its figures are attributed: estimates."""

    source = SOURCE
    scope: Scope = "package"
    resolution_j: float | None = 2**-14  # Intel's default unit; AMD's is finer
    least_window_s = 10.0
    quick = True

    def __init__(
        self, zones: tuple[Zone, ...], *, virtual: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.zones = zones
        self.kind: Kind = "estimated" if virtual else "measured"
        self._clock = clock

    def begin(self) -> RaplWindow:
        return RaplWindow(self)

    def close(self) -> None:
        """Holds nothing."""

    def _now(self) -> tuple[float, dict[str, int | str]]:
        """The time, and each zone's counter in µJ or why there is none."""
        now_s = self._clock()
        return now_s, {zone.name: _counter(zone) for zone in self.zones}

    def _flags(self, duration_s: float) -> tuple[str, ...]:
        flags = []
        if self.kind == "estimated":
            flags.append("a virtual machine: the counters are what its host attributes to it")
        if any(zone.name.endswith("/dram") for zone in self.zones):
            flags.append("memory (dram) is not in the total")
        if any(
            zone.counts and zone.range_uj is not None and duration_s * _HIGHEST_POWER_W * 1e6 > zone.range_uj
            for zone in self.zones
        ):
            flags.append("a counter may have wrapped more than once in so long a window")
        return tuple(flags)


class RaplWindow:
    """One window of a `RaplProbe`."""

    def __init__(self, probe: RaplProbe) -> None:
        self._probe = probe
        self._began_s, self._before = probe._now()

    def end(self) -> Reading:
        probe = self._probe
        now_s, after = probe._now()
        duration_s = now_s - self._began_s
        parts_j, failure = self._spent_j(after)
        if failure is not None:
            return Reading(probe.source, probe.scope, probe.kind, duration_s, None, reason=failure)
        energy_j = sum(parts_j[zone.name] for zone in probe.zones if zone.counts)
        low, high = UNKNOWN_FACTORS if probe.kind == "estimated" else (None, None)
        return Reading(
            probe.source,
            probe.scope,
            probe.kind,
            duration_s,
            energy_j,
            low_j=None if low is None else low * energy_j,
            high_j=None if high is None else high * energy_j,
            parts_j=parts_j,
            flags=probe._flags(duration_s),
        )

    def _spent_j(self, after: dict[str, int | str]) -> tuple[dict[str, float], str | None]:
        """Joules by zone, and why the total is unknown. A part that fails is left out, a package is not."""
        parts_j: dict[str, float] = {}
        for zone in self._probe.zones:
            try:
                before_uj, after_uj = _known(self._before[zone.name]), _known(after[zone.name])
                parts_j[zone.name] = spent_uj(before_uj, after_uj, zone.range_uj) / 1e6
            except CounterError as error:
                if zone.counts:
                    return {}, f"the counter of {zone.name} {error}"
        return parts_j, None


def find(root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic) -> RaplProbe | Absent:
    """The probe over the packages under `root`, or why there is none."""
    folder = root / "sys/class/powercap"
    try:
        folders = sorted(path for path in folder.iterdir() if _ZONE.fullmatch(path.name))
    except OSError:
        folders = []
    if folders and not any(path.exists() for path in folders):
        return Absent(SOURCE, "the counters are hidden from this container", CONTAINER_REMEDY)
    virtual = virtual_machine(root)
    zones = _zones(folders, without_cores=_is_amd(root))
    if not any(zone.counts for zone in zones):
        return _no_zones(root, virtual)
    for zone in zones:
        try:
            int(zone.energy.read_text())
        except PermissionError:
            if zone.counts:
                reason = f"{zone.energy.name} of {zone.name} may be read by root only (CVE-2020-8694)"
                return Absent(SOURCE, reason, PERMISSION_REMEDY)
        except (OSError, ValueError) as error:
            if zone.counts:
                return Absent(SOURCE, f"{zone.energy} cannot be read: {error}")
    return RaplProbe(zones, virtual=virtual, clock=clock)


def _no_zones(root: Path, virtual: bool) -> Absent:
    if virtual:
        return Absent(SOURCE, "no RAPL zone, and a virtual machine's host seldom lends it one")
    if "GenuineIntel" in first_processor(root) or _is_amd(root):
        return Absent(SOURCE, "no RAPL zone in /sys/class/powercap", "As root: modprobe intel_rapl_msr")
    return Absent(SOURCE, "this processor has no RAPL counters that Linux knows")


def _zones(folders: list[Path], *, without_cores: bool) -> tuple[Zone, ...]:
    """Packages and psys, each followed by the domains below it. A name that comes again is a twin."""
    zones: dict[str, Zone] = {}
    for folder in folders:
        name = _name(folder)
        counts = bool(_PACKAGE.fullmatch(name))
        if name in zones or not (counts or name == "psys"):
            continue
        zones[name] = _zone(folder, name, counts)
        for below in sorted(folder.parent.glob(f"{folder.name}:*")):
            part = _name(below)
            # AMD's core domain counts one core and calls it all of them.
            if _SUBZONE.fullmatch(below.name) and part and not (without_cores and part == "core"):
                zones.setdefault(f"{name}/{part}", _zone(below, f"{name}/{part}", counts=False))
    return tuple(zones.values())


def _zone(folder: Path, name: str, counts: bool) -> Zone:
    try:
        range_uj: int | None = int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        range_uj = None
    return Zone(name, folder / "energy_uj", range_uj or None, counts)


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def _counter(zone: Zone) -> int | str:
    try:
        return int(zone.energy.read_text())
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"


def _known(counter: int | str) -> int:
    if isinstance(counter, str):
        raise CounterError(counter)
    return counter


def _is_amd(root: Path) -> bool:
    return any(vendor in first_processor(root) for vendor in ("AuthenticAMD", "HygonGenuine"))
