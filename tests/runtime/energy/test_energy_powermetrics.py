"""powermetrics: property lists as macOS prints them, through a pipe, on a clock that the test sets."""

from __future__ import annotations

import io
import os
import plistlib
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.energy.powermetrics import (
    MODEL,
    WITHOUT_MEMORY,
    Frame,
    PowermetricsError,
    PowermetricsProbe,
    integrate,
    parse_frame,
    split_frames,
    start_tool,
)
from pocketlm.energy.reading import Reading

# After a MacBook Pro with M1: cut down to the samplers cpu_power, gpu_power and thermal.
RECORDED = b"""\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
<key>is_delta</key><true/>
<key>elapsed_ns</key><integer>201917875</integer>
<key>hw_model</key><string>MacBookPro17,1</string>
<key>timestamp</key><date>2026-01-22T21:07:07Z</date>
<key>thermal_pressure</key><string>Nominal</string>
<key>processor</key>
<dict>
\t<key>clusters</key><array><dict><key>name</key><string>E-Cluster</string></dict></array>
\t<key>cpu_energy</key><integer>601</integer>
\t<key>cpu_power</key><real>2978.45</real>
\t<key>gpu_power</key><real>269.614</real>
\t<key>ane_power</key><integer>0</integer>
\t<key>combined_power</key><real>3248.07</real>
</dict>
<key>gpu</key><dict><key>freq_hz</key><real>714.836</real></dict>
</dict>
</plist>
"""


def plist(watts: float, elapsed_s: float = 0.2, pressure: str = "Nominal") -> bytes:
    milliwatts = {"cpu_power": watts * 1e3, "gpu_power": 0.0, "combined_power": watts * 1e3}
    return plistlib.dumps(
        {"elapsed_ns": round(elapsed_s * 1e9), "thermal_pressure": pressure, "processor": milliwatts}
    )


def frame(stop_s: float, watts: float, elapsed_s: float = 0.2) -> Frame:
    return Frame(stop_s, elapsed_s, watts, {"cpu": watts}, None)


class TestParse:
    def test_recorded(self) -> None:
        parsed = parse_frame(RECORDED, 7.0)
        assert parsed.stop_s == 7.0
        assert parsed.elapsed_s == pytest.approx(0.201917875)
        assert parsed.total_w == pytest.approx(3.24807)
        assert parsed.power_w == pytest.approx({"cpu": 2.97845, "gpu": 0.269614, "ane": 0.0})
        assert parsed.thermal_pressure == "Nominal"

    def test_the_separator_and_complaints_before_it(self) -> None:
        noisy = b"\0\nSecond underflow occured.\n" + RECORDED
        assert parse_frame(noisy, 0.0).total_w == pytest.approx(3.24807)

    def test_without_a_combined_power(self) -> None:
        parsed = parse_frame(RECORDED.replace(b"combined_power", b"other"), 0.0)
        assert parsed.total_w == pytest.approx(2.97845 + 0.269614)

    @given(st.integers(min_value=0, max_value=len(RECORDED.rstrip()) - 1))
    def test_truncated_wherever_it_is(self, length: int) -> None:
        with pytest.raises(PowermetricsError):
            parse_frame(RECORDED[:length], 0.0)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0",
            b"powermetrics must be invoked as the superuser",
            RECORDED.replace(b"MacBook", b"Mac\x01<"),
        ],
    )
    def test_garbage(self, data: bytes) -> None:
        with pytest.raises(PowermetricsError, match="damaged property list"):
            parse_frame(data, 0.0)

    @pytest.mark.parametrize(
        "data",
        [
            RECORDED.replace(b"elapsed_ns", b"elapsed"),
            RECORDED.replace(b"201917875", b"0"),
            RECORDED.replace(b"<key>processor</key>", b"<key>chip</key>"),
            RECORDED.replace(b"cpu_power", b"x").replace(b"combined_power", b"y"),
            RECORDED.replace(b"<real>2978.45</real>", b"<true/>").replace(b"combined_power", b"y"),
            plistlib.dumps([1]),
            plistlib.dumps({"elapsed_ns": 1, "processor": "M1"}),
        ],
    )
    def test_missing_fields(self, data: bytes) -> None:
        with pytest.raises(PowermetricsError, match="no elapsed_ns, or neither combined_power nor cpu_power"):
            parse_frame(data, 0.0)


class TestSplit:
    def test_the_last_may_be_cut(self) -> None:
        frames, rest = split_frames(RECORDED + b"\0" + RECORDED + b"\0" + RECORDED[:100])
        assert [parse_frame(data, 0.0).total_w for data in frames] == pytest.approx([3.24807, 3.24807])
        assert rest.endswith(RECORDED[:100])

    @given(st.integers(min_value=1, max_value=400))
    def test_any_size_of_chunk(self, size: int) -> None:
        stream = io.BytesIO(b"\0".join([plist(1.0), plist(2.0), plist(3.0)]))
        rest, found = b"", []
        while chunk := stream.read(size):
            frames, rest = split_frames(rest + chunk)
            found += [parse_frame(data, 0.0).total_w for data in frames]
        assert found == [1.0, 2.0, 3.0]


class TestIntegrate:
    def test_frames_inside_and_over_the_edges(self) -> None:
        frames = [frame(1.0, 10.0, 1.0), frame(2.0, 20.0, 1.0), frame(3.0, 40.0, 1.0)]
        integral = integrate(frames, 0.5, 2.25)
        assert integral.energy_j == pytest.approx(5 + 20 + 10)
        assert integral.parts_j == pytest.approx({"cpu": 35})
        assert integral.covered_s == pytest.approx(1.75)

    def test_nothing_inside(self) -> None:
        assert integrate([frame(1.0, 10.0)], 1.0, 2.0).covered_s == 0

    @given(
        st.lists(st.floats(0, 100), min_size=1, max_size=20),
        st.floats(0, 1),
        st.floats(0, 1),
        st.floats(0, 1),
    )
    def test_windows_that_touch_add_up(self, watts: list[float], a: float, b: float, c: float) -> None:
        frames = [frame(0.2 * (index + 1), power) for index, power in enumerate(watts)]
        start, middle, stop = (edge * 0.2 * len(watts) for edge in sorted((a, b, c)))
        whole = integrate(frames, start, stop)
        parts = [integrate(frames, start, middle), integrate(frames, middle, stop)]
        assert sum(part.energy_j for part in parts) == pytest.approx(whole.energy_j, abs=1e-9)
        assert sum(part.covered_s for part in parts) == pytest.approx(whole.covered_s, abs=1e-9)


class PipedTool:
    """A tool whose output the test writes."""

    def __init__(self, *, stubborn: bool = False) -> None:
        reading, self._writing = os.pipe()
        self.stdout: IO[bytes] | None = os.fdopen(reading, "rb", buffering=0)
        self.stubborn = stubborn
        self.ended: list[str] = []

    def write(self, data: bytes) -> None:
        os.write(self._writing, data)

    def terminate(self) -> None:
        self.ended.append("terminate")
        if not self.stubborn:
            self.kill()

    def kill(self) -> None:
        self.ended.append("kill")
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    def wait(self, timeout: float | None = None) -> int:
        if self._writing >= 0:
            raise subprocess.TimeoutExpired("powermetrics", timeout or 0.0)
        return 0


class Bench:
    """A probe, its tool and its clock."""

    def __init__(self, tool: PipedTool, last_frame_s: float = 60.0) -> None:
        self.tool = tool
        self.now_s = 50.0
        self.once_asked: list[tuple[float, float, float]] = []
        self.probe = PowermetricsProbe(lambda: tool, self.clock, last_frame_s)

    def clock(self) -> float:
        now_s = self.now_s
        if self.once_asked:
            self.frame(*self.once_asked.pop())
        return now_s

    def frame(self, at_s: float, watts: float, elapsed_s: float = 0.2, pressure: str = "Nominal") -> None:
        """Lets the clock go on and has the tool print. Read by now or soon, but at no other time."""
        self.now_s = at_s
        self.tool.write(plist(watts, elapsed_s, pressure) + b"\0")


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(PipedTool())
    yield bench
    bench.probe.close()


class TestProbe:
    def test_a_window(self, bench: Bench) -> None:
        bench.frame(50.0, 99.0)  # what ended before the window does not count
        window = bench.probe.begin()
        bench.frame(60.0, 4.0, elapsed_s=10.0)
        reading = window.end()
        assert reading.energy_j == pytest.approx(40.0)
        assert reading.duration_s == 10.0
        assert reading.parts_j == pytest.approx({"cpu": 40.0, "gpu": 0.0})
        assert (reading.source, reading.scope, reading.kind) == ("powermetrics", "soc", "measured")
        assert reading.flags == (MODEL, WITHOUT_MEMORY)

    def test_end_waits_for_the_frame_that_holds_it(self, bench: Bench) -> None:
        bench.frame(50.0, 99.0)
        window = bench.probe.begin()
        bench.now_s = 60.0
        bench.once_asked = [(60.5, 4.0, 10.5)]  # comes after end() took the time
        reading = window.end()
        assert reading.energy_j == pytest.approx(40.0)
        assert reading.duration_s == 10.0

    def test_a_stray_millisecond_is_evened_out(self, bench: Bench) -> None:
        bench.frame(50.0, 99.0)
        window = bench.probe.begin()
        bench.frame(60.0, 4.0, elapsed_s=9.9)
        assert window.end().energy_j == pytest.approx(40.0)

    def test_thermal_pressure_is_flagged(self, bench: Bench) -> None:
        bench.frame(50.0, 1.0)
        window = bench.probe.begin()
        bench.frame(60.0, 1.0, elapsed_s=10.0, pressure="Heavy")
        assert window.end().flags[-1] == "thermal pressure: Heavy"

    def test_overlapping_windows_share_the_tool(self, bench: Bench) -> None:
        bench.frame(50.0, 1.0)
        outer = bench.probe.begin()
        inner = bench.probe.begin()
        bench.frame(60.0, 3.0, elapsed_s=10.0)
        assert inner.end().energy_j == pytest.approx(30.0)
        bench.frame(70.0, 5.0, elapsed_s=10.0)
        assert outer.end().energy_j == pytest.approx(80.0)

    def test_a_damaged_frame_leaves_a_gap(self, bench: Bench) -> None:
        bench.frame(50.0, 1.0)
        window = bench.probe.begin()
        bench.now_s = 55.0
        bench.tool.write(b"<plist></plist>\0")
        bench.frame(60.0, 1.0, elapsed_s=5.0)
        reading = window.end()
        assert reading.energy_j is None
        assert str(reading.reason).startswith("powermetrics covers ")

    def test_a_tool_that_ends_in_the_window(self, bench: Bench) -> None:
        bench.frame(50.0, 1.0)
        window = bench.probe.begin()
        bench.now_s = 60.0
        bench.tool.write(b"Killed by a limit\n" + plist(1.0)[:60])
        bench.tool.kill()
        reading = window.end()
        assert reading.energy_j is None
        assert reading.reason == (
            "powermetrics covers 0 s of the window's 10 s (powermetrics has ended: Killed by a limit)"
        )

    def test_a_tool_that_refuses(self, bench: Bench) -> None:
        bench.tool.write(b"powermetrics must be invoked as the superuser\n")
        bench.tool.kill()
        reading = bench.probe.begin().end()
        assert reading.energy_j is None
        assert "has ended: powermetrics must be invoked as the superuser" in str(reading.reason)

    def test_a_tool_that_falls_silent(self) -> None:
        bench = Bench(PipedTool(), last_frame_s=0.0)
        bench.frame(50.0, 1.0)
        window = bench.probe.begin()
        bench.now_s = 60.0
        reading = window.end()
        bench.probe.close()
        assert (reading.energy_j, reading.reason) == (None, "powermetrics covers 0 s of the window's 10 s")

    def test_a_tool_that_cannot_be_started(self) -> None:
        def start() -> PipedTool:
            raise OSError("no such file")

        probe = PowermetricsProbe(start)
        reading = probe.begin().end()
        probe.close()
        assert reading.energy_j is None
        assert "powermetrics cannot be run: no such file" in str(reading.reason)

    def test_close_ends_the_tool(self, bench: Bench) -> None:
        bench.frame(50.0, 1.0)
        bench.probe.begin()
        bench.probe.close()
        assert bench.tool.ended == ["terminate", "kill"]
        assert bench.tool.stdout is not None
        assert bench.tool.stdout.closed

    def test_close_ends_a_tool_that_will_not_go(self) -> None:
        bench = Bench(PipedTool(stubborn=True))
        bench.frame(50.0, 1.0)
        bench.probe.begin()
        bench.probe.close()
        assert bench.tool.ended == ["terminate", "kill"]

    def test_a_window_left_open_at_close(self, bench: Bench) -> None:
        bench.frame(50.0, 1.0)
        window = bench.probe.begin()
        bench.probe.close()
        bench.now_s = 60.0
        assert "powermetrics covers 0 s" in str(window.end().reason)

    def test_a_closed_probe_starts_anew(self) -> None:
        tools = [PipedTool(), PipedTool()]
        left = list(tools)
        now_s = [50.0]
        probe = PowermetricsProbe(lambda: left.pop(0), lambda: now_s[0])

        def measure(tool: PipedTool) -> Reading:
            tool.write(plist(1.0))
            window = probe.begin()
            now_s[0] += 10
            tool.write(plist(2.0, 10.0))
            reading = window.end()
            probe.close()
            return reading

        assert [measure(tool).energy_j for tool in tools] == pytest.approx([20.0, 20.0])


def test_a_real_process() -> None:
    script = f"import sys, time; sys.stdout.buffer.write({RECORDED!r}); sys.stdout.flush(); time.sleep(60)"
    probe = PowermetricsProbe(lambda: start_tool([sys.executable, "-c", script]), last_frame_s=0.0)
    reading = probe.begin().end()
    probe.close()
    assert str(reading.reason).startswith("powermetrics covers")
