"""Power sensors integrated over windows. No test waits for time to pass: the clock is the test's."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.powercap import Clock
from pocketlm.energy.sampled import SampledProbe, SampledWindow, WindowSpoiledError

HOURS_S = 3600.0  # between the thread's own samples: none within a test


class Sensor:
    """What it reads next is set by the test: watts by rail, or an error."""

    def __init__(self, **power_w: float) -> None:
        self.now: Mapping[str, float] | Exception = power_w
        self.reads = 0

    def __call__(self) -> Mapping[str, float]:
        self.reads += 1
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


def probe(sensor: Sensor, clock: Clock, *, longest_gap_s: float = 1e9, **settings: object) -> SampledProbe:
    return SampledProbe(
        "fake",
        "board",
        "measured",
        sensor,
        HOURS_S,
        clock=clock,
        longest_gap_s=longest_gap_s,
        least_window_s=0,
        **settings,  # type: ignore[arg-type]
    )


def test_a_trapezoid_from_edge_to_edge() -> None:
    clock, sensor = Clock(), Sensor(rail=2.0)
    fake = probe(sensor, clock)
    window = fake.begin()
    clock.now_s += 10
    sensor.now = {"rail": 4.0}
    fake.sample_now()
    clock.now_s += 5
    sensor.now = {"rail": 0.0}
    reading = window.end()
    assert sensor.reads == 3
    assert reading.energy_j == pytest.approx(3.0 * 10 + 2.0 * 5)
    assert reading.duration_s == 15
    assert reading.parts_j == {"rail": pytest.approx(40.0)}
    assert (reading.source, reading.scope, reading.kind) == ("fake", "board", "measured")
    assert (reading.flags, reading.reason) == ((), None)
    assert fake.resolution_j is None


class TestHeldSamples:
    """Edges of windows that make do with the newest sample."""

    def test_a_fresh_one_serves_all_windows(self) -> None:
        clock, sensor = Clock(), Sensor(rail=2.0)
        fake = probe(sensor, clock, held_s=1.0, flags=lambda: ("beware",))
        around = fake.begin()
        first = fake.begin()
        clock.now_s += 0.5
        sensor.now = {"rail": 8.0}
        one, next_one = first.end(), fake.begin()
        assert sensor.reads == 1
        assert (one.energy_j, one.duration_s, one.flags) == (1.0, 0.5, ("beware",))
        clock.now_s += 0.5  # now it is too old
        other = next_one.end()
        assert sensor.reads == 2
        assert other.energy_j == pytest.approx(0.5 * (2.0 + 8.0) / 2)
        assert around.end().energy_j == pytest.approx(1.0 + 2.5)

    def test_none_is_held_behind_a_read_that_failed(self) -> None:
        clock, sensor = Clock(), Sensor(rail=2.0)
        fake = probe(sensor, clock, held_s=1.0)
        fake.begin()
        sensor.now = OSError("gone")
        fake.sample_now()
        fake.begin().end()
        assert sensor.reads == 4

    def test_a_held_one_closes_no_gap(self) -> None:
        clock, sensor = Clock(), Sensor(rail=2.0)
        fake = probe(sensor, clock, held_s=1.0, longest_gap_s=2.0)
        window = fake.begin()
        clock.now_s += 0.9
        fake.begin().end()
        clock.now_s += 2.1
        assert "no sample for 2.1 s" in str(window.end().reason)


def test_the_end_counts_once() -> None:
    clock = Clock()
    window = probe(Sensor(rail=1.0), clock).begin()
    clock.now_s += 1
    first = window.end()
    clock.now_s += 1
    assert window.end() is first


def test_rails_and_the_total_that_the_probe_makes_of_them() -> None:
    clock = Clock()
    fake = probe(Sensor(all=10.0, cpu=7.0), clock, total=lambda power_w: power_w["all"])
    window = fake.begin()
    clock.now_s += 2
    reading = window.end()
    assert reading.energy_j == pytest.approx(20.0)
    assert reading.parts_j == {"all": pytest.approx(20.0), "cpu": pytest.approx(14.0)}


def test_the_total_is_the_sum_of_the_rails_by_default() -> None:
    clock = Clock()
    window = probe(Sensor(a=1.0, b=0.5), clock).begin()
    clock.now_s += 2
    assert window.end().energy_j == pytest.approx(3.0)


finite = st.floats(0, 500)


@settings(deadline=None)
@given(
    powers=st.lists(finite, min_size=3, max_size=20),
    steps=st.lists(st.floats(0.01, 10), min_size=19, max_size=19),
    cut=st.integers(1, 18),
)
def test_windows_that_touch_add_up(powers: list[float], steps: list[float], cut: int) -> None:
    cut = min(cut, len(powers) - 2)
    clock, sensor = Clock(0.0), Sensor(rail=powers[0])
    fake = probe(sensor, clock)
    whole, part, parts_j = fake.begin(), fake.begin(), []
    for index, power_w in enumerate(powers[1:], start=1):
        clock.now_s += steps[index - 1]
        sensor.now = {"rail": power_w}
        fake.sample_now()
        if index == cut:
            parts_j.append(part.end().energy_j)
            part = fake.begin()
    parts_j.append(part.end().energy_j)
    total_j = whole.end().energy_j
    assert total_j == pytest.approx(sum(value for value in parts_j if value is not None), abs=1e-9)
    between = [(a + b) / 2 * step for a, b, step in zip(powers, powers[1:], steps, strict=False)]
    assert total_j == pytest.approx(sum(between), abs=1e-9)


def run_with_failures(
    fake: SampledProbe, sensor: Sensor, clock: Clock, reads: Iterable[bool]
) -> SampledWindow:
    """Begins a window with the first of `reads` and samples each second; False is a read that fails."""
    good, window = sensor.now, None
    for works in reads:
        sensor.now = good if works else OSError("gone")
        if window is None:
            window = fake.begin()
        else:
            clock.now_s += 1
            fake.sample_now()
    assert window is not None
    return window


@pytest.mark.parametrize(
    "reads",
    [
        [True, False, False, True],
        [False, False, True, True],  # the first good sample stands for the time before it
        [True, True, False, False],  # the last good one for the time behind it
    ],
)
def test_a_short_gap_is_bridged(reads: list[bool]) -> None:
    clock, sensor = Clock(), Sensor(rail=3.0)
    window = run_with_failures(probe(sensor, clock, longest_gap_s=3.0), sensor, clock, reads)
    reading = window.end()
    assert reading.energy_j == pytest.approx(3.0 * 3)
    assert reading.duration_s == 3


@pytest.mark.parametrize(
    "reads",
    [
        [True, False, False, False, True],
        [False, False, False, False, True],
        [True, False, False, False, False],
    ],
)
def test_a_long_gap_leaves_no_joules(reads: list[bool]) -> None:
    clock, sensor = Clock(), Sensor(rail=3.0)
    window = run_with_failures(probe(sensor, clock, longest_gap_s=3.0), sensor, clock, reads)
    reading = window.end()
    assert reading.energy_j is None
    assert reading.reason == (
        "no sample for 4 s, and at most 3 s can be bridged (last failure: OSError: gone)"
    )
    assert reading.parts_j == {}


def test_a_thread_that_was_kept_waiting_leaves_a_gap_too() -> None:
    clock = Clock()
    window = probe(Sensor(rail=3.0), clock, longest_gap_s=3.0).begin()
    clock.now_s += 4
    assert window.end().reason == "no sample for 4 s, and at most 3 s can be bridged"


def test_a_sensor_that_never_answers() -> None:
    clock, sensor = Clock(), Sensor()
    sensor.now = PermissionError()
    window = probe(sensor, clock).begin()
    clock.now_s += 1
    assert window.end().reason == "no sample could be read (last failure: PermissionError)"


@pytest.mark.parametrize(
    ("bad", "failure"),
    [
        ({"rail": float("nan")}, "ValueError: the sensor gave nan W"),
        ({"rail": float("inf")}, "ValueError: the sensor gave inf W"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
        ({}, "the rails changed from rail to none"),
        ({"rail": 1.0, "new": 1.0}, "the rails changed from rail to rail, new"),
    ],
)
def test_what_is_no_sample(bad: Mapping[str, float] | Exception, failure: str) -> None:
    clock, sensor = Clock(), Sensor(rail=1.0)
    fake = probe(sensor, clock, longest_gap_s=3.0)
    window = fake.begin()
    sensor.now = bad
    clock.now_s += 4
    reason = window.end().reason
    assert reason is not None
    assert failure in reason


def test_a_spoiled_window_has_no_joules_whatever_comes_later() -> None:
    clock, sensor = Clock(), Sensor(rail=1.0)
    fake = probe(sensor, clock)
    window = fake.begin()
    sensor.now = WindowSpoiledError("the charger was plugged in")
    fake.sample_now()
    sensor.now = {"rail": 1.0}
    clock.now_s += 1
    later = fake.begin()
    assert window.end().reason == "the charger was plugged in"
    clock.now_s += 1
    assert later.end().energy_j == pytest.approx(1.0)


def test_flags_are_asked_with_each_sample() -> None:
    clock, flags = Clock(), ["hot"]
    fake = probe(Sensor(rail=1.0), clock, flags=lambda: flags)
    window = fake.begin()
    flags[:] = ["hot", "throttled"]
    fake.sample_now()
    flags.clear()
    clock.now_s += 1
    assert window.end().flags == ("hot", "throttled")


def test_a_window_too_short_for_the_sensor_says_so() -> None:
    clock = Clock()
    fake = SampledProbe("fake", "board", "measured", Sensor(rail=1.0), HOURS_S, clock=clock)
    assert fake.least_window_s == 60
    window = fake.begin()
    clock.now_s += 59.5
    assert window.end().flags == ("the window is 59.5 s long; fake needs 60 s",)
    window = fake.begin()
    clock.now_s += 60
    assert window.end().flags == ()


@pytest.mark.parametrize(("interval_s", "gap_s"), [(0.1, 1.0), (1.0, 5.0), (30.0, 150.0)])
def test_the_gap_that_is_bridged_by_default(interval_s: float, gap_s: float) -> None:
    assert SampledProbe("fake", "soc", "measured", Sensor(), interval_s).longest_gap_s == gap_s


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pocketlm-energy-threaded"]


def threaded(sensor: Sensor, enough: threading.Event, reads: int) -> SampledProbe:
    def read() -> Mapping[str, float]:
        if sensor.reads + 1 >= reads:
            enough.set()
        return sensor()

    return SampledProbe("threaded", "board", "measured", read, 0.001)


def test_one_thread_samples_while_windows_are_open() -> None:
    enough, sensor = threading.Event(), Sensor(rail=1.0)
    fake = threaded(sensor, enough, reads=6)
    assert sampling_threads() == []
    first, second = fake.begin(), fake.begin()
    (thread,) = sampling_threads()
    assert thread.daemon
    assert enough.wait(30)
    for window in (first, second):
        reading = window.end()
        assert reading.energy_j == pytest.approx(reading.duration_s)
    thread.join(30)
    assert not thread.is_alive()
    assert fake.begin().end().energy_j is not None
    fake.close()
    assert sampling_threads() == []


def test_a_window_that_nobody_ends_does_not_keep_the_thread() -> None:
    fake = threaded(Sensor(rail=1.0), threading.Event(), reads=2)
    window = fake.begin()
    (thread,) = sampling_threads()
    del window
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_closing() -> None:
    fake = threaded(Sensor(rail=1.0), threading.Event(), reads=2)
    window = fake.begin()
    fake.close()
    assert sampling_threads() == []
    assert window.end().reason == "the probe was closed during the window"
    assert fake.begin().end().reason == "the probe was closed before the window"
    assert sampling_threads() == []
    fake.close()
