"""`pocketlm chat`: through a pipe, and on a real pseudo-terminal with Ctrl-C."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

import pocketlm
from helpers.fake_engine import FakeModel, command_line
from pocketlm.cli import build_app, chat
from pocketlm.cli.chat import history_path, interruptible
from pocketlm.cli.line_input import HISTORY_LINES, Entry, History
from pocketlm.errors import ContextOverflowError


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(pocketlm, "load", fake.load, raising=False)
    return fake


def piped(stdin: str | bytes, *arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ["chat", "fake", *arguments], input=stdin)


# Through a pipe


def test_each_line_gets_an_answer_and_there_are_no_prompts(model: FakeModel) -> None:
    result = piped("one\n\n  \ntwo\r\nthree", "--system", "Be terse.", "--max-tokens", "9", "--seed", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "echo: one \necho: two \necho: three \n"
    assert model.chats[0].system == "Be terse."
    assert model.calls[1] == {"prompt": "one", "max_tokens": 9, "seed": 1}
    assert [message["content"] for message in model.chats[0].messages] == [
        *["Be terse.", "one", "echo: one ", "two", "echo: two ", "three", "echo: three "]
    ]
    assert model.closed


def test_json_makes_one_line_an_answer(model: FakeModel) -> None:
    model.words = ["several\n", "lines"]
    result = piped("one\ntwo\n", "--json")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == ["several\nlines"] * 2
    assert answers[0]["finish_reason"] == "stop"
    assert all(answer["energy"]["source"] for answer in answers)


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ("one\\\ntwo\\\nthree\n", "one\ntwo\nthree"),
        ('"""one\n  two\n\nthree"""\n', "one\n  two\n\nthree"),
        ('"""\none\n"""  \n', "one"),
        ('"""one line"""\n', "one line"),
        ('"""never closed\n', "never closed"),
        ("never finished\\\n", "never finished"),
        (" /quit\n", "/quit"),
        ("/etc/hosts is what?\n", "/etc/hosts is what?"),
        ('"""/quit"""\n', "/quit"),
        ("/quit\\\nnow\n", "/quit\nnow"),
        ("\ufeffgrüße\n", "grüße"),
    ],
)
def test_messages_of_several_lines_and_what_is_no_command(model: FakeModel, stdin: str, message: str) -> None:
    assert piped(stdin).exit_code == 0
    assert [call["prompt"] for call in model.calls[1:]] == [message]


def test_input_that_is_no_text_is_refused(model: FakeModel) -> None:
    result = piped(b"gr\xfc\xdfe\n")
    assert result.exit_code == 1
    assert "standard input is not UTF-8 text: the line has the byte 0xfc" in result.stderr


def test_commands_speak_on_standard_error(model: FakeModel) -> None:
    result = piped(
        "/system\n/system Be  brief.\n/system\n/stats\nhi\n/stats\n"
        "/reset\n/system -\n/system\n/help\n/quit\nnot read\n"
    )
    assert (result.exit_code, result.stdout) == (0, "echo: hi \n")
    assert [line.strip() for line in result.stderr.splitlines()] == [
        "There is no system message. /system TEXT sets one.",
        "The system message is set; it holds from the next answer on.",
        "System message: Be  brief.",
        "context   0 of 2,048 tokens used (0%)",
        "messages  1 in the conversation",
        "answers   0 since the start, 0 tokens",
        "context      14 of 2,048 tokens used (1%)",
        "messages     3 in the conversation",
        "answers      1 since the start, 2 tokens",
        "last answer  prompt 12 tokens, 2 of them cached at 100 tok/s · answer 2 tokens at 4 tok/s · "
        "drafts 3 of 8 right · first token after 0.12 s · total 0.60 s",
        "The conversation is forgotten.",
        "The system message is removed.",
        "There is no system message. /system TEXT sets one.",
        "/system  show the system message; /system TEXT sets it, /system - removes it",
        "/reset   forget the conversation; the system message stays",
        "/stats   show how full the context is and how fast the answers came",
        "/help    show this help",
        "/quit    end the chat, as Ctrl-D does",
        "\\        at the end of a line: the message goes on in the next line",
        '"""      around several lines: they are one message',
    ]
    assert model.chats[0].messages == []


def test_an_unknown_command_names_the_near_ones_and_the_chat_goes_on(model: FakeModel) -> None:
    result = piped("/rest\n/\nhi\n")
    assert (result.exit_code, result.stdout) == (0, "echo: hi \n")
    first, second = result.stderr.splitlines()
    assert first.startswith("error: there is no command /rest. Did you mean reset? /help lists them all")
    assert second.startswith("error: there is no command /. /help lists them all")


def test_an_error_ends_a_piped_chat(model: FakeModel) -> None:
    model.error = ContextOverflowError(3000, 2048)
    result = piped("one\ntwo\n")
    assert (result.exit_code, len(model.calls)) == (1, 2)
    assert result.stderr.startswith("error: the prompt has 3,000 tokens")


def test_a_full_context_points_to_reset(model: FakeModel) -> None:
    model.room, model.context_length = 2, 14
    result = piped("one two three\n", "--verbose")
    assert result.stderr.splitlines()[:2] == [
        "[cut off: the context of 14 tokens is full]",
        "/reset forgets the conversation and makes room.",
    ]
    assert result.stderr.splitlines()[2].startswith("prompt 12 tokens")


def test_ctrl_c_interrupts_a_prompt_at_once_and_an_answer_the_second_time() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.between_tokens = True
        assert not interrupts.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_prompt_that_is_interrupted_leaves_the_chat_going(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Typed:
        interactive = True
        entries: ClassVar[list[Entry]] = [Entry("one"), Entry("two"), Entry("three")]

        def read(self) -> Entry:
            if not self.entries:
                raise EOFError
            return self.entries.pop(0)

    errors: list[BaseException | None] = [KeyboardInterrupt(), ContextOverflowError(3000, 2048), None]
    stream = model.stream

    def failing(*arguments: Any, **settings: Any) -> Any:
        model.error = errors.pop(0)
        return stream(*arguments, **settings)

    monkeypatch.setattr(model, "stream", failing)
    monkeypatch.setattr(chat, "LineInput", lambda *_: Typed())
    with pytest.raises(SystemExit) as exit_:
        build_app()(["chat", "fake"])
    assert exit_.value.code == 0
    output = capsys.readouterr()
    assert output.out == "echo: three \n\n"
    assert output.err.splitlines()[2:] == [
        *["[stopped]", ""],
        "error: " + str(ContextOverflowError(3000, 2048)),
        "/reset forgets the conversation and makes room.",
    ]


# History


def test_history_is_private_and_appended_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat_history"
    one, other = History(path), History(path)
    one.append("first")
    other.append("grüße \udcfc")
    one.append("  ")
    assert path.read_text(encoding="utf-8") == "first\ngrüße ?\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert History(path).lines == ["first", "grüße ?"]
    one.append("third")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_history_keeps_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text("".join(f"{i}\n" for i in range(2 * HISTORY_LINES + 1)), encoding="utf-8")
    lines = History(path).lines
    assert (len(lines), lines[-1]) == (HISTORY_LINES, str(2 * HISTORY_LINES))
    assert path.read_text(encoding="utf-8").splitlines() == lines


def test_history_that_cannot_be_kept_is_given_up_after_one_remark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    history = History(tmp_path / "file" / "chat_history")
    history.append("one")
    assert history.lines == []
    assert capsys.readouterr().err.count("The chat's history is not kept: ") == 1
    history = History(tmp_path / "chat_history")
    (tmp_path / "chat_history").mkdir()
    history.append("one")
    history.append("two")
    assert capsys.readouterr().err.count("The chat's history is not kept: ") == 1


# On a terminal


class Terminal:
    """`pocketlm chat` on a pseudo-terminal: what a person types and sees."""

    def __init__(self, state: Path, *arguments: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*command_line(delay_s=0.05), "chat", "fake", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={
                **os.environ,
                "TERM": "dumb",
                "NO_COLOR": "1",
                "XDG_STATE_HOME": str(state),
                "HOME": str(state),
            },
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def press_until(self, key: str, text: str) -> str:
        """Press a key until `text` is shown.

        Python's readline does not notice a Ctrl-C that comes right between its prompt and its waiting for
        keys, before the next key.
        """
        for _ in range(10):
            self.type(key)
            try:
                return self.wait_for(text, seconds=2)
            except TimeoutError:
                continue
        raise TimeoutError(f"{key!r} did not bring {text!r}")

    def wait_for(self, text: str, *, seconds: float = 20) -> str:
        """What was shown since the last call, up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{text!r} did not appear in {self.seen!r}")
            try:
                data = os.read(self.master, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                data = b""
            assert data, f"the program ended without {text!r}: {self.seen!r}"
            self.seen += data.decode().replace("\r\n", "\n")
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals of this kind")
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    chatting = terminal()
    greeting = chatting.wait_for(">>> ")
    assert "fake · int8 · context 2,048 tokens\n/help lists the commands" in greeting

    chatting.type("a b c " + "d " * 200 + "end\r")
    chatting.wait_for("echo: a b ")
    chatting.type("\x03")
    stopped = chatting.wait_for("[stopped]\n\n>>> ")
    assert "end" not in stopped

    chatting.type("again\r")
    assert chatting.wait_for("echo: again \n\n>>> ")
    chatting.type("half a li")
    chatting.wait_for("half a li")
    chatting.press_until("\x03", "Ctrl-C stops an answer. To end the chat, press Ctrl-D or type /quit.\n>>> ")
    chatting.type("/stats\r")
    chatting.wait_for("messages     4 in the conversation")
    chatting.type('"""two\rlines"""\r')
    chatting.wait_for("... ")
    chatting.wait_for("echo: two\nlines \n\n>>> ")
    chatting.type("/re\t\r")
    chatting.wait_for("The conversation is forgotten.\n>>> ")

    chatting.type("\x04")
    assert chatting.process.wait(timeout=20) == 0
    history = next(tmp_path.rglob("chat_history"))
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text(encoding="utf-8").splitlines()[1:] == [
        *["again", "/stats", '"""two', 'lines"""', "/reset"]
    ]


def test_what_is_typed_during_an_answer_waits_for_the_next_prompt(terminal: Callable[..., Terminal]) -> None:
    chatting = terminal("--no-history")
    chatting.wait_for(">>> ")
    rest = " ".join("bcdefghijklmnopqrstuvwxyz")  # long enough to type into it on a machine that stalls
    chatting.type(f"a {rest}\r")
    chatting.wait_for("echo: a ")
    chatting.type("next\r\x04")
    assert chatting.wait_for("\n\n>>> ") == f"{rest} \n\n>>> "
    assert "next\necho: next \n" in chatting.wait_for("\n\n>>> ")
    assert chatting.process.wait(timeout=20) == 0


def test_history_comes_back_unless_it_is_declined(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    first = terminal()
    first.wait_for(">>> ")
    first.type("remember me\r")
    first.wait_for("echo: remember me \n\n>>> ")
    first.type("/quit\r")
    assert first.process.wait(timeout=20) == 0

    second = terminal()
    second.wait_for(">>> ")
    second.type("\x10\x10\r")  # Ctrl-P twice: the line before /quit
    second.wait_for("echo: remember me \n\n>>> ")

    declined = terminal("--no-history")
    declined.wait_for(">>> ")
    declined.type("\x10secret\r")
    declined.wait_for("echo: secret \n\n>>> ")
    assert "secret" not in next(tmp_path.rglob("chat_history")).read_text(encoding="utf-8")


def test_the_history_file_is_in_the_users_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert history_path().name == "chat_history"
    assert history_path().parent.name in {"pocketlm", "Logs"}
