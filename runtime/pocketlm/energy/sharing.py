"""Joules per answer while answers share an engine.

A probe sees the machine or the process, not an answer. So an answer is given the part of a window's energy
that is its part of what the engines computed meanwhile: `Timings.compute_s` over the engines' busy seconds.
That assumes that a second of the engines' work takes the same power whoever it is for, and it gives what the
machine takes while they are idle to the answers of the window too. An answer that was alone has all of it, as
if it were measured by itself; answers that cover all the work of one window add up to the window.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from pocketlm.energy.reading import Probe, Reading, Window
from pocketlm.errors import PocketlmError

T = TypeVar("T")

_WHOLE = 1 - 1e-9  # sums of seconds are rounded


class SharedMeter:
    """Windows for answers, which may overlap. From any thread; `begin` never waits."""

    def __init__(self, probe: Probe, busy_s: Callable[[], float]) -> None:
        """busy_s: seconds that all engines together have computed so far. It must not fall, so it keeps
        what engines that are closed meanwhile had (`Model.busy_s` stays)."""
        self.probe = probe
        self._busy_s = busy_s
        # One thread for what may wait: a window's begin is then never behind its end.
        self._worker = None if probe.quick else ThreadPoolExecutor(1, "pocketlm-energy-windows")
        self._closing = threading.Lock()
        self._closed = False

    def begin(self) -> SharedWindow:
        """Raises PocketlmError after `close`."""
        return SharedWindow(self, self._run(self._begin))

    def close(self) -> None:
        """Closes the probe; a second call does nothing. Windows under way should have ended: they may have no
        joules."""
        with self._closing:
            closed, self._closed = self._closed, True
        if closed:
            return
        if self._worker is not None:
            self._worker.shutdown()
        self.probe.close()

    def _begin(self) -> tuple[Window, float]:
        return self.probe.begin(), self._busy_s()

    def _run(self, work: Callable[[], T]) -> Future[T]:
        """A probe that is quick does it at once, another one on the meter's thread."""
        with self._closing:
            if self._closed:
                raise PocketlmError("The energy meter has been closed. Make another one.")
            if self._worker is not None:
                return self._worker.submit(work)
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future


class SharedWindow:
    """An answer under way."""

    def __init__(self, meter: SharedMeter, begun: Future[tuple[Window, float]]) -> None:
        self._meter = meter
        self._begun = begun

    def end(self, compute_s: float) -> Reading:
        """The energy of an answer, or of several together, that the engines computed for `compute_s` seconds
        of this window. It waits for the probe where that is not `quick`; an event loop takes `ending`.

        Nothing was computed for an answer that ended while it waited: it has 0 J, if there is a figure.
        Raises ValueError for seconds that are none, and PocketlmError after the meter's `close`.
        """
        return self.ending(compute_s).result()

    def ending(self, compute_s: float) -> Future[Reading]:
        """`end` that does not wait: for `await asyncio.wrap_future(window.ending(compute_s))`. One of the two
        is to be called, once."""
        if not (math.isfinite(compute_s) and compute_s >= 0):
            raise ValueError(f"compute_s is {compute_s}; seconds from 0 on are expected")
        return self._meter._run(lambda: self._end(compute_s))

    def _end(self, compute_s: float) -> Reading:
        window, busy_before_s = self._begun.result()
        # Before the window ends, as the begin's is read after it began: what follows is not in the window.
        busy_s = self._meter._busy_s() - busy_before_s
        reading = share_of(window.end(), compute_s, busy_s)
        return _with_length(reading, self._meter.probe.least_window_s)


def share_of(whole: Reading, compute_s: float, busy_s: float) -> Reading:
    """What of a window's energy belongs to an answer that took `compute_s` of the engines' `busy_s`.

    A flag names the share unless it is all. `busy_s` that is less than `compute_s`, by the time that the
    window's edges are late, counts as that. A reading without joules stays as it is.
    """
    if whole.energy_j is None:
        return whole
    share = compute_s / max(compute_s, busy_s) if compute_s > 0 else 0.0
    if share >= _WHOLE:
        return whole
    flag = f"share of {share:.3g} by the engines' time, as if all their work took the same power"
    return replace(
        whole,
        energy_j=share * whole.energy_j,
        low_j=None if whole.low_j is None else share * whole.low_j,
        high_j=None if whole.high_j is None else share * whole.high_j,
        parts_j={name: share * joules for name, joules in whole.parts_j.items()},
        flags=(*whole.flags, flag),
    )


def _with_length(reading: Reading, least_s: float) -> Reading:
    """With a flag where the window was too short to trust; some probes have set it themselves."""
    flag = f"the window is {reading.duration_s:.3g} s long; {reading.source} needs {least_s:g} s"
    if reading.energy_j is None or reading.duration_s >= least_s or flag in reading.flags:
        return reading
    return replace(reading, flags=(*reading.flags, flag))
