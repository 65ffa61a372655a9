"""An external meter: the log of a plug or a bench meter, joined by wall-clock time.

The log is a CSV file of timestamps and watts that another program writes:

    timestamp;power_w                         a header is optional
    2026-11-22T10:00:00.5Z;12,5               ISO 8601, or seconds since 1970
    1795341601.5;13.1

Delimiters are , ; | or a tab. A time without a zone is this machine's local time. A decimal comma is read as
one where nothing else can be meant: in a file delimited by commas only inside quotes, and `1,250` only in a
file that proves elsewhere that its commas are decimal. Empty lines and lines that begin with # are skipped.
"""

from __future__ import annotations

import bisect
import csv
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from pocketlm.energy.reading import Kind, Reading, Scope
from pocketlm.errors import PocketlmError

SOURCE = "meter"

_INTERVALS_BRIDGED = 5
_CLOCK_STEP_S = 0.5
_LATEST_S = 1e11  # seconds since 1970 are below that for three thousand years, milliseconds above it
_DELIMITERS = ";\t|,"  # commas last: in a line with another of these they are decimal
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_MAYBE_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
_TIME_COLUMN = re.compile(r"time|date|epoch", re.IGNORECASE)
_POWER_COLUMN = re.compile(r"power|watt|^w$|_w$|[\[(]w[\])]", re.IGNORECASE)
_OTHER_UNIT = re.compile(r"(^|[^a-z])[mk]w($|[^a-z])|milliwatt|kilowatt", re.IGNORECASE)


class MeterLogError(PocketlmError):
    """A meter's log that cannot be read or understood."""


@dataclass(frozen=True)
class Log:
    """Power samples in the order of their times, which never fall."""

    times_s: tuple[float, ...]  # since 1970
    power_w: tuple[float, ...]

    def bridged_s(self) -> float:
        """The longest time between samples that a straight line may bridge: 5 usual intervals."""
        intervals_s = [later - sooner for sooner, later in pairwise(self.times_s)]
        return _INTERVALS_BRIDGED * statistics.median(intervals_s) if intervals_s else 0.0


class MeterLog:
    """A probe over a meter's log, which may still be growing: `end()` reads the file as it is then.

    The log's last sample may be a few of its intervals older than the window's end; it is then held, and a
    flag says for how long.
    """

    source = SOURCE
    scope: Scope = "wall"
    kind: Kind = "measured"
    resolution_j: float | None = None
    least_window_s = 60.0
    quick = False  # the end reads the whole log

    def __init__(
        self,
        path: Path,
        offset_s: float = 0.0,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """offset_s: what to add to the log's times to get this machine's."""
        self.path = path
        self.offset_s = offset_s
        self._wall_clock = wall_clock
        self._clock = clock

    def begin(self) -> MeterWindow:
        return MeterWindow(self)

    def close(self) -> None:
        """Holds nothing."""


class MeterWindow:
    """One window of a `MeterLog`."""

    def __init__(self, probe: MeterLog) -> None:
        self._probe = probe
        self._began_unix_s, self._began_s = probe._wall_clock(), probe._clock()

    def end(self) -> Reading:
        probe = self._probe
        now_unix_s, duration_s = probe._wall_clock(), probe._clock() - self._began_s
        step_s = now_unix_s - self._began_unix_s - duration_s
        if abs(step_s) > _CLOCK_STEP_S:
            return _missing(duration_s, f"the system's clock was set by {step_s:+.3g} s during the window")
        try:
            log = read_log(probe.path, growing=True)
        except MeterLogError as error:
            return _missing(duration_s, str(error))
        began_s = self._began_unix_s - probe.offset_s
        return integrate(log, began_s, began_s + duration_s)


def energy_between(path: Path, start_unix_s: float, stop_unix_s: float, *, offset_s: float = 0.0) -> Reading:
    """The joules that a finished log holds between two wall-clock times.

    offset_s: what to add to the log's times to get those of `start_unix_s` and `stop_unix_s`.
    A log that does not cover them gives a reading without joules. Raises MeterLogError for a log that cannot
    be read, and for a stop before the start.
    """
    if stop_unix_s < start_unix_s:
        raise MeterLogError(f"the window stops at {stop_unix_s}, before it starts at {start_unix_s}.")
    return integrate(read_log(path), start_unix_s - offset_s, stop_unix_s - offset_s)


def read_log(path: Path, *, growing: bool = False) -> Log:
    """All samples of the log at `path`. Of a `growing` one, a last line without its end is left for later.

    Raises MeterLogError with the number of the line that cannot be understood.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MeterLogError(f"The meter's log {path} cannot be read: {error}.") from None
    if growing:
        text = text[: text.rfind("\n") + 1]
    return _parse(text, str(path))


def integrate(log: Log, start_s: float, stop_s: float) -> Reading:
    """The joules between two of the log's times, by the trapezoid rule; edges lie on lines between them."""
    duration_s = stop_s - start_s
    times_s = log.times_s
    if not times_s:
        return _missing(duration_s, "the log has no samples yet")
    bridged_s = log.bridged_s()
    late_s, early_s = max(0.0, times_s[0] - start_s), max(0.0, stop_s - times_s[-1])
    if late_s > bridged_s:
        return _missing(duration_s, f"the log begins {late_s:.3g} s after the window did")
    if early_s > bridged_s:
        return _missing(duration_s, f"the log ends {early_s:.3g} s before the window did")
    first = max(bisect.bisect_right(times_s, start_s) - 1, 0)
    last = min(bisect.bisect_left(times_s, stop_s), len(times_s) - 1)
    gaps_s = (times_s[index + 1] - times_s[index] for index in range(first, last))
    if (gap_s := max(gaps_s, default=0.0)) > bridged_s:
        return _missing(
            duration_s, f"the log has a gap of {gap_s:.3g} s, and at most {bridged_s:.3g} s can be bridged"
        )
    after_start, at_stop = bisect.bisect_right(times_s, start_s), bisect.bisect_left(times_s, stop_s)
    points = [
        (start_s, _power_before(log, after_start, start_s)),
        *((times_s[index], log.power_w[index]) for index in range(after_start, at_stop)),
        (stop_s, _power_before(log, at_stop, stop_s)),
    ]
    energy_j = math.fsum(
        (power_w + next_power_w) / 2 * (next_t_s - t_s)
        for (t_s, power_w), (next_t_s, next_power_w) in pairwise(points)
    )
    held = [
        f"the log's {which} sample was held for {held_s:.3g} s"
        for which, held_s in (("first", late_s), ("last", early_s))
        if held_s > 0
    ]
    return Reading(SOURCE, "wall", "measured", duration_s, energy_j, flags=tuple(held))


def _power_before(log: Log, index: int, t_s: float) -> float:
    """Watts at a time between sample `index` and the one before it; beyond an end of the log, that end's."""
    if index == 0:
        return log.power_w[0]
    if index == len(log.times_s):
        return log.power_w[-1]
    sooner_s, later_s = log.times_s[index - 1], log.times_s[index]
    share = (t_s - sooner_s) / (later_s - sooner_s)
    return log.power_w[index - 1] + share * (log.power_w[index] - log.power_w[index - 1])


def _missing(duration_s: float, reason: str) -> Reading:
    return Reading(SOURCE, "wall", "measured", duration_s, None, reason=reason)


# Reading the file.


def _parse(text: str, where: str) -> Log:
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        return Log((), ())
    delimiter = next((mark for mark in _DELIMITERS if mark in lines[0][1]), ",")
    rows = [(number, _fields(line, delimiter)) for number, line in lines]
    header = rows[0][1] if not any(map(_is_value, rows[0][1])) else ()
    time_column, power_column = _columns(header, rows[0], where)
    width = len(rows[0][1])
    rows = rows[1:] if header else rows
    parse = _number_parser(fields[power_column] for _, fields in rows if len(fields) == width)
    samples: list[tuple[float, float]] = []
    for number, fields in rows:
        try:
            samples.append(_sample(fields, width, time_column, power_column, parse))
        except ValueError as error:
            raise MeterLogError(f"{where}, line {number}: {error}") from None
        if len(samples) > 1 and samples[-1][0] < samples[-2][0]:
            raise MeterLogError(
                f"{where}, line {number}: its time {fields[time_column]!r} is before that of the line above. "
                "Sort the log, or give its times a zone if the clocks changed."
            )
    return Log(tuple(t_s for t_s, _ in samples), tuple(watts for _, watts in samples))


def _sample(
    fields: list[str], width: int, time_column: int, power_column: int, parse: Callable[[str], float]
) -> tuple[float, float]:
    if len(fields) != width:
        raise ValueError(f"{len(fields)} columns ({', '.join(fields)}), and {width} in the first line.")
    return _unix_s(fields[time_column], parse), parse(fields[power_column])


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:  # a line beyond csv's limit: its one field is no number
        return [line[:80]]


def _columns(header: Sequence[str], first: tuple[int, list[str]], where: str) -> tuple[int, int]:
    """Which columns hold time and watts: those that the header names so, else the only two."""
    number, fields = first
    times = [index for index, name in enumerate(header) if _TIME_COLUMN.search(name)]
    powers = [
        index
        for index, name in enumerate(header)
        if index not in times and (_POWER_COLUMN.search(name) or _OTHER_UNIT.search(name))
    ]
    if len(times) == 1 and len(powers) == 1:
        columns = times[0], powers[0]
    elif len(fields) == 2 and not powers:
        columns = 0, 1
    else:
        raise MeterLogError(
            f"{where}, line {number}: {len(fields)} columns ({', '.join(fields)}). "
            "Two are expected, time and watts, or a header that names one of them time and one power_w."
        )
    if header and _OTHER_UNIT.search(header[columns[1]]):
        raise MeterLogError(f"{where}, line {number}: the column {header[columns[1]]!r}; watts are expected.")
    return columns


def _number_parser(power_texts: Iterable[str]) -> Callable[[str], float]:
    """How to read this file's numbers."""
    commas_are_decimal = any(
        _DECIMAL_COMMA.fullmatch(text) and not _MAYBE_THOUSANDS.fullmatch(text) for text in power_texts
    )

    def parse(text: str) -> float:
        if _MAYBE_THOUSANDS.fullmatch(text) and not commas_are_decimal:
            raise ValueError(f"{text!r} may be thousands or decimals; write decimals with a point.")
        return _number(_with_point(text))

    return parse


def _with_point(text: str) -> str:
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no number.")
    return value


def _unix_s(text: str, parse: Callable[[str], float]) -> float:
    try:
        value = parse(text)
    except ValueError:
        try:
            return datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            raise ValueError(f"{text!r} is neither seconds since 1970 nor ISO 8601.") from None
    if abs(value) >= _LATEST_S:
        raise ValueError(f"{text!r} looks like milliseconds; seconds since 1970 are expected.")
    return value


def _is_value(field: str) -> bool:
    """Whether a field of the first line is data rather than a column's name."""
    try:
        _unix_s(field, lambda text: _number(_with_point(text)))
    except ValueError:
        return False
    return True
