"""The chat page in front of a scripted server: it answers what a test has put into the queue."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pocketlm.server import page

MEASURED = {
    "energy_j": 4.21,
    "source": "rapl",
    "scope": "package",
    "kind": "measured",
    "low_j": None,
    "high_j": None,
    "duration_s": 0.87,
    "flags": [],
    "reason": None,
}
ESTIMATED = {
    **MEASURED,
    "source": "cpu-time",
    "scope": "process",
    "kind": "estimated",
    "low_j": 2.9,
    "high_j": 5.6,
}
ABSENT = {
    **ESTIMATED,
    "energy_j": None,
    "low_j": None,
    "high_j": None,
    "reason": "no sensor can be read here",
}


class Hold(threading.Event):
    """A place in an answer where the server waits until the test lets it go on."""


@dataclass(frozen=True)
class Fail:
    """An error: instead of the answer, or within it as an event."""

    status: int
    message: str
    code: str | None = None
    retry_after_s: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": "error", "param": None, "code": self.code}}


class Drop:
    """The connection ends here."""


@dataclass
class Answer:
    """`steps` are pieces of text, Hold, Fail or Drop, in order."""

    steps: list[Any]
    finish: str = "stop"
    energy: dict[str, Any] | None = field(default_factory=lambda: MEASURED)
    prompt_tokens: int = 40
    pause_s: float = 0.0  # between pieces
    end: Hold | None = None  # between the last event and the end of the body


MODELS = [
    {
        "id": "small",
        "meta": {"precision": "int8", "bytes": 142_000_000, "context_length": 2048, "loaded": True},
    },
    {
        "id": "larger",
        "meta": {"precision": "int4", "bytes": 1_300_000_000, "context_length": 4096, "loaded": False},
    },
]


@dataclass
class FakeChatServer:
    """What the page asked for, and what it is told."""

    url: str = ""
    answers: deque[Answer | Fail] = field(default_factory=deque)
    requests: list[dict[str, Any]] = field(default_factory=list)
    abandoned: list[dict[str, Any]] = field(default_factory=list)  # requests whose client went away
    models: list[dict[str, Any]] = field(default_factory=lambda: list(MODELS))
    key: str | None = None
    loading: bool = False

    def reset(self) -> None:
        fresh = FakeChatServer(self.url)
        vars(self).update(vars(fresh))

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        app.include_router(page.routes())
        app.add_api_route("/health", self._health, response_model=None)
        app.add_api_route("/props", self._props, response_model=None)
        app.add_api_route("/v1/models", self._models, response_model=None)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_model=None)
        return app

    async def _health(self) -> Response:
        if self.loading:
            return _refusal(Fail(503, "Loading model"))
        return JSONResponse({"status": "ok"})

    async def _props(self) -> Response:
        return JSONResponse({"default_generation_settings": {"n_ctx": 1024}, "total_slots": 4})

    async def _models(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        if self.loading:
            return _refusal(Fail(503, "Loading model"))
        data = [{"object": "model", "created": 0, "owned_by": "pocketlm", **each} for each in self.models]
        return JSONResponse({"object": "list", "data": data})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        if refused := self._refused(request):
            return refused
        if self.loading:
            return _refusal(Fail(503, "Loading model"))
        self.requests.append(body)
        answer = (
            self.answers.popleft()
            if self.answers
            else Answer([f"You said: {body['messages'][-1]['content']}"])
        )
        if isinstance(answer, Fail):
            return _refusal(answer)
        return StreamingResponse(self._stream(answer, body), media_type="text/event-stream")

    def _refused(self, request: Request) -> Response | None:
        given = request.headers.get("Authorization")
        if self.key is None or given == f"Bearer {self.key}":
            return None
        code = "invalid_api_key" if given else "missing_api_key"
        return _refusal(Fail(401, "Send it as `Authorization: Bearer KEY`.", code))

    async def _stream(self, answer: Answer, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b": ping\n\n"
        yield _chunk(body, {"role": "assistant", "content": ""})
        pieces = 0
        for step in answer.steps:
            match step:
                case Hold():
                    await self._wait(step, body)
                case Fail():
                    yield _event(step.body)
                    await self._wait(answer.end, body)
                    return
                case Drop():
                    return
                case _:
                    pieces += 1
                    yield _chunk(body, {"content": step})
                    await asyncio.sleep(answer.pause_s)
        yield _chunk(body, {}, answer.finish)
        yield _event({"model": _model(body), "choices": [], **_costs(answer, pieces)})
        yield b"data: [DONE]\n\n"
        await self._wait(answer.end, body)

    async def _wait(self, hold: Hold | None, body: dict[str, Any]) -> None:
        try:
            while hold is not None and not hold.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:  # the client went away
            self.abandoned.append(body)
            raise


def _model(body: dict[str, Any]) -> str:
    return str(body.get("model", MODELS[0]["id"]))


def _costs(answer: Answer, pieces: int) -> dict[str, Any]:
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": pieces,
        "total_tokens": answer.prompt_tokens + pieces,
        "prompt_tokens_details": {"cached_tokens": answer.prompt_tokens // 2},
        "energy": answer.energy,
    }
    timings = {"prompt_n": 20, "prompt_ms": 40.0, "prompt_per_second": 500.0, "predicted_per_second": 31.25}
    return {"usage": usage, "timings": timings}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _chunk(body: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _event({"object": "chat.completion.chunk", "model": _model(body), "choices": [choice]})


def _refusal(fail: Fail) -> Response:
    headers = {} if fail.retry_after_s is None else {"Retry-After": str(fail.retry_after_s)}
    return JSONResponse(fail.body, fail.status, headers)


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Raises TimeoutError if it does not come true."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s} s")
        time.sleep(0.005)


@contextmanager
def serving_chat() -> Iterator[FakeChatServer]:
    """A fake on a port of loopback, in a thread."""
    fake = FakeChatServer()
    config = uvicorn.Config(
        fake.app(), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(20)  # a test that failed may have left an answer under way
        listener.close()
