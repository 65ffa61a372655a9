"""Power sensors: watts, read at intervals and integrated into joules.

`SampledProbe` needs only a function that reads the power of each rail now. While a window is open, one daemon
thread for all windows takes a sample every `interval_s`; `begin()` and `end()` each take one more, or make do
with a fresh one (`held_s`), so that a window is integrated from edge to edge. Windows that touch add up to
the window around them, exactly.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

from pocketlm.energy.reading import Kind, Reading, Scope
from pocketlm.errors import PocketlmError

_INTERVALS_BRIDGED = 5
_SECONDS_BRIDGED = 1.0  # a busy processor may keep the thread waiting for that long


class WindowSpoiledError(PocketlmError):
    """Raised by a `read_power_w` when the figure would no longer be what the probe stands for.

    All open windows end without joules, and the message is their reason: "the charger was plugged in".
    A read that merely fails raises anything else; that leaves a gap which a later sample may close.
    """


def sum_of_rails(power_w: Mapping[str, float]) -> float:
    """The total of rails that do not overlap."""
    return math.fsum(power_w.values())


@dataclass(frozen=True)
class _Sample:
    t_s: float
    power_w: Mapping[str, float]  # by rail
    total_w: float


class SampledProbe:
    """A probe over a power sensor."""

    resolution_j: float | None = None
    quick = False  # a sample may start a program or wait on a slow bus

    def __init__(
        self,
        source: str,
        scope: Scope,
        kind: Kind,
        read_power_w: Callable[[], Mapping[str, float]],
        interval_s: float,
        *,
        total: Callable[[Mapping[str, float]], float] = sum_of_rails,
        least_window_s: float = 60.0,
        longest_gap_s: float | None = None,
        held_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        flags: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """
        read_power_w: watts by rail, now; the same rails each time. Whatever it raises leaves a gap, but
            WindowSpoiledError ends the windows.
        total: what the probe stands for, in watts, from the rails; they may overlap or be incomplete.
        longest_gap_s: the longest time between two good samples that a straight line may bridge; a window
            with a longer one has no joules. Default: 5 intervals, at least a second.
        held_s: the edge of a window makes do with a sample that is no older. For a read that costs so much
            that many windows a minute would disturb what they measure.
        flags: what a reader has to know, asked with each sample; a window's reading carries all it saw.

        A test gives a `clock` of its own and an interval of hours, and calls `sample_now()`.
        """
        self.source = source
        self.scope: Scope = scope
        self.kind: Kind = kind
        self.least_window_s = least_window_s
        self.longest_gap_s = (
            max(_INTERVALS_BRIDGED * interval_s, _SECONDS_BRIDGED) if longest_gap_s is None else longest_gap_s
        )
        self._read_power_w = read_power_w
        self._total = total
        self._flags = flags
        self._interval_s = interval_s
        self._held_s = held_s
        # With its flags; None too where a read has failed since.
        self._newest: tuple[_Sample, Sequence[str]] | None = None
        self._clock = clock
        # Weak, so that the thread ends although its caller lost a window to an exception.
        self._windows: WeakSet[SampledWindow] = WeakSet()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._state = threading.Condition(threading.RLock())

    def begin(self) -> SampledWindow:
        with self._state:
            window = SampledWindow(self, self._clock())
            if self._closed:
                window._spoiled = "the probe was closed before the window"
                return window
            self._windows.add(window)
            self._sample_edge()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._sample_until_idle, name=f"pocketlm-energy-{self.source}", daemon=True
                )
                self._thread.start()
        return window

    def sample_now(self) -> float:
        """Takes one sample for all open windows. Returns the time it stands for, on the probe's clock."""
        with self._state:
            now_s = self._clock()
            self._newest = None
            try:
                sample = self._sample(now_s)
                flags = self._flags() if self._flags else ()
            except WindowSpoiledError as error:
                for window in self._windows:
                    window._spoiled = window._spoiled or str(error)
            # Anything may come out of a sensor's file or tool, and in the thread nobody would see it.
            except Exception as error:
                for window in self._windows:
                    window._failure = _describe(error)
            else:
                self._newest = sample, flags
                for window in self._windows:
                    window._add(sample, flags)
            return now_s

    def _sample_edge(self) -> float:
        """A sample where a window begins or ends. Returns the time it stands for."""
        if self._newest is None or self._clock() - self._newest[0].t_s >= self._held_s:
            return self.sample_now()
        sample, flags = self._newest
        now_s = self._clock()
        # For all windows, so that those that touch add up as they do with a sample of their own.
        for window in self._windows:
            window._add(replace(sample, t_s=now_s), flags)
        return now_s

    def close(self) -> None:
        """Ends the thread for good. A window still open, or begun later, has no joules."""
        with self._state:
            self._closed = True
            for window in self._windows:
                window._spoiled = window._spoiled or "the probe was closed during the window"
            self._windows.clear()
            self._state.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _sample(self, now_s: float) -> _Sample:
        power_w = dict(self._read_power_w())
        sample = _Sample(now_s, power_w, self._total(power_w))
        for value in (*power_w.values(), sample.total_w):
            if not math.isfinite(value):
                raise ValueError(f"the sensor gave {value} W")
        return sample

    def _sample_until_idle(self) -> None:
        with self._state:
            while self._windows:
                # True means woken: the last window has ended, or another has begun since.
                if not self._state.wait(self._interval_s):
                    self.sample_now()
            self._thread = None

    def _end(self, window: SampledWindow) -> Reading:
        with self._state:
            now_s = self._sample_edge() if window in self._windows else self._clock()
            self._windows.discard(window)
            if not self._windows:
                self._state.notify_all()
            return window._reading(now_s)


class SampledWindow:
    """One window of a `SampledProbe`: the running trapezoid sums of its samples."""

    def __init__(self, probe: SampledProbe, began_s: float) -> None:
        self._probe = probe
        self._began_s = began_s
        self._last: _Sample | None = None
        self._energy_j = 0.0
        self._parts_j: dict[str, float] = {}
        self._gap_s = 0.0  # the longest so far
        self._flags: dict[str, None] = {}  # an ordered set
        self._failure: str | None = None  # of the last read that failed
        self._spoiled: str | None = None
        self._ended: Reading | None = None

    def end(self) -> Reading:
        """What was used since `begin()`; a second call gives the same again."""
        if self._ended is None:
            self._ended = self._probe._end(self)
        return self._ended

    def _add(self, sample: _Sample, flags: Sequence[str] = ()) -> None:
        # If the first reads failed, the first good one stands for the time since the window began.
        before = self._last or replace(sample, t_s=self._began_s)
        if sample.power_w.keys() != before.power_w.keys():
            self._failure = f"the rails changed from {_names(before)} to {_names(sample)}"
            return
        elapsed_s = sample.t_s - before.t_s
        self._energy_j += (before.total_w + sample.total_w) / 2 * elapsed_s
        for rail, watts in sample.power_w.items():
            joules = (before.power_w[rail] + watts) / 2 * elapsed_s
            self._parts_j[rail] = self._parts_j.get(rail, 0.0) + joules
        self._gap_s = max(self._gap_s, elapsed_s)
        self._flags.update(dict.fromkeys(flags))
        self._last = sample

    def _reading(self, now_s: float) -> Reading:
        probe, duration_s = self._probe, now_s - self._began_s
        if self._last is not None:
            self._add(replace(self._last, t_s=now_s))  # the last read may have failed
        reason = self._spoiled or self._gap_reason()
        if reason is not None:
            return Reading(
                probe.source,
                probe.scope,
                probe.kind,
                duration_s,
                energy_j=None,
                flags=tuple(self._flags),
                reason=reason,
            )
        if duration_s < probe.least_window_s:
            self._flags[
                f"the window is {duration_s:.3g} s long; {probe.source} needs {probe.least_window_s:g} s"
            ] = None
        return Reading(
            probe.source,
            probe.scope,
            probe.kind,
            duration_s,
            self._energy_j,
            parts_j=self._parts_j,
            flags=tuple(self._flags),
        )

    def _gap_reason(self) -> str | None:
        last_failure = f" (last failure: {self._failure})" if self._failure else ""
        if self._last is None:
            return f"no sample could be read{last_failure}"
        if self._gap_s > self._probe.longest_gap_s:
            return (
                f"no sample for {self._gap_s:.3g} s, and at most {self._probe.longest_gap_s:g} s "
                f"can be bridged{last_failure}"
            )
        return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _names(sample: _Sample) -> str:
    return ", ".join(sample.power_w) or "none"
