"""A meter's log, joined by wall-clock time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.powercap import Clock
from pocketlm.energy.meter_log import Log, MeterLog, MeterLogError, energy_between, integrate, read_log
from pocketlm.energy.reading import Reading

T0 = 1_790_000_000.0


def write(path: Path, powers: list[float], *, start_s: float = T0, step_s: float = 1.0) -> Path:
    lines = [f"{start_s + index * step_s},{watts}" for index, watts in enumerate(powers)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "meter.csv"


class TestReading:
    @pytest.mark.parametrize(
        "text",
        [
            "1790000000,12.5\n1790000001.5,13\n",
            "1790000000;12,5\n1790000001,5;13\n",
            "1790000000\t12,5\n1790000001.5\t13,0\n",
            "1790000000 | 12.5\n1790000001.5 | 13\n",
            '1790000000,"12,5"\n1790000001.5,"13,0"\n',
            "timestamp,power_w\n1790000000,12.5\n1790000001.5,13\n",
            "Zeit;Leistung\n1790000000;12,5\n1790000001,5;13\n",
            "\ufeffPower (W),Time\n12.5,1790000000\n13,1790000001.5\n",
            "V,A,W,epoch\n230,1,12.5,1790000000\n230,1,13,1790000001.5\n",
            "date,watts,kWh\n1790000000,12.5,8\n1790000001.5,13,8\n",
            "# a plug\n\n1790000000,12.5\r\n\n1790000001.5,13",
            "2026-09-21T14:13:20Z,12.5\n2026-09-21T14:13:21.500000+00:00,13\n",
            "2026-09-21 16:13:20+02:00;12,5\n2026-09-21 16:13:21.5+02:00;13\n",
        ],
    )
    def test_formats(self, text: str, log: Path) -> None:
        assert datetime.fromtimestamp(T0, UTC).isoformat() == "2026-09-21T14:13:20+00:00"
        log.write_text(text, encoding="utf-8")
        assert read_log(log) == Log((T0, T0 + 1.5), (12.5, 13.0))

    def test_a_time_without_a_zone_is_local(self, log: Path) -> None:
        log.write_text("2026-09-21T14:13:20,5\n")
        assert read_log(log).times_s == (datetime(2026, 9, 21, 14, 13, 20).astimezone().timestamp(),)

    def test_decimals_that_might_be_thousands_need_proof(self, log: Path) -> None:
        log.write_text("1790000000;1,250\n1790000001;0,5\n")
        assert read_log(log).power_w == (1.25, 0.5)
        log.write_text("1790000000;1,250\n1790000001;2,500\n")
        with pytest.raises(MeterLogError, match=r"line 1: '1,250' may be thousands or decimals; write"):
            read_log(log)

    @pytest.mark.parametrize("text", ["", "\n# nothing\n", "time,watts\n"])
    def test_no_samples(self, text: str, log: Path) -> None:
        log.write_text(text)
        assert read_log(log) == Log((), ())

    def test_a_line_that_is_still_being_written(self, log: Path) -> None:
        log.write_text("1790000000,12.5\n1790000001,1")
        assert read_log(log, growing=True).power_w == (12.5,)
        assert read_log(log).power_w == (12.5, 1.0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("time,w\n1790000000,5\n\n1790000001,off\n", r"line 4: 'off' is no number\."),
            ("1790000000,5\n1790000001,nan\n", r"line 2: 'nan' is no number\."),
            (
                "1790000000,5\nyesterday,5\n",
                r"line 2: 'yesterday' is neither seconds since 1970 nor ISO 8601",
            ),
            ("1790000000,5\n1790000001\n", r"line 2: 1 columns \(1790000001\), and 2 in the first line"),
            ("1790000000,5\n1790000001,5,7\n", r"line 2: 3 columns \(1790000001, 5, 7\), and 2 in"),
            (
                "1790000000,12,5\n",
                r"line 1: 3 columns \(1790000000, 12, 5\)\. Two are expected, time and watts",
            ),
            ("a,b,c\n1,2,3\n", r"line 1: 3 columns \(a, b, c\)\. Two are expected"),
            ("time,power_w,power_va\n1790000000,5,6\n", r"line 1: 3 columns \(time, power_w, power_va\)"),
            ("1790000000\n", r"line 1: 1 columns"),
            ("1790000000000,5\n", r"line 1: '1790000000000' looks like milliseconds; seconds since 1970"),
            (
                "1790000001,5\n1790000000,5\n",
                r"line 2: its time '1790000000' is before that of the line above",
            ),
            ("time,power_mw\n1790000000,5000\n", r"line 1: the column 'power_mw'; watts are expected"),
            (
                "time;Leistung (kW)\n1790000000;5\n",
                r"line 1: the column 'Leistung \(kW\)'; watts are expected",
            ),
            ("0," + "9" * 200_000 + "\n", r"line 1: 1 columns \(0,9+\)\. Two are expected"),
        ],
    )
    def test_malformed(self, text: str, message: str, log: Path) -> None:
        log.write_text(text)
        with pytest.raises(MeterLogError, match=message):
            read_log(log)

    def test_no_file_and_no_text(self, log: Path) -> None:
        with pytest.raises(
            MeterLogError, match=r"The meter's log .*meter\.csv cannot be read: .*No such file"
        ):
            read_log(log)
        log.write_bytes(b"\xff\xfe1\x00")
        with pytest.raises(MeterLogError, match=r"cannot be read: .*utf-8"):
            read_log(log)


class TestEnergyBetween:
    def test_from_sample_to_sample(self, log: Path) -> None:
        reading = energy_between(write(log, [10, 20, 20, 0]), T0, T0 + 3)
        assert reading.energy_j == pytest.approx(15 + 20 + 10)
        assert (reading.source, reading.scope, reading.kind) == ("meter", "wall", "measured")
        assert (reading.duration_s, reading.flags) == (3, ())

    def test_between_samples(self, log: Path) -> None:
        reading = energy_between(write(log, [10, 20, 20, 0]), T0 + 0.5, T0 + 2.5)
        assert reading.energy_j == pytest.approx((15 + 20) / 2 * 0.5 + 20 + (20 + 10) / 2 * 0.5)

    def test_within_one_interval(self, log: Path) -> None:
        assert energy_between(write(log, [10, 20]), T0 + 0.25, T0 + 0.75).energy_j == pytest.approx(7.5)

    def test_a_log_whose_clock_is_off(self, log: Path) -> None:
        write(log, [10, 10, 10], start_s=T0 - 100)
        assert energy_between(log, T0, T0 + 2, offset_s=100).energy_j == pytest.approx(20)

    def test_two_samples_of_one_time_are_a_step(self, log: Path) -> None:
        log.write_text("".join(f"{T0 + t},{watts}\n" for t, watts in [(0, 10), (1, 10), (1, 30), (2, 30)]))
        assert energy_between(log, T0, T0 + 2).energy_j == pytest.approx(40)
        assert energy_between(log, T0, T0 + 1).energy_j == pytest.approx(10)
        assert energy_between(log, T0 + 1, T0 + 2).energy_j == pytest.approx(30)

    @pytest.mark.parametrize(
        ("start", "stop", "energy_j", "flags"),
        [
            (-4, 2, 60, ("the log's first sample was held for 4 s",)),
            (1, 8, 70, ("the log's last sample was held for 5 s",)),
        ],
    )
    def test_edges_are_held_for_a_few_intervals(
        self, start: float, stop: float, energy_j: float, flags: tuple[str, ...], log: Path
    ) -> None:
        reading = energy_between(write(log, [10] * 4), T0 + start, T0 + stop)
        assert reading.energy_j == pytest.approx(energy_j)
        assert reading.flags == flags

    @pytest.mark.parametrize(
        ("start", "stop", "reason"),
        [
            (0, 15, "the log ends 12 s before the window did"),
            (-6, 2, "the log begins 6 s after the window did"),
            (100, 110, "the log ends 107 s before the window did"),
            (-110, -100, "the log begins 110 s after the window did"),
        ],
    )
    def test_a_log_that_does_not_cover_the_window(
        self, start: float, stop: float, reason: str, log: Path
    ) -> None:
        reading = energy_between(write(log, [10] * 4), T0 + start, T0 + stop)
        assert (reading.energy_j, reading.reason) == (None, reason)

    def test_a_gap_counts_where_the_window_touches_it(self, log: Path) -> None:
        times = [*range(10), *range(20, 30)]
        log.write_text("".join(f"{T0 + t},10\n" for t in times))
        assert energy_between(log, T0, T0 + 9).energy_j == pytest.approx(90)
        assert energy_between(log, T0 + 20, T0 + 29).energy_j == pytest.approx(90)
        for start, stop in [(0, 29), (5, 12), (12, 15), (15, 25)]:
            assert energy_between(log, T0 + start, T0 + stop).reason == (
                "the log has a gap of 11 s, and at most 5 s can be bridged"
            )

    def test_too_few_samples(self, log: Path) -> None:
        log.write_text("")
        assert energy_between(log, T0, T0 + 1).reason == "the log has no samples yet"
        assert energy_between(write(log, [10]), T0, T0 + 1).reason == "the log ends 1 s before the window did"

    def test_a_window_that_runs_backwards(self, log: Path) -> None:
        with pytest.raises(MeterLogError, match="the window stops at 5, before it starts at 6"):
            energy_between(write(log, [10]), 6, 5)

    def test_malformed(self, log: Path) -> None:
        log.write_text("1,2\nx,y\n")
        with pytest.raises(MeterLogError, match="line 2: 'x' is neither"):
            energy_between(log, 1, 2)


@settings(deadline=None)
@given(
    powers=st.lists(st.floats(0, 3000), min_size=2, max_size=30),
    cuts=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
)
def test_windows_that_touch_add_up(powers: list[float], cuts: list[float]) -> None:
    log = Log(tuple(float(t) for t in range(len(powers))), tuple(powers))
    start_s, middle_s, stop_s = (cut * (len(powers) - 1) for cut in cuts)

    def joules(between: tuple[float, float]) -> float:
        energy_j = integrate(log, *between).energy_j
        assert energy_j is not None
        return energy_j

    assert joules((start_s, stop_s)) == pytest.approx(
        joules((start_s, middle_s)) + joules((middle_s, stop_s)), abs=1e-6
    )


class TestMeterLog:
    def measure(
        self, path: Path, *, seconds: float = 3.0, step_s: float = 0.0, offset_s: float = 0.0
    ) -> Reading:
        wall_clock, clock = Clock(T0), Clock(5.0)
        probe = MeterLog(path, offset_s, wall_clock=wall_clock, clock=clock)
        window = probe.begin()
        wall_clock.now_s += seconds + step_s
        clock.now_s += seconds
        reading = window.end()
        probe.close()
        return reading

    def test_a_window(self, log: Path) -> None:
        reading = self.measure(write(log, [10, 20, 20, 0]))
        assert reading.energy_j == pytest.approx(45)
        assert reading.duration_s == 3
        assert (reading.scope, reading.kind) == ("wall", "measured")

    def test_the_log_is_read_when_the_window_ends(self, log: Path) -> None:
        wall_clock, clock = Clock(T0), Clock()
        window = MeterLog(log, wall_clock=wall_clock, clock=clock).begin()
        write(log, [10] * 11)
        with log.open("a") as file:
            file.write(f"{T0 + 11},1")  # of 10.0: the meter's program is not done with the line
        wall_clock.now_s += 11
        clock.now_s += 11
        reading = window.end()
        assert reading.energy_j == pytest.approx(110)
        assert reading.flags == ("the log's last sample was held for 1 s",)

    def test_a_meter_whose_clock_is_off(self, log: Path) -> None:
        write(log, [10] * 4, start_s=T0 + 3600)
        assert self.measure(log, offset_s=-3600).energy_j == pytest.approx(30)

    def test_a_log_that_fails_gives_a_reason(self, log: Path) -> None:
        reason = self.measure(log).reason
        assert reason is not None
        assert reason.startswith(f"The meter's log {log} cannot be read: ")
        log.write_text("1790000000,5\nx,5\n")
        assert self.measure(log).reason == (f"{log}, line 2: 'x' is neither seconds since 1970 nor ISO 8601.")

    @pytest.mark.parametrize(("step_s", "reason"), [(0.4, None), (7200, "+7.2e+03"), (-0.6, "-0.6")])
    def test_a_clock_that_is_set_during_the_window(
        self, step_s: float, reason: str | None, log: Path
    ) -> None:
        reading = self.measure(write(log, [10] * 4), step_s=step_s)
        expected = reason and f"the system's clock was set by {reason} s during the window"
        assert reading.reason == expected
        assert reading.duration_s == 3
