"""Answers' shares of windows. The clocks, the probe and the engine are the test's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.powercap import Clock
from pocketlm.energy import CpuEstimate, Reading, SampledProbe, SharedMeter, SharedWindow, share_of
from pocketlm.energy.reading import Kind, Scope
from pocketlm.errors import PocketlmError

PATIENCE_S = 30


@dataclass
class FakeProbe:
    """5 W, wherever they go."""

    clock: Clock
    quick: bool = True
    failure: str | None = None
    on_call: Callable[[], None] = lambda: None
    source: str = "fake"
    scope: Scope = "package"
    kind: Kind = "measured"
    resolution_j: float | None = None
    least_window_s: float = 10.0
    closed: int = 0
    threads: list[str] = field(default_factory=list)

    def begin(self) -> FakeWindow:
        self.threads.append(threading.current_thread().name)
        self.on_call()
        return FakeWindow(self, self.clock())

    def close(self) -> None:
        self.closed += 1


@dataclass
class FakeWindow:
    probe: FakeProbe
    began_s: float

    def end(self) -> Reading:
        probe = self.probe
        probe.threads.append(threading.current_thread().name)
        probe.on_call()
        duration_s = probe.clock() - self.began_s
        if probe.failure:
            return Reading(probe.source, probe.scope, probe.kind, duration_s, None, reason=probe.failure)
        energy_j = 5.0 * duration_s
        return Reading(
            probe.source,
            probe.scope,
            probe.kind,
            duration_s,
            energy_j,
            low_j=energy_j / 2,
            high_j=energy_j * 2,
            parts_j={"core": energy_j / 4},
        )


@dataclass
class Machine:
    """A clock, an engine and a meter."""

    clock: Clock = field(default_factory=Clock)
    busy_s: float = 100.0
    quick: bool = True

    def __post_init__(self) -> None:
        self.probe = FakeProbe(self.clock, self.quick)
        self.meter = SharedMeter(self.probe, lambda: self.busy_s)

    def begin(self) -> SharedWindow:
        window = self.meter.begin()
        window._begun.result(PATIENCE_S)  # before the clock goes on
        return window

    def compute(self, seconds: float) -> float:
        self.clock.now_s += seconds
        self.busy_s += seconds
        return seconds


@pytest.fixture(params=[True, False], ids=["quick", "slow"])
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(quick=request.param)


def test_an_answer_that_is_alone_has_all_of_it_idle_time_too(machine: Machine) -> None:
    window = machine.begin()
    compute_s = machine.compute(12)
    machine.clock.now_s += 8
    reading = window.end(compute_s)
    assert (reading.energy_j, reading.duration_s, reading.flags) == (100, 20, ())
    machine.meter.close()


def test_a_share(machine: Machine) -> None:
    window = machine.begin()
    machine.compute(9)
    reading = window.end(machine.compute(3))
    assert (reading.energy_j, reading.low_j, reading.high_j) == (15, 7.5, 30)
    assert reading.parts_j == {"core": 3.75}
    assert (reading.source, reading.scope, reading.kind) == ("fake", "package", "measured")
    assert reading.duration_s == 12
    assert reading.flags == ("share of 0.25 by the engines' time, as if all their work took the same power",)
    machine.meter.close()


def test_windows_may_overlap(machine: Machine) -> None:
    first = machine.begin()
    first_s = machine.compute(10)
    second = machine.begin()
    second_s = machine.compute(5)  # each of both
    first_s += machine.compute(5)
    one = first.end(first_s)
    second_s += machine.compute(10)
    other = second.end(second_s)
    assert one.energy_j == pytest.approx(100 * 15 / 20)
    assert other.energy_j == pytest.approx(100 * 15 / 20)
    machine.meter.close()


def test_a_short_window_says_so_beside_its_share() -> None:
    machine = Machine()
    window = machine.begin()
    machine.compute(1)
    flags = window.end(machine.compute(1)).flags
    assert [flag.split(" by ")[0] for flag in flags] == [
        "share of 0.5",
        "the window is 2 s long; fake needs 10 s",
    ]


def test_a_probe_that_says_so_itself_is_not_repeated() -> None:
    clock = Clock()
    probe = SampledProbe("fake", "board", "measured", lambda: {"rail": 2.0}, 3600.0, clock=clock)
    meter = SharedMeter(probe, lambda: clock.now_s)
    window = meter.begin()
    window._begun.result(PATIENCE_S)
    clock.now_s += 1
    assert window.end(1.0).flags == ("the window is 1 s long; fake needs 60 s",)
    meter.close()


def test_a_missing_figure_stays_missing_with_its_reason() -> None:
    machine = Machine()
    machine.probe.failure = "the cable is loose"
    window = machine.begin()
    machine.compute(1)
    reading = window.end(machine.compute(1))
    assert (reading.energy_j, reading.reason, reading.flags) == (None, "the cable is loose", ())


def whole(energy_j: float) -> Reading:
    return Reading("fake", "package", "measured", 20.0, energy_j, parts_j={"core": energy_j / 2})


@pytest.mark.parametrize(
    ("compute_s", "busy_s", "energy_j"),
    [
        (0.0, 0.0, 0.0),  # it was cancelled while it waited, and nothing else was computed
        (0.0, 4.0, 0.0),
        (2.0, 0.0, 8.0),  # the window's edge came late
        (3.0, 2.0, 8.0),
        (2.0, 2.0, 8.0),
        (2.0, 2.0 + 1e-12, 8.0),  # rounding
        (2.0, 8.0, 2.0),
    ],
)
def test_shares_at_the_edges(compute_s: float, busy_s: float, energy_j: float) -> None:
    reading = share_of(whole(8.0), compute_s, busy_s)
    assert reading.energy_j == energy_j
    assert reading.parts_j == {"core": energy_j / 2}
    assert bool(reading.flags) is (energy_j < 8)


@pytest.mark.parametrize("compute_s", [-1.0, float("nan"), float("inf")])
def test_seconds_that_are_none(compute_s: float) -> None:
    window = Machine().meter.begin()
    with pytest.raises(ValueError, match="seconds from 0 on are expected"):
        window.end(compute_s)


@settings(max_examples=100)
@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=20).filter(lambda seconds: sum(seconds) > 1e-3),
    st.floats(0, 1e6),
)
def test_shares_that_cover_the_work_add_up(seconds: list[float], energy_j: float) -> None:
    readings = [share_of(whole(energy_j), each_s, sum(seconds)) for each_s in seconds]
    total_j = sum(reading.energy_j or 0.0 for reading in readings)
    assert total_j == pytest.approx(energy_j, rel=1e-6)
    for reading in readings:
        assert 0 <= (reading.energy_j or 0.0) <= energy_j


class TestEventLoops:
    def test_a_slow_probe_holds_nobody_up(self) -> None:
        machine, go = Machine(quick=False), threading.Event()
        machine.probe.on_call = lambda: go.wait(PATIENCE_S) and None
        window = machine.meter.begin()
        future = window.ending(1.0)  # both come back although the probe waits
        assert not future.done()
        go.set()
        assert future.result(PATIENCE_S).energy_j == 0  # the clock stood still
        assert {name.rpartition("_")[0] for name in machine.probe.threads} == {"pocketlm-energy-windows"}
        machine.meter.close()

    def test_a_quick_one_is_asked_at_once(self) -> None:
        machine = Machine()
        assert machine.meter.begin().ending(1.0).done()
        assert set(machine.probe.threads) == {threading.current_thread().name}

    def test_what_a_probe_raises_comes_out_at_the_end(self, machine: Machine) -> None:
        def fail() -> None:
            raise OSError("gone")

        machine.probe.on_call = fail
        window = machine.meter.begin()
        with pytest.raises(OSError, match="gone"):
            window.end(1.0)
        machine.meter.close()


def test_a_closed_meter(machine: Machine) -> None:
    window = machine.begin()
    machine.meter.close()
    machine.meter.close()
    assert machine.probe.closed == 1
    with pytest.raises(PocketlmError, match="has been closed"):
        machine.meter.begin()
    with pytest.raises(PocketlmError, match="has been closed"):
        window.end(1.0)


def test_with_an_estimate() -> None:
    clock = Clock()
    probe = CpuEstimate(lambda: 2 * clock.now_s, watts_per_core=3.0, clock=clock)
    meter = SharedMeter(probe, lambda: clock.now_s)
    window = meter.begin()
    clock.now_s += 10
    reading = window.end(2.5)
    assert (reading.energy_j, reading.low_j, reading.high_j) == pytest.approx((15, 4.5, 45))
