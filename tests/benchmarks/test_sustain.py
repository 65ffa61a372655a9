"""The sustained load on a clock of its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from helpers.scripted import ScriptedEngine, ScriptedProbe, found, make_work
from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.conditions import Sensors
from pocketlm_benchmarks.engines.process import Answered
from pocketlm_benchmarks.engines.protocol import EngineError, EngineSpec, Query
from pocketlm_benchmarks.metering import Meter
from pocketlm_benchmarks.result import Sustained
from pocketlm_benchmarks.sustain import parse_duration, sustain

WORK = make_work("tg4")


class Warming(ScriptedEngine):
    """Each answer takes a little longer than the one before, on its own clock."""

    slower = 0.0
    now_s = 0.0

    def answer(self, queries: Sequence[Query]) -> Answered:
        self.gaps_s = [0.1 * (1 + self.slower * self.now_s)]
        answered = super().answer(queries)
        self.now_s += answered.wall_s
        return answered


def run(
    duration_s: float,
    *,
    slower: float = 0.0,
    throttles: int | None = None,
    power: bool = False,
    least_window_s: float = 1.0,
) -> Sustained:
    engine = Warming(EngineSpec("pocketlm", "", 1, 64))
    engine.slower = slower
    probe = ScriptedProbe([7.0], least_window_s=least_window_s)
    meter = Meter(find=lambda **_: found(probe)) if power else None
    readings = iter(range(10_000))

    def read() -> Sensors:
        return Sensors(60.0, 2e9, None if throttles is None else throttles * next(readings))

    return sustain(
        engine, WORK, duration_s, meter, lambda *_: None, clock=lambda: engine.now_s, read_sensors=read
    )


def test_a_steady_device() -> None:
    made = run(60)
    assert len(made.points) == pytest.approx(60, abs=2)
    assert {round(point.decode_tokens_per_s, 6) for point in made.points} == {10.0}
    assert made.last_over_first == pytest.approx(1)
    assert made.flags == []
    times = [point.t_s for point in made.points]
    assert times == sorted(times)
    assert 0 < times[0] < 2
    assert 58 < times[-1] < 62
    assert (made.points[0].temperature_c, made.points[0].frequency_hz) == (60.0, 2e9)
    assert made.points[0].power_w is None


def test_a_device_that_slows_down() -> None:
    made = run(60, slower=0.01)
    assert 0.6 < made.last_over_first < 0.8
    assert made.flags == [
        f"slowed down: the last third ran at {made.last_over_first:.0%} of the first third's rate"
    ]


def test_throttling_is_told() -> None:
    made = run(10, throttles=1)
    assert made.flags == [f"throttled: the system counted {len(made.points) - 1} events"]


def test_watts_stand_beside_the_rate() -> None:
    assert {point.power_w for point in run(10, power=True).points} == {7.0}


def test_too_short_to_have_thirds_it_goes_on_until_there_are() -> None:
    made = run(0.6)
    assert len(made.points) == 3
    assert made.duration_s == pytest.approx(1.5)


def test_a_slow_sensor_does_not_leave_too_few_intervals() -> None:
    """Ten minutes on a Mac's battery, whose figures are refreshed once in minutes."""
    made = run(600, power=True, least_window_s=300.0)
    assert len(made.points) == 6
    assert made.duration_s == pytest.approx(600, abs=5)


def test_an_engine_that_tells_no_times() -> None:
    prefill = make_work("pp1", "prefill", new_tokens=1)
    with pytest.raises(EngineError, match="does not tell"):
        sustain(ScriptedEngine(EngineSpec("x", "", 1, 64)), prefill, 1.0, None, lambda *_: None)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2 m ", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0s", "-5s", "m", "10 days", "1e3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidSettingError, match="10m"):
        parse_duration(text)
