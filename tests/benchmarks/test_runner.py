"""The run: alternation, blocks as long as their window, idle power, engines that fail."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from helpers.scripted import INFO, ScriptedEngine, ScriptedProbe, found, make_work
from pocketlm_benchmarks import metering, runner
from pocketlm_benchmarks.cases import Work
from pocketlm_benchmarks.engines.protocol import EngineError, EngineMissingError, EngineSpec
from pocketlm_benchmarks.metering import Meter
from pocketlm_benchmarks.runner import Contender, Plan, Run

Scripts = dict[str, Sequence[float | EngineError]]


class Stage:
    """Starts scripted engines, whose log is shared."""

    def __init__(
        self,
        scripts: Scripts,
        refuse: dict[str, EngineError] | None = None,
        seen: dict[str, Any] | None = None,
    ) -> None:
        self.scripts = scripts
        self.refuse = refuse or {}
        self.seen = seen or {}
        self.log: list[tuple[str, Any]] = []
        self.engines: list[ScriptedEngine] = []

    def start(self, spec: EngineSpec) -> ScriptedEngine:
        if spec.kind in self.refuse:
            raise self.refuse[spec.kind]
        info = replace(INFO, energy_seen=self.seen.get(spec.kind, "process"))
        engine = ScriptedEngine(spec, self.scripts[spec.kind], self.log, info, pid=os.getpid())
        self.engines.append(engine)
        return engine


def run(
    stage: Stage,
    *,
    works: Sequence[Work] = (make_work(),),
    rounds: int = 4,
    meter: Meter | None = None,
    then: Callable[[Contender], None] | None = None,
) -> Run:
    specs = {kind: EngineSpec(kind, f"{kind}.weights", 1, 64) for kind in stage.scripts}
    plan = Plan(engines=specs, works=works, rounds=rounds, seed=0, warm_loads=2)
    made = Run(plan, stage.start, meter, lambda *_: None)
    made.measure(then)
    return made


def by_name(made: Run) -> dict[str, Contender]:
    return {each.name: each for each in made.contenders}


def test_each_round_has_every_case_on_every_engine() -> None:
    works = [make_work("tg4"), make_work("chat", "workload")]
    made = run(Stage({"pocketlm": [0.01], "peer": [0.02]}), works=works)
    for each in made.contenders:
        assert each.raw.keys() == {"tg4", "chat"}
        for raw in each.raw.values():
            assert [block.round for block in raw.blocks] == [0, 1, 2, 3]
            assert all(len(block.traces) == 1 for block in raw.blocks)


def test_the_engines_take_turns_on_a_case_in_random_order() -> None:
    stage = Stage({"pocketlm": [0.01], "peer": [0.01]})
    run(stage, rounds=20)
    pairs = [tuple(kind for kind, _ in stage.log[-40:][n : n + 2]) for n in range(0, 40, 2)]
    assert set(pairs) == {("pocketlm", "peer"), ("peer", "pocketlm")}


def test_prompts_go_round_so_that_none_comes_twice_in_a_row() -> None:
    stage = Stage({"pocketlm": [0.01], "peer": [0.01]})
    run(stage)
    for kind in stage.scripts:
        asked = [queries for name, queries in stage.log if name == kind]
        assert all(a != b for a, b in itertools.pairwise(asked))


def test_both_engines_get_the_same_prompts() -> None:
    stage = Stage({"pocketlm": [0.01], "peer": [0.01]})
    run(stage)
    asked = {kind: [queries for name, queries in stage.log if name == kind] for kind in stage.scripts}
    assert asked["pocketlm"] == asked["peer"]


@pytest.mark.parametrize(("gaps_s", "queries"), [([0.01], 3), ([0.5, 0.1, 0.2, 0.2, 0.2], 5)])
def test_warming_up_ends_when_the_times_have_settled(gaps_s: list[float], queries: int) -> None:
    made = run(Stage({"pocketlm": gaps_s}))
    assert made.contenders[0].warm_up == queries


def test_warming_up_ends_even_if_they_never_do() -> None:
    made = run(Stage({"pocketlm": [0.1, 0.2] * 50}))
    assert made.contenders[0].warm_up == 6


def test_load_times_are_those_of_the_loads() -> None:
    stage = Stage({"pocketlm": [0.01], "peer": [0.01]})
    made = run(stage)
    assert [engine.spec.kind for engine in stage.engines] == ["pocketlm", "pocketlm", "peer"]
    loads = by_name(made)["pocketlm"].loads
    assert loads is not None
    assert loads.warm_s is not None
    assert (loads.warm_s.n, loads.warm_s.median) == (2, 0.25)
    assert loads.cold_s is None  # there is no such file
    assert all(engine.closed for engine in stage.engines)


class TestEnergy:
    def meter(self, probe: ScriptedProbe) -> Meter:
        return Meter(find=lambda **_: found(probe), sleep=lambda _: None)

    def test_a_block_lasts_as_long_as_its_window_needs(self) -> None:
        # A query takes 0.14 s; at 10 W, 20 J take 2 s.
        made = run(Stage({"pocketlm": [0.01]}), meter=self.meter(ScriptedProbe([10.0])))
        assert [len(block.traces) for block in made.contenders[0].raw["tg4"].blocks] == [15] * 4

    def test_an_estimate_needs_no_least_energy(self) -> None:
        probe = ScriptedProbe([10.0], kind="estimated", scope="process", least_window_s=0.5)
        made = run(Stage({"pocketlm": [0.01]}), meter=self.meter(probe))
        assert [len(block.traces) for block in made.contenders[0].raw["tg4"].blocks] == [8] * 4

    def test_each_block_knows_the_idle_power_around_its_round(self) -> None:
        warm_up, block, idle = [9.0] * 3, 9.0, [1.0, 3.0, 3.1]
        probe = ScriptedProbe([*warm_up, idle[0], block, idle[1], block, idle[2]])
        meter = self.meter(probe)
        made = run(Stage({"pocketlm": [0.01]}), rounds=2, meter=meter)
        blocks = made.contenders[0].raw["tg4"].blocks
        assert [block.idle_power_w for block in blocks] == [2.0, pytest.approx(3.05)]
        assert [block.flags for block in blocks] == [["idle power went from 1.0 to 3.0 W"], []]
        assert [window.power_w for window in made.idle] == idle
        assert probe.open == 0
        setup = meter.setup(made.idle, {"codecarbon": 7.0})
        assert setup.absent == {"rapl": "there is none here (buy another machine)"}
        assert (setup.source, setup.scope, setup.kind) == ("scripted", "package", "measured")
        assert len(setup.references) >= 3
        assert setup.cross_check == {"codecarbon": 7.0}
        meter.close()
        assert probe.closed

    def test_a_failed_idle_window_leaves_the_blocks_without(self) -> None:
        made = run(Stage({"pocketlm": [0.01]}), rounds=1, meter=self.meter(ScriptedProbe([None])))
        assert made.contenders[0].raw["tg4"].blocks[0].idle_power_w is None

    @pytest.mark.parametrize(
        ("seen", "probe_of_the_system", "has_reading"),
        [
            ("process", False, True),
            ("process", True, True),
            ("machine", False, False),  # processor time would be that of our side of the connection
            ("machine", True, True),
            ("never", True, False),
        ],
    )
    def test_energy_is_left_out_where_it_is_not_the_engines(
        self, seen: Any, probe_of_the_system: bool, has_reading: bool
    ) -> None:
        probe = ScriptedProbe([10.0], scope="package" if probe_of_the_system else "process")
        stage = Stage({"pocketlm": [0.01], "server": [0.01]}, seen={"server": seen})
        contenders = by_name(run(stage, meter=self.meter(probe)))
        for name, expected in (("server", has_reading), ("pocketlm", True)):
            blocks = contenders[name].raw["tg4"].blocks
            assert [block.reading is not None for block in blocks] == [expected] * 4

    @pytest.mark.parametrize(("seen", "known"), [("process", True), ("machine", False), ("never", False)])
    def test_memory_is_left_out_where_the_model_is_in_another_process(self, seen: Any, known: bool) -> None:
        stage = Stage({"pocketlm": [0.01], "server": [0.01]}, seen={"server": seen})
        contenders = by_name(run(stage))
        assert (contenders["server"].memory is not None) == known
        assert contenders["pocketlm"].memory is not None

    def test_a_block_is_as_long_as_its_window(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A probe may wait, for its tool to start or for the last of its figures."""
        now_s = itertools.count(0.0, 100.0)
        monkeypatch.setattr(runner.time, "monotonic", lambda: next(now_s))
        made = run(Stage({"pocketlm": [0.01]}), meter=self.meter(ScriptedProbe([10.0])))
        blocks = made.contenders[0].raw["tg4"].blocks
        assert [block.duration_s for block in blocks] == [1.0] * 4

    def test_a_window_begins_when_the_probe_is_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        probe = ScriptedProbe([10.0])
        meter = self.meter(probe)
        begin = meter.begin
        monkeypatch.setattr(meter, "begin", lambda pid: (order.append("begin"), begin(pid))[1])
        for module in (runner, metering):
            monkeypatch.setattr(module.time, "time", lambda: (order.append("time"), 0.0)[1])
        run(Stage({"pocketlm": [0.01]}), rounds=1, meter=meter)
        assert order == ["begin", "time"] * (len(order) // 2)

    def test_a_window_is_ended_when_an_engine_fails_in_it(self) -> None:
        probe = ScriptedProbe([10.0])
        stage = Stage({"pocketlm": [0.01], "peer": [EngineError("it crashed")]})
        run(stage, meter=self.meter(probe))
        assert probe.open == 0

    def test_processor_time_is_that_of_the_process(self) -> None:
        meter = self.meter(ScriptedProbe([1.0]))
        assert meter.observed() == 0
        meter.begin(os.getpid()).end()
        first = meter.observed()
        sum(range(3_000_000))
        assert meter.observed() >= first > 0


class TestFailures:
    def test_a_peer_that_does_not_start_is_skipped(self) -> None:
        stage = Stage(
            {"pocketlm": [0.01], "peer": [0.01]}, refuse={"peer": EngineMissingError("not installed")}
        )
        contenders = by_name(run(stage))
        assert contenders["peer"].skipped == "not installed"
        assert len(contenders["pocketlm"].raw["tg4"].blocks) == 4

    def test_a_case_that_a_peer_cannot_do_is_skipped(self) -> None:
        works = [make_work("tg4"), make_work("chat", "workload")]
        stage = Stage({"pocketlm": [0.01], "peer": [EngineMissingError("no such prompts"), 0.01]})
        peer = by_name(run(stage, works=works))["peer"]
        assert peer.refused == {"tg4": "no such prompts"}
        assert peer.raw.keys() == {"chat"}
        assert peer.skipped is None

    @pytest.mark.parametrize("after", [0, 5])
    def test_a_peer_that_crashes_is_dropped_with_its_message(self, after: int) -> None:
        stage = Stage({"pocketlm": [0.01], "peer": [*[0.01] * after, EngineError("it crashed")]})
        contenders = by_name(run(stage))
        assert contenders["peer"].skipped == "it crashed"
        assert contenders["peer"].raw == {}
        assert len(contenders["pocketlm"].raw["tg4"].blocks) == 4
        assert all(engine.closed for engine in stage.engines)

    @pytest.mark.parametrize("after", [0, 5])
    def test_ours_must_not_fail(self, after: int) -> None:
        stage = Stage({"pocketlm": [*[0.01] * after, EngineError("it crashed")], "peer": [0.01]})
        with pytest.raises(EngineError, match="it crashed"):
            run(stage)
        assert all(engine.closed for engine in stage.engines)

    def test_ours_must_do_every_case(self) -> None:
        with pytest.raises(EngineMissingError):
            run(Stage({"pocketlm": [EngineMissingError("no")]}))

    def test_ours_must_start(self) -> None:
        stage = Stage({"pocketlm": [0.01]}, refuse={"pocketlm": EngineError("no memory")})
        with pytest.raises(EngineError, match="no memory"):
            run(stage)


def test_what_comes_behind_the_rounds_gets_ours_while_it_is_loaded() -> None:
    seen: list[tuple[str, bool]] = []

    def then(each: Contender) -> None:
        seen.append((each.name, each.engine is not None))

    made = run(Stage({"pocketlm": [0.01], "peer": [0.01]}), then=then)
    assert seen == [("pocketlm", True)]
    assert made.pids == []


def test_memory_is_that_of_the_process() -> None:
    made = run(Stage({"pocketlm": [0.01]}))
    memory = made.contenders[0].memory
    assert memory is not None
    assert memory.peak_bytes is None or memory.peak_bytes > 1 << 20
