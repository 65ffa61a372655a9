"""macOS' powermetrics, which prints the power of an Apple processor several times a second, to root only.

It writes property lists with a NUL between them (powermetrics(1)); each stands for the `elapsed_ns` that end
with it. `processor.combined_power` is the sum of processor, graphics and neural engine in mW, without memory.
The figures come from Apple's model of power: the manual says that they may be inaccurate and are not meant
for comparing devices.
"""

from __future__ import annotations

import io
import plistlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol
from weakref import WeakSet

from pocketlm.energy.reading import Kind, Reading, Scope
from pocketlm.errors import PocketlmError

SOURCE = "powermetrics"
INTERVAL_MS = 200
COMMAND = (
    "/usr/bin/powermetrics",
    "--samplers",
    "cpu_power,gpu_power,thermal",
    "--format",
    "plist",
    "--sample-rate",
    str(INTERVAL_MS),
    "--buffer-size",
    "0",
)
MODEL = "from Apple's model of power, not from a sensor; not for comparing devices"
WITHOUT_MEMORY = "without memory"

_START_S, _LAST_FRAME_S, _STOP_S = 10.0, 2.0, 2.0  # how long to wait for the first frame, the last, the end
_LEAST_COVERED = 0.95
_END = b"</plist>"
_RAILS = {"cpu_power": "cpu", "gpu_power": "gpu", "ane_power": "ane"}


class PowermetricsError(PocketlmError):
    """A property list that is damaged or has no power in it."""


@dataclass(frozen=True)
class Frame:
    """Mean power over the `elapsed_s` before `stop_s`."""

    stop_s: float  # when it arrived, on the probe's clock
    elapsed_s: float
    total_w: float
    power_w: Mapping[str, float]  # by rail
    thermal_pressure: str | None


def parse_frame(data: bytes, stop_s: float) -> Frame:
    """One property list. Raises PowermetricsError if it is damaged or has no power in it."""
    start = data.find(b"<?xml")
    try:
        root = plistlib.loads(data[max(start, 0) :])
    # Besides its own error, plistlib lets those of the parser and of its values' types through.
    except Exception as error:
        raise PowermetricsError(f"powermetrics printed a damaged property list: {error}") from None
    fields = root if isinstance(root, dict) else {}
    processor = fields.get("processor")
    milliwatts = _numbers(processor if isinstance(processor, dict) else {})
    elapsed_ns = _numbers(fields).get("elapsed_ns", 0.0)
    power_w = {rail: milliwatts[key] * 1e-3 for key, rail in _RAILS.items() if key in milliwatts}
    total_mw = milliwatts.get("combined_power")
    if elapsed_ns <= 0 or (total_mw is None and "cpu" not in power_w):
        raise PowermetricsError(
            "powermetrics prints no elapsed_ns, or neither combined_power nor cpu_power: "
            f"found {', '.join(fields) or 'nothing'}; processor: {', '.join(milliwatts) or 'nothing'}"
        )
    total_w = sum(power_w.values()) if total_mw is None else total_mw * 1e-3
    pressure = fields.get("thermal_pressure")
    return Frame(stop_s, elapsed_ns * 1e-9, total_w, power_w, pressure if isinstance(pressure, str) else None)


def _numbers(fields: Mapping[str, object]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def split_frames(data: bytes) -> tuple[list[bytes], bytes]:
    """The property lists that are complete, and the rest.

    A list's own end tag is what counts: the NUL comes with the next list only, an interval late.
    """
    *frames, rest = data.split(_END)
    return [frame + _END for frame in frames], rest


@dataclass(frozen=True)
class Integral:
    """The energy of frames within a window."""

    energy_j: float
    parts_j: Mapping[str, float]
    covered_s: float


def integrate(frames: Iterable[Frame], start_s: float, stop_s: float) -> Integral:
    """Joules between two times; a frame that overlaps an edge counts by the share that is inside."""
    energy_j = covered_s = 0.0
    parts_j: dict[str, float] = {}
    for frame in frames:
        inside_s = min(frame.stop_s, stop_s) - max(frame.stop_s - frame.elapsed_s, start_s)
        if inside_s > 0:
            covered_s += inside_s
            energy_j += frame.total_w * inside_s
            for rail, watts in frame.power_w.items():
                parts_j[rail] = parts_j.get(rail, 0.0) + watts * inside_s
    return Integral(energy_j, parts_j, covered_s)


class Tool(Protocol):
    """The running tool, as subprocess.Popen has it."""

    stdout: IO[bytes] | None

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def start_tool(command: Sequence[str] = COMMAND) -> Tool:
    """Starts powermetrics; raises OSError."""
    # Its complaints join its output: a pipe of their own would block it once full.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )


class PowermetricsProbe:
    """Runs the tool from the first window until `close()`, and integrates what it prints."""

    source = SOURCE
    scope: Scope = "soc"
    kind: Kind = "measured"
    resolution_j: float | None = None
    least_window_s = 10.0  # frames are means over adjoining intervals, so nothing is missed between them
    quick = False  # the first window waits for the tool, and each end for its last frame

    def __init__(
        self,
        start: Callable[[], Tool] = start_tool,
        clock: Callable[[], float] = time.monotonic,
        last_frame_s: float = _LAST_FRAME_S,
    ) -> None:
        self._start = start
        self._clock = clock
        self._last_frame_s = last_frame_s
        self._tool: Tool | None = None
        self._thread: threading.Thread | None = None
        self._state = threading.Condition()
        # Weak: a caller may lose a window to an exception.
        self._windows: WeakSet[PowermetricsWindow] = WeakSet()
        self._latest_s: float | None = None  # the last frame's arrival
        self._problem: str | None = None  # why there will be no more frames, or the last one was of no use

    def begin(self) -> PowermetricsWindow:
        """Starts the tool if it does not run yet, and waits for its first frame (most of a second)."""
        with self._state:
            if self._thread is None:
                self._launch()
            self._state.wait_for(lambda: self._latest_s is not None or self._problem is not None, _START_S)
            window = PowermetricsWindow(self, self._clock())
            self._windows.add(window)
            return window

    def close(self) -> None:
        """Ends the tool."""
        with self._state:
            tool, thread = self._tool, self._thread
            self._tool = self._thread = self._latest_s = None
            self._problem = "the probe is closed"
            self._windows.clear()
        if tool is not None:
            _stop(tool)
        if thread is not None:
            thread.join()

    def _launch(self) -> None:
        try:
            self._tool = self._start()
        except OSError as error:
            self._problem = f"powermetrics cannot be run: {error}"
            return
        self._problem = None
        self._thread = threading.Thread(
            target=self._listen, args=(self._tool,), name="pocketlm-energy-powermetrics", daemon=True
        )
        self._thread.start()

    def _listen(self, tool: Tool) -> None:
        rest = b""
        with tool.stdout or io.BytesIO() as output:
            while chunk := output.read(2**16):
                frames, rest = split_frames(rest + chunk)
                for frame in frames:
                    self._take(frame)
        last_words = " ".join(
            rest.decode("utf-8", errors="replace").split("<?xml")[0].replace("\0", " ").split()
        )
        with self._state:
            self._problem = f"powermetrics has ended: {last_words or 'it did not say why'}"
            self._state.notify_all()

    def _take(self, data: bytes) -> None:
        with self._state:
            try:
                frame = parse_frame(data, self._clock())
            except PowermetricsError as error:
                self._problem = str(error)
            else:
                self._latest_s, self._problem = frame.stop_s, None
                for window in self._windows:
                    window.frames.append(frame)
            self._state.notify_all()

    def _finish(self, window: PowermetricsWindow) -> tuple[float, str | None]:
        """The window's end, once its last frame is there, and what the tool complained of."""
        with self._state:
            stop_s = self._clock()
            self._state.wait_for(
                lambda: self._problem is not None or (self._latest_s or 0.0) >= stop_s, self._last_frame_s
            )
            self._windows.discard(window)
            return stop_s, self._problem


class PowermetricsWindow:
    """A measurement under way."""

    def __init__(self, probe: PowermetricsProbe, start_s: float) -> None:
        self.frames: list[Frame] = []
        self._probe = probe
        self._start_s = start_s

    def end(self) -> Reading:
        """Waits for the frame that holds the window's last moment."""
        stop_s, problem = self._probe._finish(self)
        duration_s = stop_s - self._start_s
        integral = integrate(self.frames, self._start_s, stop_s)
        if integral.covered_s <= 0 or integral.covered_s < _LEAST_COVERED * duration_s:
            reason = f"powermetrics covers {integral.covered_s:.3g} s of the window's {duration_s:.3g} s"
            if problem:
                reason += f" ({problem})"
            return Reading(SOURCE, "soc", "measured", duration_s, None, reason=reason)
        # Frames are stamped on arrival, so they cover a few milliseconds more or less than the window.
        scale = duration_s / integral.covered_s
        pressures = {frame.thermal_pressure for frame in self.frames} - {None, "Nominal"}
        flags = [
            MODEL,
            WITHOUT_MEMORY,
            *(f"thermal pressure: {pressure}" for pressure in sorted(map(str, pressures))),
        ]
        return Reading(
            SOURCE,
            "soc",
            "measured",
            duration_s,
            integral.energy_j * scale,
            parts_j={rail: joules * scale for rail, joules in integral.parts_j.items()},
            flags=tuple(flags),
        )


def _stop(tool: Tool) -> None:
    tool.terminate()
    try:
        tool.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        tool.kill()
        tool.wait()
