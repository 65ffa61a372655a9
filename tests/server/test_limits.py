"""Limits of bodies and of requests at once, before a tiny application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from pocketlm.server import limits
from pocketlm.server.config import ServerConfig
from pocketlm.server.limits import BodyLimit
from pocketlm.server.security import protect

MOST = 1000
URL = "http://127.0.0.1:8642"


class Waiting:
    """An application that says how long each body is once it is let go."""

    def __init__(self, **config: Any) -> None:
        self.arrived = 0
        self.go = asyncio.Event()
        routes = [Route("/{path:path}", self._answer, methods=["GET", "POST"])]
        self.app = Starlette(routes=routes)
        protect(self.app, ServerConfig(**{"max_body_bytes": MOST, **config}))

    async def _answer(self, request: Request) -> Response:
        self.arrived += 1
        size = len(await request.body())
        await self.go.wait()
        return PlainTextResponse(f"{size}")

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=URL)


async def in_chunks(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield b"x" * size


def post(content: Any, path: str = "/v1/completions", **config: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        waiting = Waiting(**config)
        waiting.go.set()
        async with waiting.client() as client:
            return await client.post(path, content=content)

    return asyncio.run(send())


@pytest.mark.parametrize("size", [0, 1, MOST - 1, MOST])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_up_to_the_limit_arrives_whole(size: int, chunked: bool) -> None:
    answer = post(in_chunks(size // 2, size - size // 2) if chunked else b"x" * size)
    assert answer.status_code == 200
    assert answer.text == str(size)


@given(st.lists(st.integers(0, 600), max_size=6))
def test_what_counts_is_the_sum_of_the_chunks(sizes: list[int]) -> None:
    async def exchange() -> tuple[int | None, bytes]:
        read = bytearray()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            more = True
            while more:
                message = await receive()
                read.extend(message["body"])
                more = message["more_body"]
            await send({"type": "http.response.start", "status": 200, "headers": []})

        chunks = [{"type": "http.request", "body": b"x" * size, "more_body": True} for size in sizes]
        messages = iter([*chunks, {"type": "http.request", "body": b"", "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/v1/x", "headers": [(b"transfer-encoding", b"chunked")]}
        await BodyLimit(app, ServerConfig(max_body_bytes=MOST))(scope, receive, send)
        return sent[0]["status"], bytes(read)

    status, read = asyncio.run(exchange())
    assert (status, len(read)) == ((200, sum(sizes)) if sum(sizes) <= MOST else (413, 0))


@pytest.mark.parametrize("content", [b"x" * (MOST + 1), in_chunks(MOST, 1), in_chunks(*[100] * 50)])
def test_a_larger_body_is_refused(content: Any) -> None:
    answer = post(content)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    assert "1.0 kB at most" in answer.json()["error"]["message"]


def test_a_declared_size_is_enough_to_refuse() -> None:
    """Nothing of the body is there yet, and of an endless one nothing more is read than is thrown away."""
    read = 0

    async def exchange() -> list[Any]:
        sent: list[Any] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/chat",
            "headers": [(b"host", b"localhost"), (b"content-length", b"9" * 5000)],
            "scheme": "http",
        }

        async def receive() -> Any:
            nonlocal read
            assert sent, "it is refused before anything is read"
            read += 1 << 20
            return {"type": "http.request", "body": b"x" * (1 << 20), "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        await Waiting().app(scope, receive, send)
        return sent

    sent = asyncio.run(exchange())
    assert sent[0]["status"] == 413
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert read <= limits.LINGER_BYTES + (2 << 20)


@pytest.mark.parametrize("size", [MOST + 1, 10])
def test_a_body_that_does_not_come_is_not_waited_for(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x" * size
        await asyncio.Event().wait()

    answer = post(stalled(), body_timeout_s=0.05)
    assert answer.status_code == (413 if size > MOST else 408)
    assert answer.headers["connection"] == "close"


def test_a_client_that_goes_is_not_answered() -> None:
    async def exchange() -> list[Any]:
        sent: list[Any] = []
        messages = iter(
            [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]
        )

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("half a request reached the application")

        scope = {"type": "http", "path": "/", "headers": [(b"content-length", b"10")]}
        await BodyLimit(app, ServerConfig())(scope, receive, send)
        return sent

    assert asyncio.run(exchange()) == []


def test_behind_the_body_the_application_hears_of_the_client_going() -> None:
    async def exchange() -> list[str]:
        heard: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            heard.extend([(await receive())["type"], (await receive())["type"]])

        messages = iter([{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            raise AssertionError

        scope = {"type": "http", "path": "/", "headers": [(b"content-length", b"1")]}
        await BodyLimit(app, ServerConfig())(scope, receive, send)
        return heard

    assert asyncio.run(exchange()) == ["http.request", "http.disconnect"]


def test_so_many_requests_at_once_and_no_more() -> None:
    async def exchange() -> tuple[list[httpx.Response], httpx.Response, list[httpx.Response]]:
        waiting = Waiting(max_connections=3)
        async with waiting.client() as client:
            under_way = [asyncio.create_task(client.get("/v1/models")) for _ in range(3)]
            while waiting.arrived < 3:
                await asyncio.sleep(0)
            refused = await client.get("/api/tags")
            well = asyncio.create_task(client.get("/health"))
            while waiting.arrived < 4:
                await asyncio.sleep(0)
            waiting.go.set()
            first = await asyncio.gather(*under_way, well)
            then = await asyncio.gather(*(client.get("/v1/models") for _ in range(3)))
        return first, refused, then

    first, refused, then = asyncio.run(exchange())
    assert [answer.status_code for answer in first + then] == [200] * 7
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["connection"] == "close"
    assert "3 requests" in refused.json()["error"]


def test_a_request_that_fails_gives_its_place_back() -> None:
    async def exchange() -> list[int]:
        async def fails(request: Request) -> Response:
            raise RuntimeError

        app = Starlette(routes=[Route("/v1/models", fails)])
        protect(app, ServerConfig(max_connections=1))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
            return [(await client.get("/v1/models")).status_code for _ in range(3)]

    assert asyncio.run(exchange()) == [500] * 3
