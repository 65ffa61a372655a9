"""Measuring the power modes, with threads in place of processes."""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pocketlm.energy import Found, Reading
from pocketlm.errors import BundleError
from pocketlm.power import Power
from pocketlm_benchmarks import power_modes
from pocketlm_benchmarks.power_modes import MODES, Round, measure, median, ratio


class FakeProbe:
    """Every window has used 3 J."""

    source, scope, kind, resolution_j, least_window_s = "fake", "package", "measured", None, 0.0

    def begin(self) -> FakeProbe:
        return self

    def end(self) -> Reading:
        return Reading("fake", "package", "measured", 1.0, 3.0)

    def close(self) -> None:
        """Holds nothing."""


class FakeContext:
    """A thread for each process, with real pipes."""

    Pipe = staticmethod(multiprocessing.Pipe)

    class Process(threading.Thread):
        pid = None

        def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
            # A process has the connection for itself, whatever happens to its parent's.
            connection = multiprocessing.connection.Connection(os.dup(args[0].fileno()))
            super().__init__(target=target, args=(connection, *args[1:]), daemon=daemon)


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POCKETLM_THREADS", "1")
    monkeypatch.setattr(power_modes, "PAUSE_S", 0.001)
    monkeypatch.setattr(power_modes, "find_probe", lambda: Found(FakeProbe(), (), ()))
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FakeContext)


def round_of(decode_s: float, decode_j: float | None = None) -> Round:
    return Round(1.0, decode_s, 1.0, decode_s, 1.0, 0.0, decode_j)


def test_every_mode_has_its_rounds(int8_bundle: Path) -> None:
    started, measured, _ = measure(int8_bundle, rounds=2, tokens=3)
    assert [*started] == [*measured] == [*MODES]
    assert started["eco"].power == Power(threads=1, spin_us=0, speculate=True)
    assert started["fast"].power == Power(threads=1, spin_us=None, speculate=True)
    assert (started["fast"].energy_source, started["fast"].energy_kind) == ("fake", "measured")
    for rounds in measured.values():
        assert len(rounds) == 2
        for each in rounds:
            assert min(each.prefill_s, each.decode_s, each.decode_cpu_s, each.rows_cpu_s) > 0
            assert each.decode_j == 1.0


def test_a_window_is_as_long_as_the_probe_needs(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeProbe, "least_window_s", 0.05)
    _, measured, _ = measure(int8_bundle, rounds=1, tokens=1, modes=["eco"])
    (each,) = measured["eco"]
    assert each.decode_j is not None
    assert each.decode_s * 3.0 / each.decode_j >= 0.05


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        measure(tmp_path, rounds=1, tokens=1)


def test_medians_and_ratios() -> None:
    slow, quick = (
        [round_of(3.0), round_of(8.0), round_of(40.0)],
        [round_of(1.0), round_of(4.0), round_of(10.0)],
    )
    assert median(slow, lambda each: each.decode_s) == 8.0
    assert ratio(slow, quick, lambda each: each.decode_s) == 3.0
    assert ratio(quick, quick, lambda each: each.decode_cpu_s) == 1.0
    assert median([round_of(1.0, 2.0), round_of(1.0)], lambda each: each.decode_j) is None


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(power_modes.main)
    return CliRunner().invoke(app, [*arguments, "--rounds", "1", "--tokens", "1"], catch_exceptions=False)


def test_the_table(int8_bundle: Path) -> None:
    result = run(str(int8_bundle))
    assert result.exit_code == 0
    headings, eco, balanced, fast = (line.split() for line in result.stdout.splitlines()[:4])
    assert headings[:5] == ["MODE", "THREADS", "SPIN", "PREFILL", "DECODE"]
    assert (eco[:3], balanced[:4], fast[:3]) == (
        *(["eco", "1", "none"], ["balanced", "1", "50", "µs"], ["fast", "1", "default"]),
    )
    assert fast.count("1.00") >= 2
    assert "3.000 J/tok" in result.stdout
    assert "Energy of decoding: fake, measured." in result.stdout


def test_json(int8_bundle: Path) -> None:
    found = json.loads(run(str(int8_bundle), "--json").stdout)
    assert [*found] == [*MODES]
    assert found["eco"]["power"] == {"threads": 1, "spin_us": 0, "speculate": True}
    assert all(math.isfinite(value) for each in found["eco"]["rounds"] for value in each.values())
