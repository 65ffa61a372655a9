"""The command line as a whole: plug-ins, exit codes, errors in one line, a light start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pocketlm import cli
from pocketlm.errors import BundleError, InvalidSettingError


class FakeEntryPoint:
    """What importlib.metadata gives for one plugged-in command."""

    module = "somebody_elses.cli"
    dist: Any = SimpleNamespace(name="somebody-elses")

    def __init__(self, name: str, register: Callable[[typer.Typer], None] | Exception) -> None:
        self.name = name
        self._register = register

    def load(self) -> Callable[[typer.Typer], None]:
        if isinstance(self._register, Exception):
            raise self._register
        return self._register


def raising(error: BaseException) -> Callable[[typer.Typer], None]:
    """A `register` whose command `plug` raises `error`."""

    def register(app: typer.Typer) -> None:
        @app.command("plug", help="Plugged in.")
        def command() -> None:
            raise error

    return register


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line with one plugged-in command named plug."""

    def run(register: Callable[[typer.Typer], None] | Exception, *arguments: str) -> Result:
        point = FakeEntryPoint("plug", register)

        def entry_points(*, group: str, name: str | None = None) -> list[FakeEntryPoint]:
            return [point] if group == "pocketlm.commands" and name in {None, "plug"} else []

        monkeypatch.setattr(cli, "entry_points", entry_points)
        return CliRunner().invoke(cli.build_app(), arguments or ["plug"])

    return run


def test_help_lists_the_commands_in_order_and_what_is_plugged_in(plug: Callable[..., Result]) -> None:
    result = plug(raising(ValueError()), "--help")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == ["run", "chat", "pull", "list", "show", "rm", "tune", "doctor", "ps", "serve", "plug"]
    assert "Plugged in." in result.stdout


def test_no_arguments_show_the_help() -> None:
    result = CliRunner().invoke(cli.build_app(), [])
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


def test_a_plug_in_whose_packages_are_missing_says_which_extra_to_install(
    plug: Callable[..., Result],
) -> None:
    missing = ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")
    result = plug(missing)
    assert result.exit_code == 1
    assert result.stderr == (
        'error: pocketlm plug needs more packages. Install them with: pip install "pocketlm[plug]"\n'
    )
    help_text = " ".join(plug(missing, "--help").stdout.split())
    assert "plug Not available: pocketlm plug needs more packages" in help_text


def test_a_plug_in_that_imports_its_packages_late_says_the_same(plug: Callable[..., Result]) -> None:
    result = plug(raising(ModuleNotFoundError("No module named 'gguf.quants'", name="gguf.quants")))
    assert result.exit_code == 1
    assert 'pip install "pocketlm[plug]"' in result.stderr


def test_a_module_of_our_own_that_is_missing_is_a_bug_and_not_an_extra(plug: Callable[..., Result]) -> None:
    result = plug(raising(ModuleNotFoundError("No module named 'pocketlm.x'", name="pocketlm.x")))
    assert result.exit_code == 1
    assert "unexpected ModuleNotFoundError: No module named 'pocketlm.x'" in result.stderr


def test_a_broken_plug_in_leaves_the_other_commands_alone(plug: Callable[..., Result]) -> None:
    broken = RuntimeError("who knows")
    result = plug(broken)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the command plug of the package somebody-elses could not be loaded: RuntimeError: who knows. "
        "Install or upgrade that package again.\n"
    )
    assert plug(broken, "run", "--help").exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            BundleError("model.onnx is missing.\nPull it again."),
            1,
            "error: model.onnx is missing. Pull it again.\n",
        ),
        (InvalidSettingError("top_p is 2, expected 0 to 1."), 1, "error: top_p is 2, expected 0 to 1.\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (OSError(5, "Input/output error"), 1, "error: Input/output error\n"),
        (MemoryError(), 1, "error: there is not enough memory."),
        (KeyError("x"), 1, "error: unexpected KeyError: 'x'. This is a bug in pocketlm: please report it"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (typer.Exit(3), 3, ""),
    ],
)
def test_every_error_is_one_line_and_a_code(
    plug: Callable[..., Result], error: BaseException, code: int, message: str
) -> None:
    result = plug(raising(error))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == (1 if message else 0)


def test_the_traceback_is_shown_on_request(
    plug: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETLM_DEBUG", "1")
    result = plug(raising(BundleError("broken")))
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("\nerror: broken\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum", "x"], "No such command 'rum'"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "m", "p", "--temperature", "-1"], "--temperature"),
        (["run", "m", "p", "--max-tokens", "0"], "--max-tokens"),
        (["run", "m", "p", "--top-p", "1.5"], "--top-p"),
        (
            ["run", "m", "p", "--precision", "int9"],
            "'int9' is not a precision; use fp32 or int8 or int4. Did you mean int8",
        ),
        (["run", "m", "p", "--raw", "--system", "s"], "--raw leaves out the chat template"),
        (["chat", "m", "--threads", "none"], "--threads"),
    ],
)
def test_wrong_usage_ends_with_code_2_and_points_to_the_help(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("Try: ")
    assert hint.endswith("--help")


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from pocketlm.cli import main
try:
    main()
except SystemExit as exit:
    assert exit.code == 0
heavy = {"onnxruntime", "numpy", "tokenizers", "huggingface_hub", "jinja2", "rich", "importlib_metadata"}
print(sorted(heavy & set(sys.modules)))
"""
    result = run_python(code, "--help")
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_python_m_pocketlm_is_the_command_line() -> None:
    code = "import runpy, sys; sys.argv[0] = 'pocketlm'; runpy.run_module('pocketlm', run_name='__main__')"
    result = run_python(code, "run", "--help")
    assert result.returncode == 0
    assert "pocketlm run [OPTIONS]" in result.stdout


def test_a_reader_that_goes_away_ends_the_program_quietly() -> None:
    code = """
import sys, types, pocketlm
from helpers.fake_engine import FakeModel
from pocketlm.cli import main
pocketlm.load = FakeModel(words=["word "] * 100_000).load
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "fake", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"go on")
        process.stdin.close()
        assert process.stdout.read(10) == b"word word "
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 141
