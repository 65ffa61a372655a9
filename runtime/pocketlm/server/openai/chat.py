"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter
from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from pocketlm.generate import Completion, Piece
from pocketlm.server import reports
from pocketlm.server.answers import Answers, Result, ServiceOf, finished, while_connected
from pocketlm.server.errors import ApiError, blaming
from pocketlm.server.event_stream import EventStream, event, json_bytes
from pocketlm.server.fields import given
from pocketlm.server.openai.fields import GenerationFields, Limit, one_of, use_instead
from pocketlm.server.openai.logprobs import chat_logprobs
from pocketlm.server.openai.messages import Conversation, template_messages
from pocketlm.server.openai.response_format import ResponseFormat, schema_of
from pocketlm.server.openai.tools import Choice, Tools, new_call_id, tool_settings
from pocketlm.server.openai.usage import finish_reason, new_id, system_fingerprint, usage
from pocketlm.settings import Settings

router = APIRouter(tags=["OpenAI"])

_Label = str | None


class ChatCompletionRequest(GenerationFields):
    messages: Conversation
    max_completion_tokens: Limit | None = None
    """the newer name of max_tokens"""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    overflow: Literal["error", "slide"] | None = None
    """"slide" leaves the oldest messages out where the conversation outgrows the context"""

    # Labels: they have no effect.
    safety_identifier: _Label = None
    prompt_cache_key: _Label = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    # Fields of OpenAI's that ask for something that is not done here, with the values that ask for nothing.
    store: Literal[False] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    functions: Annotated[None, BeforeValidator(use_instead("tools"))] = None
    function_call: Annotated[None, BeforeValidator(use_instead("tool_choice"))] = None

    def settings(self) -> Settings:
        """Raises ApiError for fields that contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs is given without logprobs. Set logprobs to true, or leave it out."
            raise ApiError(400, message, code="invalid_value", param="top_logprobs")
        limit = one_of("max_tokens", self.max_tokens, "max_completion_tokens", self.max_completion_tokens)
        own = given(
            max_tokens=None if limit == -1 else limit,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            json_schema=schema_of(self.response_format),
            parallel_tool_calls=self.parallel_tool_calls,
            overflow=self.overflow,
        )
        return cast(Settings, {**self.sampling(), **tool_settings(self.tools, self.tool_choice), **own})


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatCompletionRequest, service: ServiceOf) -> Response:
    """The next message of a conversation."""
    with blaming("messages", json_schema="response_format", tool="tools", max_tokens="max_tokens"):
        asking = service.ask(
            "chat", body.model, template_messages(body.messages), n=body.n or 1, **body.settings()
        )
        answers = await while_connected(request, asking)
    reply = Reply(answers, body)
    if body.stream:
        return EventStream(answers, reply.events(), send_timeout_s=service.config.send_timeout_s)
    result = await finished(request, answers)
    return Response(json_bytes(reply.whole(result)), media_type="application/json")


class Reply:
    """Answers as chat completions have them: whole, or in chunks."""

    def __init__(self, answers: Answers, body: ChatCompletionRequest) -> None:
        model = answers.model.model
        self._answers = answers
        self._n = body.n or 1
        self._includes_usage = body.includes_usage
        self._logprobs = bool(body.logprobs)
        self._tokenizer = model.tokenizer
        # The end of a text is none of its tokens.
        self._ends: Collection[int] = () if body.ignore_eos else model.manifest.tokens.eos
        self._head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": answers.created,
            "model": answers.model_name,
            "system_fingerprint": system_fingerprint(model.manifest),
        }

    def whole(self, result: Result) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(completion),
                "logprobs": self._logprobs_of(completion.pieces),
                "finish_reason": finish_reason(completion),
                **self._timings(completion, alone=False),
            }
            for index, completion in enumerate(result.completions)
        ]
        costs = {"usage": usage([result]), **self._timings(result.completions[0], alone=True)}
        return {**self._head, "choices": choices, **costs}

    async def events(self) -> AsyncIterator[bytes]:
        calls = [0] * self._n
        for index in range(self._n):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for index, piece in self._answers:
            if piece.text or self._logprobs:
                yield self._chunk(index, {"content": piece.text}, self._logprobs_of((piece,)))
            for call in piece.tool_calls:
                delta = {"index": calls[index], **call.as_dict(new_call_id())}
                calls[index] += 1
                yield self._chunk(index, {"tool_calls": [delta]})
        result = self._answers.result
        for index, completion in enumerate(result.completions):
            timings = (
                {} if self._includes_usage and self._n == 1 else {"timings": reports.timings(completion)}
            )
            yield self._chunk(index, {}, None, finish_reason(completion), **timings)
        if self._includes_usage:
            costs = {"usage": usage([result]), **self._timings(result.completions[0], alone=True)}
            yield event({**self._head, "choices": [], **costs})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        **more: Any,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if self._includes_usage:
            more["usage"] = None
        return event({**self._head, "choices": [choice], **more})

    def _logprobs_of(self, pieces: Collection[Piece]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return chat_logprobs(self._tokenizer, [each for each in pieces if each.token_id not in self._ends])

    def _timings(self, completion: Completion, *, alone: bool) -> dict[str, Any]:
        """llama-server's, where it has them if there is one answer; of several each has its own."""
        return {"timings": reports.timings(completion)} if alone == (self._n == 1) else {}


def _message(completion: Completion) -> dict[str, Any]:
    calls = [call.as_dict(new_call_id()) for call in completion.tool_calls]
    content = None if calls and not completion.text else completion.text
    message = {"role": "assistant", "content": content, "refusal": None}
    return {**message, "tool_calls": calls} if calls else message
