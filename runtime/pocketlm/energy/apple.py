"""Apple processors: the energy of the system on the chip after Apple's own model of it.

First choice is the package zeus-apple-silicon, which reads the counters of IOReport's group "Energy Model"
and needs no rights. Without it there is powermetrics, for root only: pocketlm uses it if it runs as root
already, and never calls sudo.

Both are a vendor's model of power rather than a sensor. The counters' sum here is processor, graphics, neural
engine and memory; powermetrics leaves memory out, so the two are not comparable. The graphics' SRAM is a part
by itself only, as Apple does not say whether the graphics hold it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from pocketlm.energy.powermetrics import COMMAND, MODEL, WITHOUT_MEMORY, PowermetricsProbe
from pocketlm.energy.reading import Absent, Kind, Reading, Scope

SOURCE = "apple"
INSTALL = "pip install zeus-apple-silicon, or run as root, where pocketlm can use powermetrics"

_TOTAL = {"cpu": "cpu_total_mj", "gpu": "gpu_mj", "ane": "ane_mj", "dram": "dram_mj"}
_APART = {"gpu_sram": "gpu_sram_mj"}

# What the C++ exceptions of zeus-apple-silicon become.
_ZEUS_ERRORS = (RuntimeError, ValueError, OSError)


class AppleProbe:
    """The counters that zeus-apple-silicon reads."""

    source = SOURCE
    scope: Scope = "soc"
    kind: Kind = "measured"
    resolution_j: float | None = 1e-3
    least_window_s = 10.0
    quick = True

    def __init__(self, monitor: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """monitor: a zeus_apple_silicon.AppleEnergyMonitor."""
        self._monitor = monitor
        self._clock = clock
        self._numbers = itertools.count()

    def begin(self) -> AppleWindow:
        return AppleWindow(self._monitor, f"pocketlm-{next(self._numbers)}", self._clock)

    def close(self) -> None:
        """Holds nothing."""


class AppleWindow:
    """A measurement under way."""

    def __init__(self, monitor: Any, key: str, clock: Callable[[], float]) -> None:
        self._monitor = monitor
        self._key = key
        self._clock = clock
        self._problem: str | None = None
        try:
            monitor.begin_window(key)
        except _ZEUS_ERRORS as error:
            self._problem = f"the counters could not be read at the start: {error}"
        self._start_s = clock()

    def end(self) -> Reading:
        duration_s = self._clock() - self._start_s
        if self._problem:
            return _none(duration_s, self._problem)
        try:
            metrics = self._monitor.end_window(self._key)
        except _ZEUS_ERRORS as error:
            return _none(duration_s, f"the counters could not be read at the end: {error}")
        return reading_of(metrics, duration_s)


def reading_of(metrics: Any, duration_s: float) -> Reading:
    """The reading for an AppleEnergyMetrics: fields in millijoules, None where a chip lacks them."""
    parts_j = {
        name: millijoules * 1e-3
        for name, field in (_TOTAL | _APART).items()
        if (millijoules := getattr(metrics, field, None)) is not None
    }
    if "cpu" not in parts_j:
        return _none(duration_s, "macOS gives no energy of the processor here")
    # Some systems' counters stand still unless a privileged tool samples them, and no processor uses 0 J.
    if parts_j["cpu"] <= 0:
        return _none(
            duration_s,
            f"the processor's counter did not move in {duration_s:.3g} s; on some versions of macOS it does "
            "only while powermetrics runs",
        )
    energy_j = sum(parts_j.get(name, 0.0) for name in _TOTAL)
    flags = (MODEL,) if parts_j.get("dram") else (MODEL, WITHOUT_MEMORY)
    return Reading(SOURCE, "soc", "measured", duration_s, energy_j, parts_j=parts_j, flags=flags)


def _none(duration_s: float, reason: str) -> Reading:
    return Reading(SOURCE, "soc", "measured", duration_s, None, reason=reason)


def find(
    load: Callable[[], Any] | None = None,
    is_root: Callable[[], bool] | None = None,
    platform: str = sys.platform,
) -> AppleProbe | PowermetricsProbe | Absent:
    """A probe for this Mac's processor, or why there is none. `load` imports zeus_apple_silicon."""
    if platform != "darwin":
        return Absent(SOURCE, "Apple's energy counters are a part of macOS")
    try:
        monitor = (load or _zeus)().AppleEnergyMonitor()
    except ImportError:
        reason = "the package zeus-apple-silicon is not installed"
    except _ZEUS_ERRORS as error:
        reason = f"zeus-apple-silicon finds no energy counters: {error}"
    else:
        return AppleProbe(monitor)
    if (is_root or _is_root)() and os.access(COMMAND[0], os.X_OK):
        return PowermetricsProbe()
    return Absent(SOURCE, reason, INSTALL)


def _zeus() -> Any:
    return importlib.import_module("zeus_apple_silicon")


def _is_root() -> bool:
    return os.geteuid() == 0
