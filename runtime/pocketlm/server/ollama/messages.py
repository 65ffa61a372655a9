"""A conversation as Ollama has it → messages as the chat template takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from pocketlm.server.errors import ApiError
from pocketlm.server.fields import Fields
from pocketlm.server.ollama.fields import Nothing
from pocketlm.tokenizer import Message, ToolMessage

Name = Annotated[str, Field(max_length=64)]


class CalledFunction(Fields):
    name: str
    arguments: dict[str, Any]
    index: int | None = None
    """it has no effect"""


class Call(Fields):
    function: CalledFunction
    type: Literal["function"] | None = None
    id: Name | None = None


class ChatMessage(Fields):
    """Clients send the fields of all roles with each of them, empty where they mean nothing."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Nothing = None
    thinking: str | None = None
    """it has no effect: earlier thoughts are no part of a prompt"""
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = None
    """of an assistant's message"""
    tool_name: Name | None = None
    """of a tool's message: that tool"""
    tool_call_id: Name | None = None
    """of a tool's message"""


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Raises ApiError for calls of others than the assistant.

    A call without an id gets its number as one, in the nine characters that Mistral's templates want, and so
    do, in the same order, results that do not say whose they are.
    """
    found: list[Message] = []
    called: list[str] = []  # ids of calls without a result, the oldest first
    count = 0
    for index, message in enumerate(messages):
        it = ToolMessage(role=message.role, content=message.content or "")
        if message.tool_calls:
            if message.role != "assistant":
                raise ApiError(
                    400,
                    f"messages.{index}.tool_calls is in a message of the role {message.role!r}; only the "
                    "assistant calls tools.",
                    code="invalid_value",
                    param=f"messages.{index}.tool_calls",
                )
            ids = [each.id or f"{count + n:09}" for n, each in enumerate(message.tool_calls)]
            count += len(ids)
            called = ids.copy()
            it["tool_calls"] = [_call(*each) for each in zip(message.tool_calls, ids, strict=True)]
        if message.role == "tool":
            result_of = message.tool_call_id or (called[0] if called else None)
            if result_of in called:
                called.remove(result_of)
            if result_of is not None:
                it["tool_call_id"] = result_of
            if message.tool_name:
                it["name"] = message.tool_name
        found.append(it)
    return found


def _call(call: Call, call_id: str) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call_id, "type": "function", "function": function}
