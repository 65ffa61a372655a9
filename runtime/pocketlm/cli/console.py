"""Everything that the command line writes goes through here.

Answers and data go to standard output, everything else (notes, errors, progress) to standard error.
Colour and movement need a terminal; NO_COLOR is honoured by rich. rich is imported when something is
shown, not at start-up.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

from pocketlm.files import readable_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID

    from pocketlm.progress import Progress

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

SHOWN_AFTER_S = 0.3
"""A task that takes less shows no bar: it would only flicker."""

FIRST_LINE_AFTER_S = 2.0
LINE_EVERY_S = 10.0
"""Where standard error is no terminal, a task writes its first line and the next ones after this time."""

# A model's text must not move the cursor, ring the bell or retitle the window: no C0 controls except tab
# and newline, no DEL, no C1 controls.
_UNPRINTABLE = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A})


def out() -> Console:
    """The console of standard output as it is now."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=_width(sys.stdout))


def err() -> Console:
    """The console of standard error as it is now."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, width=_width(sys.stderr))


def _width(stream: IO[str]) -> int | None:
    """The terminal's own width; where nobody looks at a screen, tables are as wide as they need to be."""
    return None if stream.isatty() else 1000


def error(message: str) -> None:
    """`error: message` as one line on standard error."""
    from rich.text import Text

    text = Text(_wrap("error: " + " ".join(message.splitlines())))
    text.stylize("bold red", 0, len("error:"))
    err().print(text, soft_wrap=True)


def note(message: str) -> None:
    """A dim remark on standard error."""
    err().print(_wrap(message), style="dim", soft_wrap=True)


def _wrap(message: str, indent: int = 0) -> str:
    """`message` in lines of whole words on a terminal; a long path stays in one piece, to be copied.
    Lines after the first begin with `indent` blanks."""
    message = printable(message)
    if not sys.stderr.isatty():
        return message
    width = err().width
    return "\n".join(
        textwrap.fill(
            line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
        for line in message.splitlines()
    )


def note_rows(rows: Mapping[str, str], *, dim: Literal["names", "texts"] = "texts") -> None:
    """Names and what there is to say of them, in two columns on standard error; one of them is dim."""
    from rich.text import Text

    console = err()
    indent = max(map(len, rows), default=0) + 2
    for name, said in rows.items():
        text = Text(_wrap(f"{name:<{indent}}{said}".rstrip(), indent))
        text.stylize("dim", *((0, indent) if dim == "names" else (indent,)))
        console.print(text, soft_wrap=True)


def show_cursor() -> None:
    """Bring back the cursor, which a progress bar of a thread that has not ended may have hidden."""
    err().show_cursor()


def end_line() -> None:
    """Move to a fresh line on a terminal, where `^C` or half an answer may stand."""
    if sys.stderr.isatty():
        sys.stderr.write("\n")


def write(text: str) -> None:
    """Send text to standard output at once; on a terminal without control characters."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Any, *, indent: int | None = 2) -> None:
    """One JSON value on standard output."""
    # Characters that the stream cannot hold would turn into question marks: escape them there.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    write(json.dumps(value, indent=indent, ensure_ascii=not utf8, allow_nan=False) + "\n")


def printable(text: str) -> str:
    """`text` without the characters that control a terminal."""
    return text.translate(_UNPRINTABLE)


def count(number: int, noun: str) -> str:
    """`1 token`, `2,048 tokens`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@contextmanager
def progress() -> Iterator[Progress]:
    """A Progress that draws bars on a terminal and writes a line now and then elsewhere."""
    console = err()
    if not console.is_terminal:
        lines = _Lines()
        yield lines
        lines.stop()
        return
    bars = _TerminalBars(console)
    try:
        yield bars
        bars.end_task()
    finally:
        bars.stop()


def _amount(done: int, total: int, unit: str) -> str:
    """`45.2 MB of 98.4 MB`, `12 of 30 layers`, `512 tokens`."""
    if unit == "B":
        return readable_size(done) + (f" of {readable_size(total)}" if total else "")
    return f"{done:,}" + (f" of {total:,}" if total else "") + f" {unit}"


@dataclass
class _Lines:
    """Progress as plain lines, few of them: for logs."""

    task: str | None = None
    done: int = 0
    unit: str = ""
    started_s: float = 0.0
    next_line_s: float = 0.0

    def __call__(self, task: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if task != self.task:
            self.stop()
            self.task, self.started_s, self.next_line_s = task, now, now + FIRST_LINE_AFTER_S
        self.done, self.unit = done, unit
        if total and done >= total:
            self.stop()
        elif now >= self.next_line_s:
            self.next_line_s = now + LINE_EVERY_S
            share = f" ({done / total:.0%})" if total else ""
            note(f"{task}: {_amount(done, total, unit)}{share}")

    def stop(self) -> None:
        """End the current task, if there is one."""
        elapsed = time.monotonic() - self.started_s
        if self.task is not None and elapsed >= FIRST_LINE_AFTER_S:
            note(f"{self.task}: {_amount(self.done, 0, self.unit)} in {elapsed:.0f} s")
        self.task = None


class _TerminalBars:
    """Progress as bars: one a task, which stays when the task is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None  # made at the first call: many commands have nothing to wait for
        self._label: str | None = None
        self._task: TaskID | None = None
        self._done = 0

    def __call__(self, task: str, done: int, total: int, unit: str) -> None:
        if self._bars is None:
            self._bars = _make_bars(self._console)
            self._bars.start()
        if self._task is None or task != self._label:
            self.end_task()
            self._label, self._task = task, self._bars.add_task(printable(task), total=None, unit=unit)
        self._bars.update(self._task, completed=done, total=total or None)
        self._done = done
        if total and done >= total:
            self._task = None

    def end_task(self) -> None:
        """End the current task, if there is one: of an unknown size, it has got as far as it had to."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=self._done)
        self._task = None

    def stop(self) -> None:
        """Leave the bars as they are."""
        if self._bars is not None:
            # With no bar worth showing, leave no empty line either.
            self._bars.live.transient = not any(map(_is_shown, self._bars.tasks))
            self._bars.stop()


def _is_shown(task: Any) -> bool:
    elapsed = task.finished_time if task.finished else task.elapsed
    return (elapsed or 0.0) >= SHOWN_AFTER_S


def _make_bars(console: Console) -> Bars:
    from rich.console import RenderableType
    from rich.progress import BarColumn, Progress, TextColumn

    class ShownBars(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(filter(_is_shown, self.tasks))

    return ShownBars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _state_column(),
        console=console,
        # rich would send what is printed meanwhile to this console, which is standard error.
        redirect_stdout=False,
    )


def _state_column() -> ProgressColumn:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class State(ProgressColumn):
        """`45.2 MB of 98.4 MB, 8 s left` and in the end `98.4 MB in 17 s`."""

        def render(self, task: Task) -> Text:
            total = 0 if task.finished else int(task.total or 0)
            text = _amount(int(task.completed), total, task.fields["unit"])
            if task.finished:
                text += f" in {task.finished_time or 0:.1f} s"
            elif task.time_remaining is not None:
                text += f", {task.time_remaining:.0f} s left"
            return Text(text, no_wrap=True)

    return State()
