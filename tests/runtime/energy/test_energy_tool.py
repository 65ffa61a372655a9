"""Running a sensor's tool."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pocketlm.energy.tool import ToolError, run_tool


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_what_it_prints() -> None:
    assert run_tool(python("print('EXT5V_V volt(24)=5.1V')"), timeout_s=60).strip() == "EXT5V_V volt(24)=5.1V"


def test_numbers_in_every_language_have_points() -> None:
    assert run_tool(python("import os; print(os.environ['LC_ALL'])"), timeout_s=60).strip() == "C"


def test_it_cannot_ask() -> None:
    assert run_tool(python("import sys; print(repr(sys.stdin.read()))"), timeout_s=60).strip() == "''"


def test_bytes_that_are_no_text() -> None:
    assert "\ufffd" in run_tool(python("import sys; sys.stdout.buffer.write(b'\\xff')"), timeout_s=60)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; print('on stdout'); sys.exit(255)", "ends with status 255: on stdout"),
        ("import sys; sys.exit('on\\nstderr')", "ends with status 1: on stderr"),
        ("import sys; sys.exit(3)", "ends with status 3: no message"),
    ],
)
def test_it_fails(source: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        run_tool(python(source), timeout_s=60)


def test_it_is_missing() -> None:
    with pytest.raises(ToolError, match=r"^no-such-tool-of-anyone is not installed$"):
        run_tool(["no-such-tool-of-anyone"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no executable bit")
def test_it_is_not_executable(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("")
    with pytest.raises(ToolError, match="tool cannot be run: "):
        run_tool([str(tool)])


def test_it_hangs() -> None:
    with pytest.raises(ToolError, match=r"did not answer within 0\.05 s"):
        run_tool(python("import time; time.sleep(60)"), 0.05)
