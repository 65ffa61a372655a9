"""`pocketlm doctor` on checks that are made up."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pocketlm.cli import build_app, console
from pocketlm.cli import doctor as cli_doctor
from pocketlm.doctor import examine
from pocketlm.doctor.check import Check, Report
from pocketlm.errors import ModelNotFoundError

SOUND = Report(
    (
        Check("system", "ok", "A System 1.0", group="Device"),
        Check("memory", "ok", "16.0 GB", facts={"total_bytes": 16}, group="Device"),
        Check("rapl", "note", "root only", "As root: one\nthen: two", group="Energy"),
        Check("battery", "absent", "there is none", group="Energy"),
    )
)
SICK = Report((*SOUND.checks, Check("models", "problem", "altered\x1b[2J", "Pull it again.", group="Cache")))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `examine` was asked for; "report" is what it finds."""
    given: dict[str, Any] = {"report": SOUND}

    def fake(model: str | None, *, progress: Any, **options: Any) -> Report:
        given.update(options, model=model)
        progress("Measuring", 0, 1, "measurements")
        report: Report = given["report"]
        return report

    monkeypatch.setattr(examine, "examine", fake)
    return given


def test_a_pipe(asked: dict[str, Any]) -> None:
    result = CliRunner().invoke(build_app(), ["doctor"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "Device\n"
        "  ok       system   A System 1.0\n"
        "  ok       memory   16.0 GB\n"
        "\n"
        "Energy\n"
        "  note     rapl     root only\n"
        "                    -> As root: one\n"
        "                    -> then: two\n"
        "  absent   battery  there is none\n"
        "\n"
        "No problems, 1 note.\n"
    )
    assert (asked["model"], asked["measure_bandwidth"], asked["test_network"]) == (None, True, True)


def test_a_problem_is_the_exit_code(asked: dict[str, Any]) -> None:
    asked["report"] = SICK
    result = CliRunner().invoke(build_app(), ["doctor"])
    assert result.exit_code == 1
    assert "  PROBLEM  models   altered" in result.stdout
    assert result.stdout.endswith("1 problem, 1 note.\n")


def test_options(asked: dict[str, Any]) -> None:
    CliRunner().invoke(build_app(), ["doctor", "--model", "tiny", "--no-bandwidth", "--no-self-test"])
    assert (asked["model"], asked["measure_bandwidth"], asked["test_network"]) == ("tiny", False, False)


@pytest.mark.parametrize(("report", "code"), [(SOUND, 0), (SICK, 1)])
def test_json(report: Report, code: int, asked: dict[str, Any]) -> None:
    asked["report"] = report
    result = CliRunner().invoke(build_app(), ["doctor", "--json"])
    assert result.exit_code == code
    found = json.loads(result.stdout)
    assert found["state"] == report.state
    assert found["checks"][1] == {
        "group": "Device",
        "name": "memory",
        "state": "ok",
        "text": "16.0 GB",
        "remedy": None,
        "facts": {"total_bytes": 16},
    }


@pytest.mark.parametrize(("encoding", "pretty"), [("utf-8", True), ("ascii", False)])
def test_a_terminal(
    encoding: str, pretty: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    terminal = Console(file=stream, force_terminal=True, color_system=None, width=40)
    monkeypatch.setattr(console, "out", lambda: terminal)
    cli_doctor.print_report(SICK)
    stream.seek(0)
    shown = stream.read()
    if not pretty:
        assert "  PROBLEM  models   altered" in capsys.readouterr().out
        return
    assert [line.rstrip() for line in shown.splitlines()] == [
        "Device",
        "  ✓  system   A System 1.0",
        "  ✓  memory   16.0 GB",
        "Energy",
        "  !  rapl     root only",
        "              → As root: one",
        "              then: two",
        "  –  battery  there is none",
        "Cache",
        "  ✗  models   altered[2J",  # no escape from what a file says
        "              → Pull it again.",
        "1 problem, 1 note.",
    ]


def test_a_spinner_says_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(cli_doctor.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "err", lambda: Console(file=stream, force_terminal=True, width=60))
    with cli_doctor._busy() as progress:
        progress("Measuring memory", 0, 1, "measurements")
    assert "Measuring memory" in stream.getvalue()


def test_a_model_that_is_not_here(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> Report:
        raise ModelNotFoundError("there is no model 'x' on this machine.")

    monkeypatch.setattr(examine, "examine", missing)
    result = CliRunner().invoke(build_app(), ["doctor", "--model", "x"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no model 'x'")
