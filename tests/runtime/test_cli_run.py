"""`pocketlm run` on a model without weights."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import pocketlm
from helpers.fake_engine import FakeModel, command_line
from pocketlm.cli import build_app, console
from pocketlm.cli.run import read_prompt
from pocketlm.errors import ContextOverflowError, PromptError


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(pocketlm, "load", fake.load, raising=False)
    return fake


def run(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(build_app(), ["run", "fake", *arguments], input=stdin)


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(data: bytes = b"") -> Terminal:
    return Terminal(io.BytesIO(data), encoding="utf-8")


def test_the_answer_is_all_that_standard_output_gets(model: FakeModel) -> None:
    result = run("hello world")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "echo: hello world \n", "")
    assert model.closed


def test_options_reach_the_engine_and_the_others_keep_its_defaults(model: FakeModel) -> None:
    result = run(
        *["hi", "--system", "Be terse.", "--max-tokens", "7", "--temperature", "0.5", "--top-p", "0.9"],
        *["--top-k", "40", "--min-p", "0.05", "--repetition-penalty", "1.1", "--seed", "3"],
        *[
            "--stop",
            "END",
            "--stop",
            "\n",
            "--context-length",
            "512",
            "--threads",
            "2",
            "--precision",
            "fp32",
        ],
    )
    assert (result.exit_code, result.stderr) == (0, "")
    load, stream = model.calls
    assert load.pop("progress") is not None
    assert load == {
        "name": "fake",
        "precision": "fp32",
        "context_length": 512,
        "threads": 2,
        "reproducible": False,
    }
    assert stream == {
        "prompt": "hi",
        "system": "Be terse.",
        "raw": False,
        "max_tokens": 7,
        "stop": ["END", "\n"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "seed": 3,
    }
    model.calls.clear()
    run("hi", "--raw")
    assert model.calls[1] == {"prompt": "hi", "system": None, "raw": True, "max_tokens": None}


def test_options_of_speed_reach_the_engine(model: FakeModel) -> None:
    result = run("hi", "--power", "eco", "--draft", "small", "--no-speculation", "--reproducible")
    assert (result.exit_code, result.stderr) == (0, "")
    load, stream = model.calls
    assert (load["power"], load["draft"], load["reproducible"]) == ("eco", "small", True)
    assert stream["speculate"] is False


def test_an_unknown_power_mode_is_wrong_usage(model: FakeModel) -> None:
    result = run("hi", "--power", "fats")
    assert result.exit_code == 2
    assert "'fats' is not a power mode; use eco, balanced, fast" in result.stderr
    assert model.calls == []


@pytest.mark.parametrize("option", ["json-schema", "grammar"])
def test_a_grammar_is_given_inline_or_in_a_file(model: FakeModel, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("{}", encoding="utf-8")
    for value in ("{}", f"@{tmp_path / 'file'}"):
        model.calls.clear()
        assert run("hi", f"--{option}", value).exit_code == 0
        assert model.calls[1][option.replace("-", "_")] == "{}"
    model.calls.clear()
    result = run("hi", f"--{option}", f"@{tmp_path / 'none'}")
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr
    assert model.calls == []


def test_a_regex_is_taken_as_it_is(model: FakeModel) -> None:
    assert run("hi", "--regex", "@[a-z]+").exit_code == 0
    assert model.calls[1]["regex"] == "@[a-z]+"


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["one"], "", "one"),
        ([], "two\n", "two"),
        (["-"], "two\r\n", "two"),
        (["one"], "two\nlines\n\n", "one\n\ntwo\nlines"),
        (["-", "--raw"], "two\n", "two\n"),
        ([""], "", ""),
        ([], b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe", "grüße"),
    ],
)
def test_the_prompt_is_the_argument_and_then_standard_input(
    model: FakeModel, arguments: list[str], stdin: str | bytes, prompt: str
) -> None:
    assert run(*arguments, stdin=stdin).exit_code == 0
    assert model.calls[1]["prompt"] == prompt


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_no_prompt_is_wrong_usage_before_anything_is_loaded(model: FakeModel, arguments: list[str]) -> None:
    result = run(*arguments, stdin="\n")
    assert result.exit_code == 2
    assert "there is no prompt. Give one as an argument or on standard input" in result.stderr
    assert "pocketlm chat MODEL" in result.stderr
    assert model.calls == []


def test_standard_input_that_is_no_text_is_refused(model: FakeModel) -> None:
    result = run(stdin=b"gr\xfc\xdfe")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "standard input is not UTF-8 text: byte 0xfc at position 2" in result.stderr
    with pytest.raises(PromptError, match="not valid text in this terminal's encoding"):
        read_prompt("\udcfc", raw=False)


def test_a_terminal_is_read_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", terminal(b"typed\n"))
    assert read_prompt("given", raw=False) == "given"
    assert read_prompt("-", raw=False) == "typed"
    monkeypatch.setattr(sys, "stdin", None)
    assert read_prompt("given", raw=False) == "given"


def test_json_is_one_object_and_nothing_else(model: FakeModel) -> None:
    result = run("grüße", "--json", "--max-tokens", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    energy = answer.pop("energy")
    assert energy.keys() == {
        "source", "scope", "kind", "duration_s", "energy_j", "low_j", "high_j", "flags", "reason"
    }  # fmt: skip
    assert energy["kind"] in {"measured", "estimated"}
    assert (energy["energy_j"] is None) is (energy["reason"] is not None)
    assert answer == {
        "model": "fake",
        "text": "echo: ",
        "finish_reason": "length",
        "usage": {
            "prompt_tokens": 12,
            "cached_tokens": 2,
            "completion_tokens": 1,
            "dropped_messages": 0,
            "total_tokens": 13,
        },
        "timings": {
            "load_s": 0.2,
            "queue_s": 0.02,
            "prefill_s": 0.1,
            "decode_s": 0.5,
            "ttft_s": 0.12,
            "total_s": 0.6,
            "prefill_tokens_per_s": 100.0,
            "decode_tokens_per_s": 2.0,
            "drafted_tokens": 8,
            "accepted_tokens": 3,
            "compute_s": 0.4,
        },
    }


def test_json_fits_an_output_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    console.write_json({"text": "grüße"})
    assert json.loads(output.getvalue()) == {"text": "grüße"}


@pytest.mark.parametrize(
    ("arguments", "words", "note"),
    [
        (["--max-tokens", "1"], None, "[cut off after 1 token, as --max-tokens says]\n"),
        ([], ["a", "b", "c"], "[cut off: the context of 2,048 tokens is full]\n"),
        ([], [], "[the model gave an empty answer]\n"),
    ],
)
def test_an_answer_that_did_not_end_by_itself_says_why(
    model: FakeModel, arguments: list[str], words: list[str] | None, note: str
) -> None:
    model.words = words
    model.room = 2 if words else None
    result = run("hi", *arguments)
    assert (result.exit_code, result.stderr) == (0, note)


def test_speeds_are_shown_on_request_only_and_on_standard_error(model: FakeModel) -> None:
    result = run("hi", "--verbose")
    assert result.stdout == "echo: hi \n"
    assert result.stderr == (
        "prompt 12 tokens, 2 of them cached at 100 tok/s · answer 2 tokens at 4 tok/s · "
        "drafts 3 of 8 right · first token after 0.12 s · total 0.60 s · load 0.20 s\n"
    )
    model.words = []
    assert "answer 0 tokens · drafts" in run("hi", "-v").stderr


def test_sampling_options_without_a_temperature_are_pointed_out(model: FakeModel) -> None:
    result = run("hi", "--top-p", "0.9", "--min-p", "0.1", "--temperature", "0")
    assert result.exit_code == 0
    assert "--top-p, --min-p: no effect at temperature 0" in result.stderr


def test_an_error_of_the_engine_is_one_line(model: FakeModel) -> None:
    model.error = ContextOverflowError(3000, 2048)
    result = run("hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the prompt has 3,000 tokens, but the context holds 2,048")
    assert model.closed


def test_pieces_come_at_once_and_lose_what_controls_a_terminal(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", terminal())
    monkeypatch.setattr(sys.stdout, "write", written.append)
    monkeypatch.setattr(sys.stdout, "flush", lambda: written.append("|"))
    for piece in ("red \x1b[31m", "tab\t\x07\x9b", "ü\n"):
        console.write(piece)
    assert written == ["red [31m", "|", "tab\t", "|", "ü\n", "|"]


def test_ctrl_c_ends_the_answer_with_130_and_a_whole_line() -> None:
    with subprocess.Popen(
        [*command_line(delay_s=0.1), "run", "fake", " ".join("abcdefghijklmnopqrstuvwxyz" * 4)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode == 130
    assert first == b"echo: a "
    assert rest.endswith(b"\n")
    assert b"z" not in rest
