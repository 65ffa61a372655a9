"""The same load without a pause: what is left of a rate when the device has become warm.

A phone lost half of its rate within two answers (arXiv 2603.23640), so a burst says little about an hour.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

from pocketlm.errors import InvalidSettingError
from pocketlm.progress import Progress
from pocketlm_benchmarks.cases import Work
from pocketlm_benchmarks.conditions import Sensors, sensors
from pocketlm_benchmarks.engines.protocol import EngineError
from pocketlm_benchmarks.figures import SLOWED_FROM
from pocketlm_benchmarks.loads import RunningEngine
from pocketlm_benchmarks.metering import Meter
from pocketlm_benchmarks.result import Sustained, SustainedPoint
from pocketlm_benchmarks.statistics import drift

POINTS = 60
"""Intervals that the duration is cut into, unless they would be shorter than the probe's least window."""
LEAST_POINTS = 6
"""Intervals that there are even with a probe whose least window is a large part of the duration."""
_THIRDS = 3

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


class _Interval(NamedTuple):
    began_s: float
    ended_s: float
    tokens: int
    decode_s: float
    power_w: float | None
    sensors: Sensors


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `10m` or `1h`. Raises InvalidSettingError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if match is None or not float(match[1]):
        raise InvalidSettingError(f"the duration is {text!r}; a number with s, m or h is expected: 10m.")
    return float(match[1]) * _UNITS_S[match[2]]


def sustain(
    engine: RunningEngine,
    work: Work,
    duration_s: float,
    meter: Meter | None,
    progress: Progress,
    *,
    clock: Callable[[], float] = time.monotonic,
    read_sensors: Callable[[], Sensors] = sensors,
) -> Sustained:
    """Decodes the queries of `work` for `duration_s`, over and over, but for three answers at least.

    Raises EngineError.
    """
    intervals = list(_intervals(engine, work, duration_s, meter, progress, clock, read_sensors))
    points = [
        SustainedPoint(
            t_s=(each.began_s + each.ended_s) / 2,
            decode_tokens_per_s=each.tokens / each.decode_s,
            power_w=each.power_w,
            temperature_c=each.sensors.temperature_c,
            frequency_hz=each.sensors.frequency_hz,
        )
        for each in intervals
    ]
    last_over_first = drift([point.decode_tokens_per_s for point in points])
    flags = []
    if 1 / last_over_first > SLOWED_FROM:
        flags.append(f"slowed down: the last third ran at {last_over_first:.0%} of the first third's rate")
    first, last = intervals[0].sensors.throttles, intervals[-1].sensors.throttles
    if first is not None and last is not None and last > first:
        flags.append(f"throttled: the system counted {last - first} events")
    return Sustained(intervals[-1].ended_s, points, last_over_first, flags)


def _intervals(
    engine: RunningEngine,
    work: Work,
    duration_s: float,
    meter: Meter | None,
    progress: Progress,
    clock: Callable[[], float],
    read_sensors: Callable[[], Sensors],
) -> Iterator[_Interval]:
    groups = cycle(work.groups)
    window_s = 0.0 if meter is None else meter.least_window_s
    least_s = max(duration_s / POINTS, min(window_s, duration_s / LEAST_POINTS))
    started_s = clock()
    done = 0
    while (begun_s := clock() - started_s) < duration_s or done < _THIRDS:
        progress("Sustained load", int(min(begun_s, duration_s)), int(duration_s), "s")
        tokens, decode_s = 0, 0.0
        window = None if meter is None else meter.begin(engine.pid)
        while True:
            for trace in engine.answer(next(groups)).traces:
                tokens += trace.decode_tokens
                decode_s += trace.decode_s or 0.0
            if not decode_s:
                raise EngineError("the engine does not tell how long it decodes")
            ended_s = clock() - started_s
            if ended_s - begun_s >= least_s:
                break
        power_w = None if window is None else window.end().power_w
        yield _Interval(begun_s, ended_s, tokens, decode_s, power_w, read_sensors())
        done += 1
    progress("Sustained load", int(duration_s), int(duration_s), "s")
