"""What the command line writes: colours, progress bars and lines."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Iterator
from typing import Literal

import pytest

from pocketlm.cli import console


class Terminal(io.StringIO):
    """Standard error as a terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes standard error a terminal (in the test itself: pytest sets its own after the fixtures)."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the progress lines read: its one element."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_messages_have_no_colour_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    console.error("a [red]path[/] that is long " + "x" * 100 + "\nsecond line \x1b[31m")
    console.note("remark :smile:")
    assert capsys.readouterr().err == (
        "error: a [red]path[/] that is long " + "x" * 100 + " second line [31m\nremark :smile:\n"
    )


def test_messages_have_colour_on_a_terminal_and_keep_paths_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    path = "/home/user/" + "x" * 100
    console.error(f"cannot read {path} because")
    written = terminal.getvalue()
    assert written == f"\x1b[1;31merror:\x1b[0m cannot read\n{path}\nbecause\n"


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    console.error("plain")
    assert "31m" not in terminal.getvalue()


@pytest.mark.parametrize(("number", "text"), [(0, "0 tokens"), (1, "1 token"), (2048, "2,048 tokens")])
def test_counts_agree_with_their_noun(number: int, text: str) -> None:
    assert console.count(number, "token") == text


ROWS = {"Chat page": "http://127.0.0.1:1/", "Empty": "", "API": "word " * 20}


def test_rows_have_no_blanks_behind_them(capsys: pytest.CaptureFixture[str]) -> None:
    console.note_rows(ROWS)
    console.note_rows({})
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Chat page  http://127.0.0.1:1/", "Empty", "API        " + "word " * 19 + "word"]


@pytest.mark.parametrize(
    ("dim", "first"),
    [
        ("names", "\x1b[2mChat page  \x1b[0mhttp://127.0.0.1:1/"),
        ("texts", "Chat page  \x1b[2mhttp://127.0.0.1:1/\x1b[0m"),
    ],
)
def test_rows_on_a_terminal(
    dim: Literal["names", "texts"], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_a_terminal(monkeypatch)
    console.note_rows(ROWS, dim=dim)
    lines = terminal.getvalue().splitlines()
    assert lines[0] == first
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in lines]
    assert len(plain) == 4
    assert all(len(line) <= 80 for line in plain)
    assert plain[3].startswith(" " * 11 + "word")


def test_the_cursor_comes_back_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.show_cursor()
    assert capsys.readouterr().err == ""
    terminal = on_a_terminal(monkeypatch)
    console.show_cursor()
    assert terminal.getvalue() == "\x1b[?25h"


# Progress


def downloading(seconds: float, clock: list[float], *, total: int = 100_000_000) -> Iterator[None]:
    with console.progress() as progress:
        for tenth in range(11):
            progress("Downloading m", tenth * 10_000_000, total, "B")
            yield
            clock[0] += seconds / 10


def test_short_tasks_are_not_worth_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    list(downloading(1.5, clock))
    assert capsys.readouterr().err == ""


def test_long_tasks_get_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    list(downloading(25.0, clock))
    assert capsys.readouterr().err.splitlines() == [
        "Downloading m: 10.0 MB of 100.0 MB (10%)",
        "Downloading m: 50.0 MB of 100.0 MB (50%)",
        "Downloading m: 90.0 MB of 100.0 MB (90%)",
        "Downloading m: 100.0 MB in 25 s",
    ]


def test_a_task_of_unknown_size_ends_when_the_next_begins(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress() as progress:
        progress("Reading", 0, 0, "tensors")
        clock[0] += 3
        progress("Reading", 12, 0, "tensors")
        progress("Calibrating", 0, 30, "layers")
        clock[0] += 4
        progress("Calibrating", 30, 30, "layers")
        progress("Calibrating", 0, 30, "layers")
    assert capsys.readouterr().err.splitlines() == [
        *["Reading: 12 tensors", "Reading: 12 tensors in 3 s", "Calibrating: 30 layers in 4 s"]
    ]


def test_work_that_fails_is_not_reported_as_done(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError), console.progress() as progress:
        progress("Reading", 1, 0, "tensors")
        clock[0] += 5
        raise RuntimeError
    assert capsys.readouterr().err == ""


def shown(terminal: Terminal) -> list[str]:
    """The lines that stand on the terminal in the end, without colours and bars."""
    lines: list[str] = []
    row = 0
    for part in re.split(r"(\n|\x1b\[1A|\x1b\[2K|\r)", terminal.getvalue()):
        lines += [""] * (row + 1 - len(lines))
        if part == "\n":
            row += 1
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part != "\r":
            lines[row] += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[━╸╺]", "", part)
    return [" ".join(line.split()) for line in lines]


def test_bars_stay_when_their_task_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(console, "SHOWN_AFTER_S", 0.0)
    with console.progress() as progress:
        progress("Downloading m", 10, 98_400_000, "B")
        progress("Downloading m", 98_400_000, 98_400_000, "B")
        progress("Reading", 7, 0, "tensors")
        progress("Calibrating", 12, 30, "layers")
        progress("Calibrating", 30, 30, "layers")
        progress("Calibrating", 12, 30, "layers")
    lines = shown(terminal)
    assert [line.partition(" in ")[0] for line in lines[:4]] == [
        *["Downloading m 98.4 MB", "Reading 7 tensors", "Calibrating 30 layers", "Calibrating 12 layers"]
    ]
    assert lines[4:] == [""]


def test_bars_keep_their_state_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(console, "SHOWN_AFTER_S", 0.0)
    with pytest.raises(RuntimeError), console.progress() as progress:
        progress("Calibrating", 12, 30, "layers")
        raise RuntimeError
    assert shown(terminal) == ["Calibrating 12 of 30 layers", ""]


def test_a_quick_task_leaves_no_trace_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with console.progress() as progress:
        progress("Checking", 1, 2, "files")
        progress("Checking", 2, 2, "files")
    assert "\x1b[" in terminal.getvalue()
    assert set(shown(terminal)) == {""}
    assert terminal.getvalue().count("\n") == terminal.getvalue().count("\x1b[1A")
