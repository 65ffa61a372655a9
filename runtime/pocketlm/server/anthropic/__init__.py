"""Anthropic's API: `/v1/messages` and the count of its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pocketlm.server.answers import Answers, ServiceOf, finished, while_connected
from pocketlm.server.anthropic.reply import Reply
from pocketlm.server.anthropic.request import MessagesRequest, PromptFields, conversation, settings, tools
from pocketlm.server.errors import ApiError, blaming, error_object
from pocketlm.server.event_stream import EventStream, event, json_bytes
from pocketlm.tools import Tool

router = APIRouter(tags=["Anthropic"])

_PING = event({"type": "ping"}, "ping")


class MessageStream(EventStream):
    """Anthropic's clients know a ping as an event of its own, and an error by its name."""

    ping = _PING


@router.post("/v1/messages", response_model=None)
async def messages(request: Request, body: MessagesRequest, service: ServiceOf) -> Response:
    """The next message of a conversation."""
    with blaming("messages", json_schema="output_config.format", stop="stop_sequences", tool="tools"):
        asking = service.ask("messages", body.model, conversation(body), **settings(body))
        answers = await while_connected(request, asking)
    reply = Reply(answers.model_name, body.max_tokens)
    if body.stream:
        timeout_s = service.config.send_timeout_s
        return MessageStream(answers, _events(reply, answers), send_timeout_s=timeout_s, failed=_failed)
    result = await finished(request, answers)
    return Response(json_bytes(reply.message(result)), media_type="application/json")


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: PromptFields, service: ServiceOf) -> dict[str, int]:
    """The tokens of the prompt that `/v1/messages` would make of the same fields."""
    prompt = conversation(body)
    with blaming("messages", tool="tools"):
        shown = [Tool.parse(tool).as_dict() for tool in tools(body)]
        lease = await service.acquire(body.model)
        try:
            ids = await asyncio.to_thread(lease.model.model.tokenizer.encode_chat, prompt, tools=shown)
        finally:
            lease.release()
    return {"input_tokens": len(ids)}


async def _events(reply: Reply, answers: Answers) -> AsyncIterator[bytes]:
    # The first event tells how much of the prompt was cached, which is known with the first token.
    begun = False
    async for _, piece in answers:
        if not begun:
            begun = True
            yield _encoded(reply.begin(answers.usage)) + _PING
        if events := reply.add(piece):
            yield _encoded(events)
    if not begun:
        yield _encoded(reply.begin(answers.usage)) + _PING
    yield _encoded(reply.end(answers.result))


def _encoded(events: list[dict[str, Any]]) -> bytes:
    return b"".join(event(each, each["type"]) for each in events)


def _failed(error: ApiError) -> bytes:
    return event(error_object(error, "anthropic"), "error")
