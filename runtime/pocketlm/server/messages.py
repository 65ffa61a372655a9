"""Conversations as the APIs have them → messages as the chat template takes them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Literal, Protocol, TypeVar, cast

from pydantic import Field

from pocketlm.server.fields import Fields
from pocketlm.tokenizer import Message, ToolMessage

T = TypeVar("T")

MAX_MESSAGES = 8192
"""In a conversation: more than any context holds."""

Messages = Annotated[list[T], Field(fail_fast=True, max_length=MAX_MESSAGES)]


class TextPart(Fields):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


def text_of(content: str | Sequence[_HasText] | None) -> str:
    """The text of a message. Its parts are joined by line ends, as llama-server joins them."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def joined(messages: Iterable[Message], roles: Collection[str]) -> list[Message]:
    """The messages, where those of one of `roles` behind each other are made one."""
    result: list[Message] = []
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        alike = list(group)
        result += [_one(alike)] if role in roles and len(alike) > 1 else alike
    return result


def _one(messages: Sequence[Message]) -> Message:
    text = "\n".join(message["content"] for message in messages if message["content"])
    one = ToolMessage(role=messages[0]["role"], content=text)
    calls = [call for message in messages for call in cast(ToolMessage, message).get("tool_calls", ())]
    if calls:
        one["tool_calls"] = calls
    return one
