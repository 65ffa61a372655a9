"""Engines and energy probes that do what a test's script says, in no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pocketlm.energy import Absent, Found, Reading, Scope, Window
from pocketlm.energy.reading import Kind
from pocketlm_benchmarks.cases import Work
from pocketlm_benchmarks.engines.process import Answered
from pocketlm_benchmarks.engines.protocol import EngineError, EngineInfo, EngineSpec, Query, Trace
from pocketlm_benchmarks.result import Case

INFO = EngineInfo("scripted", "1.0", "int8", 1000, 0.25, True)


def make_work(name: str = "tg4", kind: Any = "decode", *, concurrent: int = 1, new_tokens: int = 5) -> Work:
    """Two groups of small queries."""
    queries = [Query((n + 1,), new_tokens) for n in range(2 * concurrent)]
    groups = tuple(tuple(queries[begin : begin + concurrent]) for begin in (0, concurrent))
    return Work(Case(name, kind, 1.0, new_tokens, concurrent, "0" * 64), groups)


def make_trace(query: Query, *, prefill_s: float = 0.1, gap_s: float = 0.01) -> Trace:
    gaps_s = (gap_s,) * (query.new_tokens - 1)
    return Trace(
        prompt_tokens=len(query.prompt_ids),
        cached_tokens=0,
        new_tokens=query.new_tokens,
        prefill_s=prefill_s,
        decode_s=sum(gaps_s),
        decode_tokens=len(gaps_s),
        gaps_s=gaps_s,
        text="x" * query.new_tokens,
    )


@dataclass
class ScriptedEngine:
    """Answers with the gaps of its script in turn, the last one for ever; fails where it says an error."""

    spec: EngineSpec
    gaps_s: Sequence[float | EngineError] = (0.01,)
    log: list[tuple[str, tuple[Query, ...]]] = field(default_factory=list)
    info: EngineInfo = INFO
    pid: int = 1
    closed: bool = False
    _answers: int = 0

    def answer(self, queries: Sequence[Query]) -> Answered:
        step = self.gaps_s[min(self._answers, len(self.gaps_s) - 1)]
        self._answers += 1
        if isinstance(step, EngineError):
            raise step
        self.log.append((self.spec.kind, tuple(queries)))
        traces = tuple(make_trace(query, gap_s=step) for query in queries)
        return Answered(traces, (sum((trace.prefill_s or 0) + (trace.decode_s or 0) for trace in traces),))

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedProbe:
    """Each window uses as many joules as the script says next, over one second."""

    joules: list[float | None]
    source: str = "scripted"
    scope: Scope = "package"
    kind: Kind = "measured"
    resolution_j: float | None = 0.001
    least_window_s: float = 1.0
    open: int = 0
    closed: bool = False

    def begin(self) -> Window:
        self.open += 1
        return _ScriptedWindow(self)

    def close(self) -> None:
        self.closed = True


@dataclass
class _ScriptedWindow:
    probe: ScriptedProbe

    def end(self) -> Reading:
        probe = self.probe
        probe.open -= 1
        energy_j = probe.joules.pop(0) if len(probe.joules) > 1 else probe.joules[0]
        estimated = probe.kind == "estimated" and energy_j is not None
        return Reading(
            probe.source,
            probe.scope,
            probe.kind,
            1.0,
            energy_j,
            low_j=(energy_j or 0) / 2 if estimated else None,
            high_j=(energy_j or 0) * 2 if estimated else None,
            reason="the sensor went away" if energy_j is None else None,
        )


def found(probe: ScriptedProbe) -> Found:
    return Found(probe, (), (Absent("rapl", "there is none here", "buy another machine"),))
