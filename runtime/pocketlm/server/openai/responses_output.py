"""An answer as a response object, whole or as the events that it grows by."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from pocketlm.generate import Completion, Piece
from pocketlm.sampling import Sampling
from pocketlm.server import reports
from pocketlm.server.answers import Answers, Result
from pocketlm.server.errors import ApiError
from pocketlm.server.fields import given
from pocketlm.server.openai.logprobs import chat_logprobs
from pocketlm.server.openai.response_format import JsonObject, Text
from pocketlm.server.openai.responses_input import FunctionTool, JsonSchema, ResponsesRequest
from pocketlm.server.openai.tools import new_call_id
from pocketlm.server.openai.usage import finish_reason
from pocketlm.tools import ToolCall

Event = dict[str, Any]

_SAMPLING = Sampling()


class Output:
    """A response. Its events: those of `begin`, of `add` for each piece, and of `end` or `fail`."""

    def __init__(self, request: ResponsesRequest, answers: Answers) -> None:
        self._request = request
        self._model = answers.model.model
        self._events = 0
        self._items: list[dict[str, Any]] = []
        self._texts: list[str] | None = None  # of the message under way
        self._logprobs: list[dict[str, Any]] = []  # of that message
        self._unseen: list[dict[str, Any]] = []  # of tokens whose text is still held back
        self._fields = _fields(request, answers.model_name, answers.created)

    def response(self, result: Result) -> dict[str, Any]:
        """The whole response. Raises ApiError if the server broke the answer off."""
        for piece in result.completions[0].pieces:
            self.add(piece)
        final: dict[str, Any] = self.end(result)[-1]["response"]
        return final

    def begin(self) -> list[Event]:
        return [
            self._event(f"response.{name}", response=self._object("in_progress"))
            for name in ("created", "in_progress")
        ]

    def add(self, piece: Piece) -> list[Event]:
        events: list[Event] = []
        # The end of a text is none of its tokens.
        if self._request.logprobs and piece.token_id not in self._model.manifest.tokens.eos:
            self._unseen += chat_logprobs(self._model.tokenizer, [piece])["content"]
        if piece.text:
            if self._texts is None:
                events += self._begin_message()
                self._texts = []
            self._texts.append(piece.text)
            logprobs, self._unseen = self._unseen, []
            self._logprobs += logprobs
            events.append(self._part_event("output_text.delta", delta=piece.text, logprobs=logprobs))
        for call in piece.tool_calls:
            self._unseen = []
            events += self._end_message("completed") + self._call(call)
        return events

    def end(self, result: Result) -> list[Event]:
        """Raises ApiError if the server broke the answer off."""
        completion = result.completions[0]
        status, details = _ending(completion)
        events: list[Event] = []
        if not self._items:  # an empty answer is a message too
            events, self._texts = self._begin_message(), []
        events += self._end_message(status)
        response = self._object(
            status,
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details=details,
            usage=_usage(result),
        )
        return [*events, self._event(f"response.{status}", response=response)]

    def fail(self, error: ApiError) -> list[Event]:
        events = self._end_message("incomplete")
        told = {"code": "server_error", "message": error.message}
        return [*events, self._event("response.failed", response=self._object("failed", error=told))]

    def _object(self, status: str, **changes: Any) -> dict[str, Any]:
        return {**self._fields, "status": status, "output": list(self._items), **changes}

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._events = self._events, self._events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _item_event(self, kind: str, **fields: Any) -> Event:
        """One about the last item."""
        return self._event(f"response.{kind}", output_index=len(self._items) - 1, **fields)

    def _part_event(self, kind: str, **fields: Any) -> Event:
        """One about the text of the last item."""
        return self._item_event(kind, item_id=self._items[-1]["id"], content_index=0, **fields)

    def _begin_message(self) -> list[Event]:
        head = {"id": _new_id("msg"), "type": "message", "role": "assistant"}
        item = {**head, "status": "in_progress", "content": []}
        self._items.append(item)
        return [
            self._item_event("output_item.added", item=item),
            self._part_event("content_part.added", part=_part("", [])),
        ]

    def _end_message(self, status: str) -> list[Event]:
        if self._texts is None:
            return []
        text, logprobs = "".join(self._texts), self._logprobs
        part = _part(text, logprobs)
        self._texts, self._logprobs = None, []
        item = self._items[-1] = {**self._items[-1], "status": status, "content": [part]}
        return [
            self._part_event("output_text.done", text=text, logprobs=logprobs),
            self._part_event("content_part.done", part=part),
            self._item_event("output_item.done", item=item),
        ]

    def _call(self, call: ToolCall) -> list[Event]:
        """A call, which comes in one piece: it is whole before anything of it is told."""
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        head = {"id": _new_id("fc"), "type": "function_call", "call_id": new_call_id(), "name": call.name}
        begun = {**head, "status": "in_progress", "arguments": ""}
        item = {**head, "status": "completed", "arguments": arguments}
        self._items.append(item)
        named = {"item_id": head["id"]}
        return [
            self._item_event("output_item.added", item=begun),
            self._item_event("function_call_arguments.delta", **named, delta=arguments),
            self._item_event("function_call_arguments.done", **named, name=call.name, arguments=arguments),
            self._item_event("output_item.done", item=item),
        ]


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _fields(request: ResponsesRequest, model: str, created: int) -> dict[str, Any]:
    """What is known before the answer: mostly what was asked, defaults filled in."""
    choice = request.tool_choice or "auto"
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "temperature": _SAMPLING.temperature if request.temperature is None else request.temperature,
        "top_p": _SAMPLING.top_p if request.top_p is None else request.top_p,
        "top_logprobs": request.top_logprobs or 0,
        "text": {"format": _format(None if request.text is None else request.text.format)},
        "tools": [_tool(tool) for tool in request.tools or ()],
        "tool_choice": choice if isinstance(choice, str) else {"type": choice.type, "name": choice.name},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "truncation": request.truncation or "disabled",
        "metadata": request.metadata or {},
        "prompt_cache_key": request.prompt_cache_key,
        "safety_identifier": request.safety_identifier,
        "user": request.user,
        "reasoning": None,
        "service_tier": "default",
        "store": False,
        "background": False,
        "previous_response_id": None,
        "max_tool_calls": None,
    }


def _tool(tool: FunctionTool) -> dict[str, Any]:
    head = {"type": "function", "name": tool.name, "parameters": tool.parameters, "strict": True}
    return {**head, **given(description=tool.description, strict=tool.strict)}


def _format(chosen: Text | JsonObject | JsonSchema | None) -> dict[str, Any]:
    match chosen:
        case JsonSchema():
            head = {"type": "json_schema", "name": chosen.name, "schema": chosen.schema_, "strict": True}
            return {**head, **given(description=chosen.description, strict=chosen.strict)}
        case JsonObject():
            return {"type": "json_object", **given(schema=chosen.schema_)}
    return {"type": "text"}


def _ending(completion: Completion) -> tuple[str, dict[str, Any] | None]:
    """The status, and why the answer is not whole."""
    if finish_reason(completion) == "length":
        return "incomplete", {"reason": "max_output_tokens"}
    return "completed", None


def _usage(result: Result) -> dict[str, Any]:
    prompt = reports.prompt_tokens(result.completions)
    completion = reports.completion_tokens(result.completions)
    cached = reports.cached_tokens(result.completions)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
        "dropped_messages": result.completions[0].usage.dropped_messages,
        "energy": result.reading.as_object(),
    }
