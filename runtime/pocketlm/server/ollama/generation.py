"""`/api/chat` and `/api/generate`: the next message of a conversation, and the answer to a prompt."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pocketlm.engine import Prompt
from pocketlm.generate import Completion, Piece
from pocketlm.server.answers import Answers, Result, Service, ServiceOf, finished, while_connected
from pocketlm.server.errors import ApiError, blaming, error_object
from pocketlm.server.event_stream import LineStream, json_bytes, line
from pocketlm.server.messages import Messages
from pocketlm.server.ollama.fields import OPTIONS_OF_SETTINGS, GenerationFields, Nothing, room
from pocketlm.server.ollama.messages import ChatMessage, template_messages
from pocketlm.server.ollama.times import nanoseconds, timestamp
from pocketlm.server.openai.logprobs import token_logprob
from pocketlm.server.openai.tools import Tools
from pocketlm.server.openai.usage import finish_reason
from pocketlm.settings import Settings
from pocketlm.tokenizer import Message
from pocketlm.tools import ToolCall

router = room()

_Part = Callable[[str, Sequence[ToolCall]], dict[str, Any]]
"""What tells of some text and calls: a message, or a response."""

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer: a line of JSON for each part of it, or one object.",
        "content": {"application/x-ndjson": {}, "application/json": {}},
    }
}


class ChatRequest(GenerationFields):
    messages: Messages[ChatMessage] | None = None
    """none: the model is loaded, or unloaded if keep_alive is 0"""
    tools: Tools | None = None
    truncate: bool | None = None
    """true: the oldest messages are left out where the conversation outgrows the context"""


class GenerateRequest(GenerationFields):
    prompt: str | None = None
    """empty: the model is loaded, or unloaded if keep_alive is 0"""
    system: str | None = None
    raw: bool | None = None
    """true: the prompt is gone on with as it is, without the chat template"""
    truncate: bool | None = None
    """there is nothing to be left out of a single prompt: one that is too long is refused"""
    suffix: Nothing = None
    template: Nothing = None
    context: Nothing = None
    images: Nothing = None

    def read(self) -> tuple[Prompt, bool]:
        """The prompt, and whether it is raw. Raises ApiError for fields that contradict each other."""
        text, system = self.prompt or "", self.system
        if not system:
            return text, bool(self.raw)
        if self.raw:
            message = "system is given with raw, which takes the prompt as it is. Leave one of them out."
            raise ApiError(400, message, code="invalid_value", param="system")
        return [Message(role="system", content=system), Message(role="user", content=text)], False


@router.post("/api/chat", response_model=None, responses=_ANSWER)
async def chat(request: Request, body: ChatRequest, service: ServiceOf) -> Response:
    """The next message of a conversation."""
    if not body.messages:
        return await _load(body, service, _message)
    settings = body.settings()
    if body.tools:
        settings["tools"] = [tool.as_dict() for tool in body.tools]
    if body.truncate:
        settings["overflow"] = "slide"
    with blaming("messages", tool="tools", **OPTIONS_OF_SETTINGS):
        prompt = template_messages(body.messages)
        asking = _ask(body, service, "ollama_chat", _message, prompt, settings)
        reply = await while_connected(request, asking)
    return await _answer(request, reply, service, streamed=body.stream is not False)


@router.post("/api/generate", response_model=None, responses=_ANSWER)
async def generate(request: Request, body: GenerateRequest, service: ServiceOf) -> Response:
    """The answer to a prompt."""
    if not body.prompt:
        return await _load(body, service, _response)
    with blaming("prompt", **OPTIONS_OF_SETTINGS):
        prompt, raw = body.read()
        asking = _ask(body, service, "ollama_generate", _response, prompt, body.settings(), raw=raw)
        reply = await while_connected(request, asking)
    return await _answer(request, reply, service, streamed=body.stream is not False)


def _message(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return {"message": message}


def _response(text: str, _: Sequence[ToolCall]) -> dict[str, Any]:
    return {"response": text}


async def _load(body: GenerationFields, service: Service, part: _Part) -> Response:
    """Loads the model, or unloads it. There is nothing to stream."""
    begun = time.perf_counter()
    if body.keep_alive == 0:
        name = service.store.get(body.model).name
        await service.store.unload(name)
        done = {"done": True, "done_reason": "unload"}
    else:
        body.check_context(service)
        async with await service.acquire(body.model) as lease:
            name = lease.name
            body.keep(service, name)
        load = nanoseconds(time.perf_counter() - begun)
        done = {"done": True, "done_reason": "load", "total_duration": load, "load_duration": load}
    answer = {"model": name, "created_at": timestamp(time.time()), **part("", ()), **done}
    return Response(json_bytes(answer), media_type="application/json")


async def _ask(
    body: GenerationFields,
    service: Service,
    api: str,
    part: _Part,
    prompt: Prompt,
    settings: Settings,
    *,
    raw: bool = False,
) -> Reply:
    body.check_context(service)
    begun = time.perf_counter()
    async with await service.acquire(body.model):
        load_s = time.perf_counter() - begun
        answers = await service.ask(api, body.model, prompt, raw=raw, **settings)
    body.keep(service, answers.model_name)
    return Reply(answers, part, begun, load_s, logprobs=bool(body.logprobs))


async def _answer(request: Request, reply: Reply, service: Service, *, streamed: bool) -> Response:
    if streamed:
        timeout_s = service.config.send_timeout_s
        return LineStream(reply.answers, reply.lines(), send_timeout_s=timeout_s, failed=_failed)
    result = await finished(request, reply.answers)
    return Response(json_bytes(reply.whole(result)), media_type="application/json")


def _failed(error: ApiError) -> bytes:
    return line(error_object(error, "ollama"))


class Reply:
    """An answer as Ollama has it: whole, or in lines."""

    def __init__(self, answers: Answers, part: _Part, begun: float, load_s: float, *, logprobs: bool) -> None:
        """begun: `time.perf_counter` when the request came, load_s: how long it waited for the model."""
        self.answers = answers
        self._part = part
        self._begun = begun
        self._load_s = load_s
        self._logprobs = logprobs

    def whole(self, result: Result) -> dict[str, Any]:
        """Raises ApiError if the server broke the answer off."""
        completion = result.completions[0]
        part = self._part(completion.text, completion.tool_calls)
        return {**self._head(), **part, **self._tokens(completion.pieces), **self._end(result)}

    async def lines(self) -> AsyncIterator[bytes]:
        async for _, piece in self.answers:
            if piece.text or piece.tool_calls or self._logprobs:
                part = self._part(piece.text, piece.tool_calls)
                yield line({**self._head(), **part, **self._tokens((piece,)), "done": False})
        yield line({**self._head(), **self._part("", ()), **self._end(self.answers.result)})

    def _head(self) -> dict[str, Any]:
        return {"model": self.answers.model_name, "created_at": timestamp(time.time())}

    def _tokens(self, pieces: Collection[Piece]) -> dict[str, Any]:
        if not self._logprobs:
            return {}
        model = self.answers.model.model
        # The end of a text is none of its tokens.
        shown = (piece for piece in pieces if piece.token_id not in model.manifest.tokens.eos)
        return {"logprobs": [token_logprob(model.tokenizer, piece) for piece in shown]}

    def _end(self, result: Result) -> dict[str, Any]:
        completion = result.completions[0]
        usage, times = completion.usage, completion.timings
        return {
            "done": True,
            "done_reason": _done_reason(completion),
            "total_duration": nanoseconds(time.perf_counter() - self._begun),
            "load_duration": nanoseconds(self._load_s),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(times.prefill_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanoseconds(times.decode_s),
            "cached_tokens": usage.cached_tokens,
            "dropped_messages": usage.dropped_messages,
            "energy": result.reading.as_object(),
        }


def _done_reason(completion: Completion) -> str:
    """Raises ApiError for an answer that the server has broken off."""
    return "length" if finish_reason(completion) == "length" else "stop"
