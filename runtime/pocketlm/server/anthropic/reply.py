"""An answer as Anthropic's message, whole or as the events that it grows by."""

from __future__ import annotations

import json
import uuid
from typing import Any

from pocketlm.generate import Completion, Piece, Usage
from pocketlm.server.answers import Result
from pocketlm.server.openai.tools import new_call_id
from pocketlm.server.openai.usage import finish_reason
from pocketlm.tools import ToolCall

Event = dict[str, Any]


class Reply:
    """A message. Its events: those of `begin`, of `add` for each piece, and of `end`."""

    def __init__(self, model: str, max_tokens: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._id = f"msg_{uuid.uuid4().hex}"
        self._content: list[dict[str, Any]] = []
        self._texts: list[str] | None = None  # of the text block under way

    def message(self, result: Result) -> dict[str, Any]:
        """The whole message. Raises ApiError if the server broke the answer off."""
        completion = result.completions[0]
        for piece in completion.pieces:
            self.add(piece)
        self._close()
        return {
            **self._head(),
            "content": self._content,
            **_stop(completion, self._max_tokens),
            "usage": _usage(completion.usage, result),
        }

    def begin(self, usage: Usage) -> list[Event]:
        message = {**self._head(), "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}
        return [{"type": "message_start", "message": message}]

    def add(self, piece: Piece) -> list[Event]:
        events = []
        if piece.text:
            if self._texts is None:
                events += self._open({"type": "text", "text": ""})
                self._texts = []
            self._texts.append(piece.text)
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.tool_calls:
            events += self._end_text() + self._call(call)
        return events

    def end(self, result: Result) -> list[Event]:
        """Raises ApiError if the server broke the answer off."""
        completion = result.completions[0]
        stop = _stop(completion, self._max_tokens)
        return [
            *self._close(),
            {"type": "message_delta", "delta": stop, "usage": _usage(completion.usage, result)},
            {"type": "message_stop"},
        ]

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": []}

    def _open(self, block: dict[str, Any]) -> list[Event]:
        self._content.append(block)
        return [{"type": "content_block_start", "index": self._index, "content_block": dict(block)}]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stopped(self) -> Event:
        return {"type": "content_block_stop", "index": self._index}

    @property
    def _index(self) -> int:
        return len(self._content) - 1

    def _call(self, call: ToolCall) -> list[Event]:
        block = {"type": "tool_use", "id": new_call_id(), "name": call.name, "input": {}}
        events = self._open(block)
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        block["input"] = call.arguments
        return [
            *events,
            self._delta({"type": "input_json_delta", "partial_json": arguments}),
            self._stopped(),
        ]

    def _end_text(self) -> list[Event]:
        if self._texts is None:
            return []
        self._content[-1]["text"] = "".join(self._texts)
        self._texts = None
        return [self._stopped()]

    def _close(self) -> list[Event]:
        """An empty answer has an empty text: clients look at the first block."""
        if not self._content:
            return [*self._open({"type": "text", "text": ""}), self._stopped()]
        return self._end_text()


def _stop(completion: Completion, max_tokens: int) -> dict[str, Any]:
    return {"stop_reason": _stop_reason(completion, max_tokens), "stop_sequence": completion.stop}


def _stop_reason(completion: Completion, max_tokens: int) -> str:
    reason = finish_reason(completion)
    if completion.stop is not None:
        return "stop_sequence"
    if completion.finish_reason == "length" and completion.usage.completion_tokens < max_tokens:
        return "model_context_window_exceeded"
    return {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}[reason]


def _usage(usage: Usage, result: Result | None = None) -> dict[str, Any]:
    """As Anthropic counts: cached tokens are not among `input_tokens`."""
    counted: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if result is not None:
        counted["energy"] = result.reading.as_object()
    return counted
