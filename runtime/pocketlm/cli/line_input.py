"""What a person types (or a pipe sends) into a chat: lines, blocks of lines, and their history."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pocketlm.cli import console
from pocketlm.errors import PromptError

PROMPT = ">>> "
CONTINUATION = "... "
QUOTES = '"""'
HISTORY_LINES = 1000


@dataclass(frozen=True)
class Entry:
    """One message. Of several lines, it is never a slash command."""

    text: str
    several_lines: bool = False


class LineInput:
    """Entries from standard input, with editing and history where it is a terminal.

    A line that ends with a backslash goes on in the next one; `\"\"\"` opens a block that ends with a line
    that ends with `\"\"\"`.
    """

    def __init__(self, history: Path | None, completions: Sequence[str] = ()) -> None:
        self.interactive = sys.stdin.isatty()
        self._edited = self.interactive and sys.stdout.isatty()
        self._history = History(history) if history is not None and self._edited else None
        if self._edited and (readline := _optional("readline")) is not None:
            _set_up(readline, completions)
            if self._history is not None:
                for line in self._history.lines:
                    readline.add_history(line)

    def read(self) -> Entry:
        """The next entry. Raises EOFError at the end and, on a terminal, KeyboardInterrupt at Ctrl-C."""
        line = self._line(PROMPT)
        if line.lstrip().startswith(QUOTES):
            return Entry(self._block(line.lstrip().removeprefix(QUOTES)), several_lines=True)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            try:
                lines.append(self._line(CONTINUATION))
            except EOFError:
                break
        return Entry("\n".join(lines), several_lines=len(lines) > 1)

    def _block(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(self._line(CONTINUATION))
            except EOFError:
                # What was sent without the closing quotes is still a message.
                return "\n".join(lines).strip("\n")
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        if not self._edited:
            return self._plain_line(prompt)
        line = input(prompt)
        if self._history is not None:
            self._history.append(line)
        # Bytes that are no UTF-8 arrive as surrogates, which no tokenizer takes.
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def _plain_line(self, prompt: str) -> str:
        if self.interactive:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        try:
            return data.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(
                f"standard input is not UTF-8 text: the line has the byte 0x{data[error.start]:02x}. "
                "Convert it first, for example with: iconv -f latin1 -t utf-8"
            ) from None


class History:
    """Lines typed earlier, in a file that only its owner may read.

    Each line is appended as it comes, so that nothing is lost when the terminal is closed and two chats
    at once do not overwrite each other. A file that cannot be used is given up after one remark.
    """

    def __init__(self, path: Path) -> None:
        self._path: Path | None = path
        self.lines: list[str] = []
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.exists():
                stored = path.read_text(encoding="utf-8", errors="replace").splitlines()
                self.lines = stored[-HISTORY_LINES:]
                if len(stored) > 2 * HISTORY_LINES:
                    self._write(self.lines, os.O_TRUNC)
        except OSError as error:
            self._give_up(error)

    def append(self, line: str) -> None:
        if line.strip() and self._path is not None:
            try:
                self._write([line], os.O_APPEND)
            except OSError as error:
                self._give_up(error)

    def _write(self, lines: Sequence[str], flag: int) -> None:
        if self._path is not None:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | flag, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                self._path.chmod(0o600)  # the file may be older than this rule
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))

    def _give_up(self, error: OSError) -> None:
        console.note(f"The chat's history is not kept: {error}.")
        self._path = None


@contextmanager
def typing_ahead() -> Iterator[None]:
    """Within, what is typed on the terminal does not show up: it waits for the next prompt, Ctrl-D too.

    Ctrl-C still interrupts. Nothing changes where there is no terminal, or on Windows.
    """
    termios = _optional("termios")
    if termios is None or not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    during = before.copy()
    during[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _optional(name: str) -> ModuleType | None:
    """A module of the standard library that Windows lacks (its console edits lines itself)."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _set_up(readline: ModuleType, completions: Sequence[str]) -> None:
    """Tab completes slash commands (readline's default would be file names)."""

    def complete(text: str, state: int) -> str | None:
        matches = [name for name in completions if text.startswith("/") and name.startswith(text)]
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
