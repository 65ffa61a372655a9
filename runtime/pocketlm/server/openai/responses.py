"""`/v1/responses`: the OpenAI API for clients that no longer use chat completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pocketlm.server.answers import Answers, ServiceOf, finished, while_connected
from pocketlm.server.errors import ApiError, blaming
from pocketlm.server.event_stream import EventStream, event, json_bytes
from pocketlm.server.openai.responses_input import ResponsesRequest, conversation, settings
from pocketlm.server.openai.responses_output import Output

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", response_model=None)
async def create_response(request: Request, body: ResponsesRequest, service: ServiceOf) -> Response:
    """An answer to a whole conversation. Nothing of it is stored."""
    with blaming("input", json_schema="text.format", tool="tools", max_tokens="max_output_tokens"):
        asking = service.ask("responses", body.model, conversation(body), **settings(body))
        answers = await while_connected(request, asking)
    output = Output(body, answers)
    if body.stream:
        return EventStream(
            answers,
            _events(output, answers),
            send_timeout_s=service.config.send_timeout_s,
            failed=lambda error: _failed(output, error),
        )
    result = await finished(request, answers)
    return Response(json_bytes(output.response(result)), media_type="application/json")


async def _events(output: Output, answers: Answers) -> AsyncIterator[bytes]:
    yield _encoded(output.begin())
    async for _, piece in answers:
        if events := output.add(piece):
            yield _encoded(events)
    yield _encoded(output.end(answers.result))


def _failed(output: Output, error: ApiError) -> bytes:
    return _encoded(output.fail(error))


def _encoded(events: list[dict[str, Any]]) -> bytes:
    return b"".join(event(each, each["type"]) for each in events)
