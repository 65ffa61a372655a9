"""The scripts that measure the engine: speculation, answers at once, determinism."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pocketlm_benchmarks import concurrency, determinism, speculation
from pocketlm_benchmarks.result import OURS

PROMPTS = (({"role": "user", "content": "Ah, ah, ah."},), ({"role": "user", "content": "Say the same."},))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (concurrency, determinism, speculation):
        monkeypatch.setattr(module, "load_workload", lambda name: SimpleNamespace(prompts=PROMPTS))
        monkeypatch.setattr(module, "CONTEXT_LENGTH", 256)


def test_speculation_compares_each_workload(int8_bundle: Path) -> None:
    lines = speculation.report(int8_bundle, "", None, rounds=1, new_tokens=12, threads=1).splitlines()
    assert lines[0].split("  ")[0] == "workload"
    assert [line.split()[0] for line in lines[1:]] == [*speculation.ORDINARY, *speculation.REPEATING]
    assert all("of 2" in line for line in lines[1:])


def test_a_rate_is_of_all_tokens_of_a_round() -> None:
    measured = speculation.Measured()
    measured.off.add(0, 10, 1.0)
    measured.off.add(0, 30, 1.0)
    measured.on.add(0, 40, 0.5)
    measured.peers["other"].add(0, 8, 0.2)
    measured.answers, measured.different, measured.drafted, measured.accepted = 4, 1, 20, 5
    head, row = speculation.table({"chat": measured}).splitlines()
    assert " ".join(head.split()) == ("workload off tok/s on tok/s on / off accepted same text on / other")
    assert row.split() == ["chat", "20.0", "80.0", "4.00", "25%", "of", "20", "3", "of", "4", "2.00"]


def test_answers_at_once_from_a_process(int8_bundle: Path) -> None:
    rates = concurrency.measure(int8_bundle, "", None, [1, 3], rounds=1, new_tokens=4, threads=1)
    assert list(rates) == [OURS]
    assert {number: len(values) for number, values in rates[OURS].items()} == {1: 1, 3: 1}


def test_ratios_to_one_and_to_a_peer() -> None:
    rates = {OURS: {1: [10.0, 20.0], 8: [40.0, 80.0]}, "server": {1: [20.0, 20.0], 8: [20.0, 40.0]}}
    lines = [line.split() for line in concurrency.table(rates).splitlines()]
    assert lines[1] == ["1", "15.0", "20.0", "1.00", "0.75"]
    assert lines[2] == ["8", "60.0", "30.0", "4.00", "2.00"]


def test_answers_that_must_be_the_same(int8_bundle: Path) -> None:
    text = list(determinism.lines(int8_bundle, None, 12))
    assert text[0].startswith("default, ")
    rows = [line for line in text if line.startswith("  ")]
    assert len(rows) == 2 * 2 * len(determinism.WAYS)
    by_default, reproducible = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    total = int(text[0].split()[1])
    assert all(f"{total} of {total} the same" in row for row in reproducible)
    certain = [row for row in by_default if "specul" not in row and "all of these" not in row]
    assert all(f"{total} of {total} the same" in row for row in certain)


def test_where_answers_part() -> None:
    assert determinism.compared([(1, 2), (3,)], [(1, 2), (3,)]) == "2 of 2 the same"
    parted = determinism.compared([(1, 2), (3, 4)], [(1, 2, 3), (3, 5)])
    assert parted == "0 of 2 the same, the others part at token 2 (median)"


@pytest.mark.parametrize("main", [concurrency.main, determinism.main, speculation.main])
def test_an_error_has_no_traceback(main: Any, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 1
    assert f"Error: {tmp_path} is not a bundle" in result.stderr
