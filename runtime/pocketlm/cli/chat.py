"""`pocketlm chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketlm.cli import console, options
from pocketlm.cli.line_input import LineInput, typing_ahead
from pocketlm.cli.run import as_object, begin_energy, load, note_cut, summary
from pocketlm.errors import ContextOverflowError, PocketlmError, did_you_mean

if TYPE_CHECKING:
    from pocketlm import Chat, Completion, Model, Settings

COMMANDS = {
    "/system": "show the system message; /system TEXT sets it, /system - removes it",
    "/reset": "forget the conversation; the system message stays",
    "/stats": "show how full the context is and how fast the answers came",
    "/help": "show this help",
    "/quit": "end the chat, as Ctrl-D does",
}


def chat(
    model: options.Model,
    *,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as one line of JSON, as `run --json` has it.")
    ] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Neither read nor write the file of lines typed earlier.")
    ] = False,
    verbose: options.Verbose = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    precision: options.PrecisionName = None,
    context_length: options.ContextLength = None,
    threads: options.Threads = None,
    power: options.Power = None,
    draft: options.DraftModel = None,
    no_speculation: options.NoSpeculation = False,
    reproducible: options.Reproducible = False,
) -> None:
    """Talk with a model.

    Where standard input is no terminal, each of its lines gets an answer and nothing else is printed.
    """
    settings = options.settings(
        max_tokens=max_tokens,
        stop=stop,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        speculate=False if no_speculation else None,
    )

    with load(
        model,
        precision=precision,
        context_length=context_length,
        threads=threads,
        power=power,
        draft=draft,
        reproducible=reproducible,
    ) as loaded:
        lines = LineInput(None if no_history else history_path(), tuple(COMMANDS))
        Conversation(
            model=loaded,
            chat=loaded.chat(system=system),
            interactive=lines.interactive,
            settings=settings,
            as_json=as_json,
            verbose=verbose,
        ).run(lines)


def history_path() -> Path:
    """Where the lines typed in chats are kept."""
    import platformdirs

    return platformdirs.user_state_path("pocketlm", appauthor=False) / "chat_history"


@dataclass
class Conversation:
    """The loop of reading a message and printing its answer."""

    model: Model
    chat: Chat
    interactive: bool
    settings: Settings
    as_json: bool = False
    verbose: bool = False
    last: Completion | None = None
    answers: int = 0
    answer_tokens: int = 0

    def run(self, lines: LineInput) -> None:
        """Go on until the end of the input or `/quit`."""
        if self.interactive:
            self._greet()
        while True:
            try:
                entry = lines.read()
                text = entry.text if entry.several_lines else entry.text.strip()
                # A space in front makes a text of what looks like a command.
                if not entry.several_lines and re.fullmatch(r"/\w*|/\w+\s.*", entry.text.rstrip()):
                    if not self._command(text):
                        return
                elif text.strip():
                    self._answer(text)
            except EOFError:
                console.end_line()
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                console.end_line()
                console.note("Ctrl-C stops an answer. To end the chat, press Ctrl-D or type /quit.")

    def _greet(self) -> None:
        console.note(
            f"{self.model.name} · {self.model.manifest.precision.name} · "
            f"context {self.model.context_length:,} tokens"
        )
        console.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat.")

    # Answers

    def _answer(self, text: str) -> None:
        if not self.interactive:
            self._finish(self._print(text, Interrupts()))
            return
        try:
            with typing_ahead(), interruptible() as interrupts:
                completion = self._print(text, interrupts)
        except KeyboardInterrupt:
            console.note("[stopped]\n")
        except PocketlmError as error:
            console.error(str(error))
            if isinstance(error, ContextOverflowError):
                console.note("/reset forgets the conversation and makes room.")
        else:
            self._finish(completion)

    def _print(self, text: str, interrupts: Interrupts) -> Completion:
        """Stream the answer to `text`; closing the stream keeps what there is of it in the conversation."""
        last = ""
        window = begin_energy() if self.as_json else None
        try:
            with closing(self.chat.stream(text, **self.settings)) as stream:
                for piece in stream:
                    interrupts.between_tokens = True
                    if not self.as_json:
                        console.write(piece.text)
                        last = piece.text or last
                    if interrupts.asked:
                        break
        finally:
            if last and not last.endswith("\n"):
                console.write("\n")
        if window is not None:
            console.write_json(as_object(self.model, stream.completion, window.end()), indent=None)
        elif not last:
            console.write("\n")  # an empty answer is a line too
        return stream.completion

    def _finish(self, completion: Completion) -> None:
        self.last = completion
        self.answers += 1
        self.answer_tokens += completion.usage.completion_tokens
        if completion.finish_reason == "cancelled":
            console.note("[stopped]")
        elif not self.as_json:
            note_cut(self.model, completion, self.settings.get("max_tokens"))
            if completion.finish_reason == "length" and self._context_used() >= self.model.context_length:
                console.note("/reset forgets the conversation and makes room.")
        if self.verbose:
            console.note(summary(completion))
        if self.interactive and not self.as_json:
            console.write("\n")

    def _context_used(self) -> int:
        return self.last.usage.total_tokens if self.last else 0

    # Commands

    def _command(self, line: str) -> bool:
        """Obey a slash command; False ends the chat."""
        name, _, rest = line.partition(" ")
        if name in {"/quit", "/exit", "/bye"}:
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/reset": self._reset,
            "/stats": self._stats,
            "/help": self._help,
            "/?": self._help,
        }
        if name in actions:
            actions[name](rest.strip())
        else:
            console.error(
                f"there is no command {name}.{_near(name)} /help lists them all; "
                "a space in front sends the line as a message."
            )
        return True

    def _system(self, text: str) -> None:
        if text == "-":
            self.chat.system = None
            console.note("The system message is removed.")
        elif text:
            self.chat.system = text
            console.note("The system message is set; it holds from the next answer on.")
        elif self.chat.system is None:
            console.note("There is no system message. /system TEXT sets one.")
        else:
            console.note(f"System message: {self.chat.system}")

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self.last = None
        console.note("The conversation is forgotten.")

    def _stats(self, _: str) -> None:
        used, length = self._context_used(), self.model.context_length
        rows = {
            "context": f"{used:,} of {length:,} tokens used ({used / length:.0%})",
            "messages": f"{len(self.chat.messages):,} in the conversation",
            "answers": f"{self.answers:,} since the start, {console.count(self.answer_tokens, 'token')}",
        }
        if self.last is not None:
            rows["last answer"] = summary(self.last)
        console.note_rows(rows)

    def _help(self, _: str) -> None:
        console.note_rows(
            COMMANDS
            | {
                "\\": "at the end of a line: the message goes on in the next line",
                '"""': "around several lines: they are one message",
            }
        )


def _near(name: str) -> str:
    # Without the slash, which would make every command look alike.
    return did_you_mean(name.removeprefix("/"), [known.removeprefix("/") for known in COMMANDS])


@dataclass
class Interrupts:
    """What Ctrl-C does to an answer."""

    between_tokens: bool = False  # whether the answer is read token by token, and `asked` after each
    asked: bool = False

    def handle(self, _signal: int, _frame: object) -> None:
        # A prompt being read is broken off at once, an answer in good order behind its current token:
        # unless that takes too long for whoever presses the keys again.
        if self.asked or not self.between_tokens:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Within, Ctrl-C goes to the yielded Interrupts."""
    interrupts = Interrupts()
    previous = signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
