"""What a measurement of energy is, and what a probe has to do.

A probe watches one source of energy figures (a counter, a power sensor, a meter's log, an estimate).
`begin()` opens a window; the window's `end()` says what was used in between. Windows may overlap.

Readings of different scopes are never added and never compared: the package of a processor is a part of
its board, the board a part of what the wall delivers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, Protocol

Scope = Literal["wall", "device", "board", "soc", "package", "gpu", "process"]
"""What the joules cover: the plug; the whole device on battery; a board's rails; a system on a chip; a
processor package (cores and uncore); a graphics card; the share of one process."""

Kind = Literal["measured", "estimated"]

JOULES_PER_WH = 3600.0

_NO_PARTS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Reading:
    """The energy of one window. Where there is no figure, `energy_j` is None and `reason` says why."""

    source: str  # the probe's name, for example "rapl"
    scope: Scope
    kind: Kind
    duration_s: float  # on a monotonic clock
    energy_j: float | None
    low_j: float | None = None  # bounds of an estimate; None for a measurement
    high_j: float | None = None
    parts_j: Mapping[str, float] = field(default_factory=lambda: _NO_PARTS)  # by rail; they may overlap
    flags: tuple[str, ...] = ()  # what a reader has to know, for example "mains plugged in during the window"
    reason: str | None = None

    def __post_init__(self) -> None:
        for value in (self.energy_j, self.low_j, self.high_j, self.duration_s):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"a reading of {self.source} holds {value}; a finite number is expected")
        if (self.energy_j is None) == (self.reason is None):
            raise ValueError(f"a reading of {self.source} has either joules or a reason for having none")

    @property
    def power_w(self) -> float | None:
        """Mean power over the window."""
        return None if self.energy_j is None or self.duration_s <= 0 else self.energy_j / self.duration_s

    def as_object(self) -> dict[str, Any]:
        """As JSON has it, in the command line and in the server's answers: without the parts."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "parts_j"}


class Window(Protocol):
    """A measurement under way."""

    def end(self) -> Reading:
        """What was used since `begin()`. Never raises for a sensor that fails: the reading says why."""
        ...


class Probe(Protocol):
    """One source of energy figures."""

    @property
    def source(self) -> str:
        """Its name: short, lower case."""
        ...

    @property
    def scope(self) -> Scope: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def resolution_j(self) -> float | None:
        """The counter's smallest step in joules; None where power is sampled."""
        ...

    @property
    def least_window_s(self) -> float:
        """The shortest window that gives a figure to trust."""
        ...

    @property
    def quick(self) -> bool:
        """Whether `begin()` and `end()` only read counters, within about a millisecond, so that an event loop
        may call them. Others wait for a sensor, a program or a file."""
        ...

    def begin(self) -> Window: ...

    def close(self) -> None:
        """Gives back what the probe holds (threads, handles). Windows under way must have ended."""
        ...


@dataclass(frozen=True)
class Absent:
    """A source that cannot be used here, and what would help."""

    source: str
    reason: str  # "energy_uj is readable by root only"
    remedy: str | None = None  # a command or a rule; pocketlm never runs it by itself


CpuSeconds = Callable[[], float]
"""Seconds of processor time, user and system, that the observed process has used so far."""
