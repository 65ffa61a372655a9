"""A conversation as OpenAI's chat completions have it → messages as the chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pocketlm.server.fields import Fields
from pocketlm.server.messages import Messages, TextPart, text_of
from pocketlm.tokenizer import Message, ToolMessage


def _is_object(arguments: str) -> str:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PydanticCustomError("arguments", "Input should be the text of a JSON object")
    return arguments or "{}"


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]
Name = Annotated[str, Field(max_length=64)]


class CalledFunction(Fields):
    name: str
    arguments: Annotated[str, AfterValidator(_is_object)]


class Call(Fields):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """of a streamed call that is sent back; it has no effect"""


class SystemMessage(Fields):
    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(Fields):
    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(Fields):
    """Also as an answer of this server holds it, to be sent back."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None


class ToolResult(Fields):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: Name | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolResult, Field(discriminator="role")
]
Conversation = Annotated[Messages[ChatMessage], Field(min_length=1)]


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """`developer` is what newer models call `system`; templates know the latter."""
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    result = ToolMessage(role=role, content=text_of(message.content))
    if message.name is not None:
        result["name"] = message.name
    if isinstance(message, ToolResult):
        result["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        result["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    return result
