"""What clients of `/v1/responses` ask, as a prompt and settings.

Nothing is stored, so each request brings its whole conversation; items of an earlier response's output may
be sent back as they came. Labels (`metadata`, `user`, `prompt_cache_key`, …) are taken and change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag

from pocketlm.server.errors import ApiError
from pocketlm.server.fields import Count, Fields, ModelName, OpenFields, Share, Temperature, given
from pocketlm.server.messages import Messages, joined, text_of
from pocketlm.server.openai.response_format import JsonObject, NamedSchema, Text, schema_of
from pocketlm.server.openai.tools import FunctionName
from pocketlm.settings import Settings
from pocketlm.tokenizer import Message, ToolMessage
from pocketlm.tools import MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Fields):
    type: Literal["input_text"]
    text: str


class OutputText(OpenFields):
    type: Literal["output_text"]
    text: str


Parts = Annotated[list[Annotated[InputText | OutputText, Field(discriminator="type")]], Field(fail_fast=True)]


class MessageItem(Fields):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class FunctionCallItem(OpenFields):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str  # JSON


class FunctionOutputItem(Fields):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], Field(fail_fast=True)]
    id: str | None = None
    status: Status | None = None


def _kind(item: object) -> object:
    """Only messages may leave their type out."""
    if isinstance(item, Mapping):
        return item.get("type") or "message"
    return getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Fields):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # the schema is kept either way


class NamedFunction(Fields):
    type: Literal["function"]
    name: FunctionName


class JsonSchema(NamedSchema):
    type: Literal["json_schema"]


class TextFields(Fields):
    format: Annotated[Text | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Fields):
    effort: Literal["none"] | None = None
    summary: None = None


class StreamOptions(Fields):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Fields):
    """The request of `/v1/responses`."""

    model: ModelName | None = None
    input: str | Messages[Item]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextFields | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled", "auto"] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: Literal[False] | None = None
    reasoning: Reasoning | None = None
    service_tier: Literal["auto", "default"] | None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def conversation(request: ResponsesRequest) -> list[Message]:
    """The prompt. Raises ApiError for what would need stored responses, and for a result without its call."""
    _check_stored_nothing(request)
    messages: list[Message] = []
    if request.instructions:
        messages.append(Message(role="system", content=request.instructions))
    if isinstance(request.input, str):
        return [*messages, Message(role="user", content=request.input)]
    if not request.input:
        raise ApiError(400, "input is empty. Give at least one message.", param="input")
    called: dict[str, str] = {}
    for index, item in enumerate(request.input):
        match item:
            case MessageItem():
                role = "system" if item.role == "developer" else item.role
                messages.append(Message(role=role, content=text_of(item.content)))
            case FunctionCallItem():
                called[item.call_id] = item.name
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages.append(ToolMessage(role="assistant", content="", tool_calls=[call]))
            case FunctionOutputItem():
                messages.append(_returned(item, called, index))
    return joined(messages, ("system", "assistant"))


def settings(request: ResponsesRequest) -> Settings:
    """Raises ApiError for `top_logprobs` that nobody would see."""
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, f'top_logprobs needs "include": ["{LOGPROBS}"]. Add it.', param="top_logprobs")
    return cast(
        Settings,
        given(
            max_tokens=request.max_output_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            logprobs=request.logprobs or None,
            top_logprobs=request.top_logprobs if request.logprobs else None,
            json_schema=_schema(request.text),
            tools=[_nested(tool) for tool in request.tools or ()] or None,
            tool_choice=_choice(request.tool_choice),
            parallel_tool_calls=request.parallel_tool_calls,
            overflow="slide" if request.truncation == "auto" else None,
        ),
    )


def _check_stored_nothing(request: ResponsesRequest) -> None:
    if request.store:
        message = "store is true, but this server stores no responses. Set it to false."
        raise ApiError(400, message, code="unsupported_field", param="store")
    if request.previous_response_id is not None:
        raise ApiError(
            400,
            "previous_response_id is given, but this server stores no responses. Send the whole conversation "
            "in input, what the response's output had too.",
            code="unsupported_field",
            param="previous_response_id",
        )


def _returned(item: FunctionOutputItem, called: Mapping[str, str], index: int) -> ToolMessage:
    name = called.get(item.call_id)
    if name is None:
        raise ApiError(
            400,
            f"input.{index} is the output of the call {item.call_id!r}, but no function_call before it has "
            "that call_id.",
            param=f"input.{index}.call_id",
        )
    return ToolMessage(role="tool", content=text_of(item.output), tool_call_id=item.call_id, name=name)


def _schema(text: TextFields | None) -> dict[str, Any] | None:
    chosen = None if text is None else text.format
    return chosen.schema_ if isinstance(chosen, JsonSchema) else schema_of(chosen)


def _nested(tool: FunctionTool) -> dict[str, Any]:
    """The form of `/v1/chat/completions`."""
    function = given(name=tool.name, description=tool.description, parameters=tool.parameters)
    return {"type": "function", "function": function}


def _choice(choice: str | NamedFunction | None) -> str | Mapping[str, Any] | None:
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice
