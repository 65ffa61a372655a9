"""The benchmark of forward passes: what it runs, in which order, and what it prints. Never how fast it is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.steps import Prefill, Step, Subject, cases_of, main, measure, report, table


def command_line(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_two_bundles_beside_each_other(int8_bundle: Path) -> None:
    lines = report(
        [int8_bundle, int8_bundle], cases_of([1, 3], [0, 130], [140]), rounds=1, threads=1
    ).splitlines()
    assert lines[0].startswith("threads: 1, rounds: 1, ")
    assert lines[1:3] == [f"1  {int8_bundle}", f"2  {int8_bundle}"]
    assert lines[4].split() == ["1", "2"]
    assert [line[:22].strip() for line in lines[5:]] == [
        "1 row behind 0",
        "3 rows behind 0",
        "1 row behind 130",
        "3 rows behind 130",
        "prefill of 140",
    ]
    assert all(line.endswith("×)") for line in lines[5:])


def test_columns_and_ratios_stand_below_each_other() -> None:
    lines = table([Step(1, 2048), Prefill(512)], [[0.0125, 0.01, 0.025], [1.5, 1.0, 3.0]]).splitlines()
    assert lines[1].split() == [
        "1",
        "row",
        "behind",
        "2,048",
        "12.50",
        "10.00",
        "(1.250×)",
        "25.00",
        "(0.500×)",
    ]
    assert lines[2].split()[3:] == ["1,500.00", "1,000.00", "(1.500×)", "3,000.00", "(0.500×)"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[1].index("12.50") + len("12.50") == lines[0].index("1") + 1


def test_each_pass_stands_where_it_should(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(int8_bundle, 200, threads=1)
    seen: list[tuple[int, list[int], int | None]] = []
    forward = subject.session.forward

    def watched(ids: list[int], cache: Any, rows: Any = None) -> Any:
        seen.append((len(cache), list(ids), None if rows is None else len(rows)))
        return forward(ids, cache, rows)

    monkeypatch.setattr(subject.session, "forward", watched)
    Step(3, 150).seconds(subject, ticks())
    filled = [(0, subject.ids[:128], None), (128, subject.ids[128:150], None)]
    assert seen == filled + 10 * [(150, subject.ids[150:153], 3)]
    seen.clear()
    Step(1, 150).seconds(subject, ticks())  # the depth is there already
    assert seen == 10 * [(150, subject.ids[150:151], 1)]
    seen.clear()
    Prefill(150).seconds(subject, ticks())
    assert seen == filled


def ticks() -> Any:
    """A clock that grows by one each time it is read."""
    times: Iterator[int] = count()
    return lambda: float(next(times))


def test_only_what_comes_after_warming_up_counts(int8_bundle: Path) -> None:
    subject = Subject(int8_bundle, 8, threads=1)
    readings = iter([*[0.0, 100.0] * 2, *[0.0, 1.0] * 8])
    assert Step(1, 0).seconds(subject, lambda: next(readings)) == [1.0] * 8


def test_subjects_take_turns(int8_bundle: Path) -> None:
    subjects = [Subject(int8_bundle, 8, threads=1) for _ in range(2)]
    readings = iter([0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0])
    assert measure(Prefill(8), subjects, 2, lambda: next(readings)) == [[1.0, 3.0], [2.0, 4.0]]


def test_more_tokens_than_the_context(int8_bundle: Path) -> None:
    with pytest.raises(InvalidSettingError, match="513 tokens were asked for, but tiny was trained for 512"):
        Subject(int8_bundle, 513, threads=1)


def test_nothing_to_measure() -> None:
    with pytest.raises(InvalidSettingError, match="nothing to measure"):
        cases_of([], [0], [])


@pytest.mark.parametrize("option", ["--rows=0", "--rows=1,x", "--depths=-1", "--prefill=1,,2"])
def test_lists_that_are_none(option: str, tmp_path: Path) -> None:
    result = command_line(tmp_path, option)
    assert result.exit_code == 1
    name, _, text = option.partition("=")
    assert f"Error: {name} is '{text}'; whole numbers from" in result.stderr


def test_from_the_command_line(int8_bundle: Path) -> None:
    result = command_line(int8_bundle, "--rows=2", "--depths=4", "--prefill=", "--rounds=1", "--threads=1")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("2 rows behind 4")


def test_an_error_has_no_traceback(tmp_path: Path) -> None:
    result = command_line(tmp_path)
    assert result.exit_code == 1
    assert f"Error: {tmp_path} is not a bundle" in result.stderr
