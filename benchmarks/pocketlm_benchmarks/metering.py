"""Energy windows around the blocks of a run, and the idle power between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pocketlm.energy import Found, Kind, Probe, Scope, Window, find_probe
from pocketlm_benchmarks.result import EnergySetup, IdleWindow, Reference

ESTIMATE_WINDOW_S = 1.0
"""A block is at least this long: 100 ticks of the system's 10 ms processor clock."""
LEAST_STEPS, LEAST_J = 100, 20.0
"""What a measured block uses at least: steps of the counter's resolution, and joules."""

REFERENCES = [
    Reference("a web search", 0.3, 2009, "Google, as cited by EPRI 2024: historical"),
    Reference("a ChatGPT query", 2.9, 2023, "EPRI 2024 after de Vries 2023: historical"),
    Reference("a ChatGPT query", 0.3, 2025, "Epoch AI"),
    Reference("a ChatGPT query", 0.34, 2025, "OpenAI (Sam Altman)"),
    Reference("a median Gemini text prompt", 0.24, 2025, "Google"),
]
"""What others have published for one query, in Wh. Data centres count more than one chip in them."""


class Observed:
    """The processor time of the engine that is running now, with its children: what an estimate rests on."""

    def __init__(self) -> None:
        self.pid: int | None = None

    def __call__(self) -> float:
        if self.pid is None:
            return 0.0
        process = psutil.Process(self.pid)
        seconds = _cpu_seconds(process)
        with suppress(psutil.Error):
            for child in process.children(recursive=True):
                with suppress(psutil.Error):
                    seconds += _cpu_seconds(child)
        return seconds


def _cpu_seconds(process: psutil.Process) -> float:
    # Children that have ended are in their parent's times, and only there.
    times: Any = process.cpu_times()
    return float(
        sum(getattr(times, name, 0.0) for name in ("user", "system", "children_user", "children_system"))
    )


class Meter:
    """The most trusted probe of this device around blocks and idle windows."""

    def __init__(
        self,
        log: Path | None = None,
        *,
        find: Callable[..., Found] = find_probe,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.observed = Observed()
        self._found = find(meter=log, cpu_seconds=self.observed)
        self._probe: Probe = self._found.probe
        self._sleep = sleep

    @property
    def least_window_s(self) -> float:
        return max(self._probe.least_window_s, ESTIMATE_WINDOW_S)

    def block_s(self, power_w: float | None) -> float:
        """How long a block has to be at that power."""
        least_s = self.least_window_s
        if self._probe.kind == "measured" and power_w:
            least_s = max(
                least_s, LEAST_J / power_w, LEAST_STEPS * (self._probe.resolution_j or 0.0) / power_w
            )
        return least_s

    @property
    def sees_the_system(self) -> bool:
        """Whether idle power shows in the readings, and the work of a process that is not ours."""
        return self._probe.scope != "process"

    def begin(self, pid: int) -> Window:
        """Measures what the engine with this process does, until the window's end."""
        self.observed.pid = pid
        return self._probe.begin()

    def idle(self, pid: int) -> IdleWindow:
        """A window in which nothing is asked of the engines."""
        window = self.begin(pid)
        started_unix_s = time.time()
        self._sleep(self.least_window_s)
        reading = window.end()
        return IdleWindow(started_unix_s, reading.duration_s, reading.power_w)

    def setup(self, idle: Sequence[IdleWindow], cross_check: dict[str, float]) -> EnergySetup:
        probe = self._probe
        return EnergySetup(
            source=probe.source,
            scope=probe.scope,
            kind=probe.kind,
            resolution_j=probe.resolution_j,
            least_window_s=self.least_window_s,
            note=note(probe.scope, probe.kind),
            absent={each.source: _why(each.reason, each.remedy) for each in self._found.absent},
            cross_check=cross_check,
            references=REFERENCES,
            idle=list(idle),
        )

    def close(self) -> None:
        for probe in (self._probe, *self._found.others):
            probe.close()


def note(scope: Scope, kind: Kind) -> str:
    """What a reader has to know of all figures from such a source."""
    if scope == "process":
        return (
            "An estimate from processor time, not a measurement: it holds no idle power and nothing beside "
            "the processor's cores, its interval is wide, its ratios are those of processor time."
        )
    told = "Idle power is subtracted in the marginal figures."
    if kind == "measured":
        return f"Measured. {told}"
    return (
        "An estimate, not a measurement: the counters of a virtual machine are what its host attributes to "
        f"it, and the interval is wide. {told}"
    )


def _why(reason: str, remedy: str | None) -> str:
    return reason if remedy is None else f"{reason} ({remedy})"
