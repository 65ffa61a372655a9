"""The run: engines in alternation, speed and energy from the same windows.

    for each round: idle
        for each case, in random order:
            for each engine, in random order: a block of queries in one energy window
    idle

Blocks of one case stand next to one another, so a ratio compares what the device did within seconds. The
warm-up ends when an engine's times have settled, and tells how many queries fill a window.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pocketlm.energy import Window
from pocketlm.progress import Progress
from pocketlm_benchmarks.cases import Work
from pocketlm_benchmarks.engines.protocol import EngineError, EngineMissingError, EngineSpec, Trace
from pocketlm_benchmarks.figures import Raw, RawBlock
from pocketlm_benchmarks.loads import Loads, RunningEngine, Start, load
from pocketlm_benchmarks.memory import memory_of
from pocketlm_benchmarks.metering import Meter
from pocketlm_benchmarks.result import OURS, IdleWindow, Memory
from pocketlm_benchmarks.statistics import settled

IDLE_DRIFT = 0.10  # idle powers before and after a round that differ by more are flagged


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    engines: Mapping[str, EngineSpec]  # by name, ours among them
    works: Sequence[Work]
    rounds: int
    seed: int
    warm_loads: int = 3  # of ours; a peer is loaded warm once
    warm_up_most: int = 6


@dataclass
class Contender:
    """One engine and all that was measured of it."""

    name: str
    spec: EngineSpec
    engine: RunningEngine | None = None
    loads: Loads | None = None
    memory: Memory | None = None
    skipped: str | None = None
    warm_up: int = 0
    raw: dict[str, Raw] = field(default_factory=dict)  # by case
    refused: dict[str, str] = field(default_factory=dict)  # by case: why it is not measured
    groups: dict[str, int] = field(default_factory=dict)  # by case: groups of queries in a block
    used: dict[str, int] = field(default_factory=dict)  # by case: groups handed over so far


class Run:
    """One run of a plan. `meter` is None where energy is not asked for."""

    def __init__(self, plan: Plan, start: Start, meter: Meter | None, progress: Progress) -> None:
        self._plan = plan
        self._start = start
        self._meter = meter
        self._progress = progress
        self._random = random.Random(plan.seed)
        self.idle: list[IdleWindow] = []
        self.contenders = [Contender(name, spec) for name, spec in plan.engines.items()]

    @property
    def ours(self) -> Contender:
        return next(each for each in self.contenders if each.name == OURS)

    @property
    def pids(self) -> list[int]:
        """Processes of the engines that run now."""
        return [each.engine.pid for each in self.contenders if each.engine is not None]

    def measure(self, then: Callable[[Contender], None] | None = None) -> None:
        """Fills the contenders; `then` gets ours while it is still loaded. All engines are closed behind it.

        A peer that fails is skipped with its message; ours raises EngineError.
        """
        try:
            self._load()
            self._warm_up()
            self._rounds()
            for each in self._loaded():
                engine = _engine(each)
                # Where another process computes, this one says nothing of what the model takes.
                each.memory = memory_of(engine.pid) if engine.info.energy_seen == "process" else None
            if then is not None:
                then(self.ours)
        finally:
            for each in self.contenders:
                self._close(each)

    def _load(self) -> None:
        for done, each in enumerate(self.contenders):
            self._progress("Loading", done, len(self.contenders), "engines")
            try:
                warm = self._plan.warm_loads if each.name == OURS else 1
                each.engine, each.loads = load(each.spec, self._start, warm=warm)
            except EngineError as error:
                self._drop(each, error)
        self._progress("Loading", len(self.contenders), len(self.contenders), "engines")

    def _warm_up(self) -> None:
        pairs = [(each, work) for work in self._plan.works for each in self._loaded()]
        for done, (each, work) in enumerate(pairs):
            self._progress("Warming up", done, len(pairs), "cases")
            if each.engine is None:  # it failed on a case before
                continue
            try:
                self._warm_up_case(each, work)
            except EngineMissingError as error:
                if each.name == OURS:
                    raise
                each.refused[work.case.name] = str(error)
            except EngineError as error:
                self._drop(each, error)
        self._progress("Warming up", len(pairs), len(pairs), "cases")

    def _warm_up_case(self, each: Contender, work: Work) -> None:
        """Until the times have settled; then as many groups go into a block as its window takes."""
        walls_s: list[float] = []
        powers_w: list[float] = []
        while len(walls_s) < self._plan.warm_up_most and not settled(walls_s):
            block = self._block(each, work, groups=1, round_=-1)
            walls_s += block.walls_s
            if block.reading is not None and block.reading.power_w is not None:
                powers_w.append(block.reading.power_w)
        each.warm_up += len(walls_s)
        groups = 1
        if self._meter is not None:
            block_s = self._meter.block_s(statistics.median(powers_w) if powers_w else None)
            groups = max(1, math.ceil(block_s / statistics.median(walls_s)))
        each.groups[work.case.name] = groups
        each.raw[work.case.name] = Raw(_engine(each).info)

    def _rounds(self) -> None:
        rounds = [list(self._order()) for _ in range(self._plan.rounds)]
        done, total = 0, sum(map(len, rounds))
        self._measure_idle()
        for round_, blocks in enumerate(rounds):
            for each, work in blocks:
                self._progress("Measuring", done, total, "blocks")
                done += 1
                if each.engine is None:
                    continue
                try:
                    block = self._block(each, work, groups=each.groups[work.case.name], round_=round_)
                except EngineError as error:
                    self._drop(each, error)
                    continue
                each.raw[work.case.name].blocks.append(block)
            self._measure_idle()
            self._note_idle(round_)
        self._progress("Measuring", total, total, "blocks")

    def _order(self) -> Iterator[tuple[Contender, Work]]:
        """The blocks of one round."""
        works = list(self._plan.works)
        self._random.shuffle(works)
        for work in works:
            contenders = [each for each in self._loaded() if work.case.name in each.groups]
            self._random.shuffle(contenders)
            yield from ((each, work) for each in contenders)

    def _block(self, each: Contender, work: Work, *, groups: int, round_: int) -> RawBlock:
        engine = _engine(each)
        traces: list[Trace] = []
        walls_s: list[float] = []
        first = each.used.get(work.case.name, 0)
        each.used[work.case.name] = first + groups
        window = self._window(engine)
        started_unix_s, started_s = time.time(), time.monotonic()
        try:
            for n in range(first, first + groups):
                answered = engine.answer(work.groups[n % len(work.groups)])
                traces += answered.traces
                walls_s += answered.walls_s
        finally:
            duration_s = time.monotonic() - started_s
            reading = None if window is None else window.end()
        return RawBlock(
            round=round_,
            started_unix_s=started_unix_s,
            duration_s=duration_s if reading is None else reading.duration_s,
            traces=traces,
            walls_s=walls_s,
            reading=reading,
        )

    def _window(self, engine: RunningEngine) -> Window | None:
        """None where the readings would leave out what the engine uses, or hold what is not its own."""
        if self._meter is None or engine.info.energy_seen == "never":
            return None
        if engine.info.energy_seen == "machine" and not self._meter.sees_the_system:
            return None
        return self._meter.begin(engine.pid)

    def _measure_idle(self) -> None:
        if self._meter is not None:
            self.idle.append(self._meter.idle(_engine(self.ours).pid))

    def _note_idle(self, round_: int) -> None:
        """Gives the round's blocks the idle power around them."""
        if not self.idle:
            return
        before_w, after_w = (window.power_w for window in self.idle[-2:])
        if before_w is None or after_w is None:
            return
        mean_w = (before_w + after_w) / 2
        drifted = abs(after_w - before_w) > IDLE_DRIFT * mean_w
        for raw in (raw for each in self.contenders for raw in each.raw.values()):
            for block in raw.blocks:
                if block.round == round_:
                    block.idle_power_w = mean_w
                    if drifted and self._meter is not None and self._meter.sees_the_system:
                        block.flags.append(f"idle power went from {before_w:.1f} to {after_w:.1f} W")

    def _loaded(self) -> list[Contender]:
        return [each for each in self.contenders if each.engine is not None]

    def _drop(self, each: Contender, error: EngineError) -> None:
        if each.name == OURS:
            raise error
        each.skipped = str(error)
        each.raw.clear()
        self._close(each)

    def _close(self, each: Contender) -> None:
        if each.engine is not None:
            each.engine.close()
            each.engine = None


def _engine(each: Contender) -> RunningEngine:
    if each.engine is None:
        raise EngineError(f"{each.name} is not loaded")
    return each.engine
