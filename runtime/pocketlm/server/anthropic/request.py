"""What Anthropic's clients ask, as a prompt and settings.

Labels (`metadata`, `service_tier`) and hints (`cache_control`: whatever can be cached is cached anyway) are
taken and change nothing. Fields with an effect that is missing here are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from pocketlm.server.errors import ApiError
from pocketlm.server.fields import Count, Fields, ModelName, OpenFields, Share, given
from pocketlm.server.messages import Messages, joined, text_of
from pocketlm.server.openai.tools import FunctionName
from pocketlm.settings import Settings
from pocketlm.tokenizer import Message, ToolMessage
from pocketlm.tools import MAX_TOOLS


class CacheControl(Fields):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Fields):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ToolUseBlock(OpenFields):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Fields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(OpenFields):
    """Sent back from an answer of a model that thinks. Earlier thoughts are no part of a prompt."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class Turn(Fields):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


class ToolFields(Fields):
    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: CacheControl | None = None
    strict: bool | None = None  # the schema is kept either way
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None
    eager_input_streaming: Literal[False] | None = None


class AutoChoice(Fields):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Fields):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(Fields):
    type: Literal["none"]


class NoThinking(Fields):
    type: Literal["disabled"]


class OutputFormat(Fields):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    format: OutputFormat | None = None


class Metadata(Fields):
    user_id: str | None = None


class PromptFields(Fields):
    """What makes the prompt: the request of `/v1/messages/count_tokens`."""

    model: ModelName
    messages: Messages[Turn]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolFields], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[AutoChoice | NamedChoice | NoChoice, Field(discriminator="type")] | None = None
    thinking: NoThinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None


class MessagesRequest(PromptFields):
    """The request of `/v1/messages`."""

    max_tokens: Count
    stop_sequences: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=16)] | None = (
        None
    )
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


def conversation(request: PromptFields) -> list[Message]:
    """The prompt, turns of the same role behind each other made one, as Anthropic does.

    Raises ApiError for a conversation that cannot be answered.
    """
    if not request.messages:
        raise ApiError(400, "messages is empty. Give at least one message.", param="messages")
    if request.messages[-1].role == "assistant":
        raise ApiError(
            400,
            "messages ends with an assistant's message, which cannot be gone on with. End with a user's.",
            param="messages",
        )
    messages: list[Message] = []
    if system := text_of(request.system):
        messages.append(Message(role="system", content=system))
    called: dict[str, str] = {}
    for index, turn in enumerate(request.messages):
        if isinstance(turn.content, str):
            messages.append(Message(role=turn.role, content=turn.content))
        elif turn.role == "user":
            messages += _asked(turn.content, called, index)
        else:
            messages.append(_answered(turn.content, called, index))
    return joined(messages, ("user", "assistant"))


def tools(request: PromptFields) -> list[dict[str, Any]]:
    """The tools in the form of OpenAI's API."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema,
            },
        }
        for tool in request.tools or ()
    ]


def settings(request: MessagesRequest) -> Settings:
    output = request.output_config and request.output_config.format
    choice = request.tool_choice
    single = isinstance(choice, AutoChoice | NamedChoice) and choice.disable_parallel_tool_use
    return cast(
        Settings,
        given(
            max_tokens=request.max_tokens,
            stop=request.stop_sequences,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            json_schema=output and output.schema_,
            tools=tools(request) or None,
            tool_choice=_choice(choice),
            parallel_tool_calls=False if single else None,
        ),
    )


def _choice(choice: AutoChoice | NamedChoice | NoChoice | None) -> str | Mapping[str, Any] | None:
    match choice:
        case AutoChoice():
            return "auto" if choice.type == "auto" else "required"
        case NamedChoice():
            return {"type": "function", "function": {"name": choice.name}}
        case NoChoice():
            return "none"
    return None


def _asked(blocks: list[Block], called: Mapping[str, str], index: int) -> Iterator[Message]:
    """A user's turn: what tools have returned, and what the user says."""
    for block in blocks:
        match block:
            case TextBlock():
                yield Message(role="user", content=block.text)
            case ToolResultBlock():
                yield _returned(block, called, index)
            case _:
                raise _misplaced(block, "user", index)
    if not blocks:
        yield Message(role="user", content="")


def _returned(block: ToolResultBlock, called: Mapping[str, str], index: int) -> ToolMessage:
    name = called.get(block.tool_use_id)
    if name is None:
        raise ApiError(
            400,
            f"messages.{index} has the result of {block.tool_use_id!r}, but no tool_use block before it has "
            "that id.",
            param=f"messages.{index}.content",
        )
    text = text_of(block.content)
    if block.is_error:  # templates know no errors
        text = f"Error: {text}"
    return ToolMessage(role="tool", content=text, tool_call_id=block.tool_use_id, name=name)


def _answered(blocks: list[Block], called: dict[str, str], index: int) -> Message:
    """An assistant's turn. `called` gets its calls."""
    calls, texts = [], []
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolUseBlock():
                called[block.id] = block.name
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                raise _misplaced(block, "assistant", index)
    text = "\n".join(texts)
    if not calls:
        return Message(role="assistant", content=text)
    return ToolMessage(role="assistant", content=text, tool_calls=calls)


def _misplaced(block: Block, role: str, index: int) -> ApiError:
    message = f"messages.{index}.content has a {block.type} block, which does not belong to the role {role}."
    return ApiError(400, message, param=f"messages.{index}.content")
