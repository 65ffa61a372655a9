"""Tools that a model may call, and its calls, as OpenAI's chat completions have them."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from pocketlm.server.errors import ApiError
from pocketlm.server.fields import Fields, given
from pocketlm.tools import MAX_TOOLS

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # what Mistral's templates want; others take any

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(Fields):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """no difference: arguments always keep to the schema"""


class FunctionTool(Fields):
    type: Literal["function"]
    function: Function

    def as_dict(self) -> dict[str, Any]:
        """What `Settings` take."""
        function = self.function
        optional = given(description=function.description, parameters=function.parameters)
        return {"type": "function", "function": {"name": function.name, **optional}}


class NamedFunction(Fields):
    name: FunctionName


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class Allowed(Fields):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Fields):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Tools = Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)]
Choice = (
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
)


def tool_settings(tools: Sequence[FunctionTool] | None, choice: Choice | None) -> dict[str, Any]:
    """The settings `tools` and `tool_choice`. Of tools that are not allowed the model is not told.

    Raises ApiError for an allowed tool that is not among `tools`.
    """
    shown, wanted = [tool.as_dict() for tool in tools or ()], choice
    if isinstance(choice, AllowedTools):
        allowed = {tool.function.name for tool in choice.allowed_tools.tools}
        missing = allowed - {tool["function"]["name"] for tool in shown}
        if missing:
            message = f"tool_choice allows {min(missing)!r}, which is not among the tools."
            raise ApiError(400, message, code="invalid_value", param="tool_choice")
        shown = [tool for tool in shown if tool["function"]["name"] in allowed]
        return {"tools": shown, "tool_choice": choice.allowed_tools.mode}
    if isinstance(choice, NamedTool):
        wanted = choice.model_dump()  # type: ignore[assignment]
    return given(tools=shown or None, tool_choice=wanted)


def new_call_id() -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
