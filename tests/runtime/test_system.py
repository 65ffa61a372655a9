"""What small files and small programs tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.trees import write_tree
from pocketlm.system import command_output, fields, read_int, read_text


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"one\n", "one"), (b"linux,kvm\0", "linux,kvm"), (b" \n", None), (b"", None), (b"\xff!", "\ufffd!")],
)
def test_text(content: bytes, text: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert read_text(tmp_path / "file") == text


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_text(tmp_path / "nothing") is None
    assert read_text(tmp_path) is None  # a folder, as a file whose driver answers with an error
    assert read_int(tmp_path) is None


@pytest.mark.parametrize(("text", "number"), [("42", 42), ("-1", -1), ("0x10", None), ("many", None)])
def test_numbers(text: str, number: int | None, tmp_path: Path) -> None:
    assert read_int(write_tree(tmp_path, {"file": text}) / "file") == number


def test_fields_keep_the_first_of_equal_keys() -> None:
    text = "processor\t: 0\nmodel name\t: A: B\nno colon\nempty:\nprocessor\t: 1\n"
    assert fields(text) == {"processor": "0", "model name": "A: B", "empty": ""}
    assert fields(None) == {}


def test_output_of_a_program() -> None:
    assert command_output([sys.executable, "-c", "print(1, 2)"]) == "1 2\n"


def test_a_program_that_is_not_there_or_fails_tells_nothing(tmp_path: Path) -> None:
    assert command_output([str(tmp_path / "nothing")]) is None
    assert command_output([sys.executable, "-c", "print('told'); raise SystemExit(1)"]) is None


def test_a_program_that_hangs_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: Any, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(arguments[0], timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert command_output(["slow"]) is None
