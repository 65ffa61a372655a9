"""A model for tests of what sits on top of the engine: it follows the engine's interface, without weights.

It answers `echo: ` and the words of the prompt, one word a token, each after `delay_s`. As a script it
runs the command line with this model (see `command_line`), on a terminal of its own if standard input is one.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path[:] = sys.argv.pop(2).split(os.pathsep)

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pocketlm.generate import Completion, Piece, Timings, Usage


class FakeStream:
    """An iterator of pieces; closed early, its completion is cancelled."""

    def __init__(self, words: Sequence[str], *, limit: int | None, delay_s: float, chat: Any = None) -> None:
        self._words = words if limit is None else words[:limit]
        self._cut = limit is not None and len(words) > limit
        self._delay_s = delay_s
        self._chat = chat
        self._said: list[str] = []
        self._pieces = self._generate()
        self._finished = False

    def _generate(self) -> Iterator[Piece]:
        for i, word in enumerate(self._words):
            time.sleep(self._delay_s)
            self._said.append(word)
            yield Piece(word, i)
        self._finished = True
        self.close()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        if self._chat is not None:
            self._chat.messages.append({"role": "assistant", "content": self.completion.text})
            self._chat = None

    @property
    def completion(self) -> Completion:
        n = len(self._said)
        reason: Any = "cancelled" if not self._finished else "length" if self._cut else "stop"
        return Completion(
            text="".join(self._said),
            token_ids=tuple(range(n)),
            finish_reason=reason,
            usage=Usage(prompt_tokens=12, cached_tokens=2, completion_tokens=n),
            timings=Timings(0.02, 0.1, 0.5, 0.12, 0.6, 100.0, None if n == 0 else n / 0.5, 8, 3, 0.4),
        )


@dataclass
class FakeChat:
    """Keeps messages; the streams come from its model."""

    model: FakeModel
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def stream(self, text: str, **settings: Any) -> FakeStream:
        stream = self.model.stream(text, **settings)
        self.messages.append({"role": "user", "content": text})
        stream._chat = self
        return stream

    def reset(self) -> None:
        self.messages[:] = self.messages[: self.system is not None]


@dataclass
class FakeModel:
    """`calls` holds what `load` and each `stream` were given. `error` is raised instead of an answer;
    `words` are the answer instead of the echo; the context is full after `room` of them."""

    name: str = "fake"
    delay_s: float = 0.0
    context_length: int = 2048
    load_s: float = 0.2
    error: BaseException | None = None
    words: Sequence[str] | None = None
    room: int | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    chats: list[FakeChat] = field(default_factory=list)
    closed: bool = False
    manifest: Any = field(default_factory=lambda: SimpleNamespace(precision=SimpleNamespace(name="int8")))

    def load(self, name: str, **options: Any) -> FakeModel:
        """Stands in for `pocketlm.load`."""
        self.calls.append({"name": name, **options})
        return self

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def stream(self, prompt: str, *, max_tokens: int | None = None, **settings: Any) -> FakeStream:
        self.calls.append({"prompt": prompt, "max_tokens": max_tokens, **settings})
        if self.error is not None:
            raise self.error
        words = (
            self.words if self.words is not None else [f"{word} " for word in f"echo: {prompt}".split(" ")]
        )
        limit = min((n for n in (max_tokens, self.room) if n is not None), default=None)
        return FakeStream(words, limit=limit, delay_s=self.delay_s)

    def chat(self, *, system: str | None = None) -> FakeChat:
        chat = FakeChat(self)
        chat.system = system
        self.chats.append(chat)
        return chat


def command_line(*, delay_s: float) -> list[str]:
    """The start of a command that is `pocketlm` with this model, whatever it asks for."""
    return [sys.executable, __file__, str(delay_s), os.pathsep.join(sys.path)]


if __name__ == "__main__":
    if sys.stdin.isatty():
        # The leader of a session without a terminal gets the one it opens: Ctrl-C reaches it then.
        os.close(os.open(os.ttyname(0), os.O_RDWR))
    import pocketlm
    from pocketlm.cli import main

    pocketlm.load = FakeModel(delay_s=float(sys.argv.pop(1))).load
    main()
