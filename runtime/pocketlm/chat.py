"""A conversation that remembers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Unpack

from pocketlm.generate import Completion, Stream
from pocketlm.settings import Settings
from pocketlm.tokenizer import Message, ToolMessage

if TYPE_CHECKING:
    from pocketlm.engine import Model


class Chat:
    """A conversation: each turn computes only what is new. Not for several threads at once, except that an
    answer's stream may be closed from any."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        # Weakly: a stream that is dropped ends at once, and its own reference to the chat makes no cycle.
        self._under_way: Callable[[], Stream | None] = lambda: None
        self.messages: list[Message] = []
        """What was said so far, the system message first if there is one."""
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message, or None. Setting it holds from the next answer on."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, Message(role="system", content=text))

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._end_answer()
        self.messages[:] = self.messages[: self.system is not None]

    def fork(self) -> Chat:
        """A conversation of its own that begins as this one has gone so far. Nothing is computed again."""
        fork = Chat(self._model)
        fork.messages = [message.copy() for message in self.messages]
        return fork

    def send(self, text: str, **settings: Unpack[Settings]) -> Completion:
        """The whole answer to the user's next message."""
        return self.stream(text, **settings).finish()

    def stream(self, text: str, **settings: Unpack[Settings]) -> Stream:
        """The answer to the user's next message, piece by piece.

        An answer that is stopped early counts as said, as far as it was read; where nothing was, the message
        is taken back too. An answer still under way from before is stopped first. Raises as `Model.stream`;
        the conversation is then as it was.
        """
        self._end_answer()
        message = Message(role="user", content=text)
        stream = self._model._answer(
            [*self.messages, message],
            settings,
            settle=True,
            on_end=lambda stream: self._answered(stream, message),
        )
        self._under_way = weakref.ref(stream)
        self.messages.append(message)
        return stream

    def _end_answer(self) -> None:
        stream = self._under_way()
        if stream is not None:
            stream.close()

    def _answered(self, stream: Stream, message: Message) -> None:
        if not self.messages or self.messages[-1] is not message:  # it was refused, or is forgotten
            return
        completion = stream.completion
        if not completion.token_ids:
            del self.messages[-1]
        elif not completion.tool_calls:
            self.messages.append(Message(role="assistant", content=completion.text))
        else:
            # Mistral's templates want ids of nine letters or digits.
            first = 1000 * len(self.messages)
            calls = [call.as_dict(f"{id_:09}") for id_, call in enumerate(completion.tool_calls, first)]
            self.messages.append(ToolMessage(role="assistant", content=completion.text, tool_calls=calls))
