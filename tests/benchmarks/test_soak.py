"""The soak benchmark: it answers what it says, and tells growth from caches that fill up."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pocketlm.engine import Model
from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks import memory
from pocketlm_benchmarks import soak as module
from pocketlm_benchmarks.memory import UNKNOWN
from pocketlm_benchmarks.soak import Sample, growth, main, own_bytes, report, soak


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that grows by 5 MB with each sample."""
    taken: list[int] = []

    def grown() -> int:
        taken.append(1)
        return 5_000_000 * len(taken)

    monkeypatch.setattr(module, "own_bytes", grown)


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def test_all_kinds_of_requests(model: Model) -> None:
    samples = list(soak(model, 20, every=10, max_tokens=3))
    assert [sample.requests for sample in samples] == [10, 20]
    assert all(sample.bytes > 0 for sample in samples)


def test_it_stops_when_enough_are_done(model: Model) -> None:
    samples = list(soak(model, 8, every=2, max_tokens=3))
    assert samples[-1].requests in range(8, 12)
    assert len(samples) <= 4


@pytest.mark.usefixtures("growing")
def test_growth_fails(int8_bundle: Path) -> None:
    arguments = [str(int8_bundle), "--requests", "40", "--every", "10", "--max-tokens", "2", "--threads", "1"]
    result = invoke(*arguments)
    assert result.stdout.splitlines() == [
        "  requests        MB",
        "        10       5.0",
        "        20      10.0",
        "        30      15.0",
        "        40      20.0",
        "Growth in the second half: +500.00 MB per 1,000 requests.",
    ]
    assert result.exit_code == 1
    assert "grew by more than 2 MB" in result.stderr
    assert invoke(*arguments, "--bound-mb", "501").exit_code == 0


def test_only_the_second_half_counts() -> None:
    filling = [Sample(100 * number, 1_000_000 * min(number, 5)) for number in range(1, 11)]
    assert growth(filling) == pytest.approx(0, abs=1e-6)
    rising = [Sample(100 * number, 1_000 * number) for number in range(1, 11)]
    assert growth(rising) == pytest.approx(10)


def test_too_few_samples(int8_bundle: Path) -> None:
    with pytest.raises(InvalidSettingError, match="300 requests with a sample after every 100 make 3"):
        report(int8_bundle, 300, 100, 2, print)


def test_an_error_has_no_traceback(tmp_path: Path) -> None:
    result = invoke(str(tmp_path))
    assert result.exit_code == 1
    assert f"Error: {tmp_path} is not a bundle" in result.stderr


def test_memory_where_the_system_does_not_tell_it_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_bytes()
    monkeypatch.setattr(memory, "memory_of", lambda pid: UNKNOWN)
    assert own_bytes() > own / 2 > 0
