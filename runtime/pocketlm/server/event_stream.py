"""Answers on their way to a client: server-sent events, or lines of JSON.

A response of our own, as sse-starlette ends its streams when the server is told to end, and here answers
under way are finished first; and as whatever happens to the connection, the answer must be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pocketlm.server.errors import ApiError, api_error, error_object, shape_of

PING_S = 15.0
"""What lies in between may drop a connection that says nothing for longer; long prompts take longer."""


class Closing(Protocol):
    async def close(self) -> None: ...


def json_bytes(value: object) -> bytes:
    """JSON as UTF-8. Half a surrogate pair, which a model may write as an escape, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def event(data: object, name: str | None = None) -> bytes:
    """A server-sent event with JSON as its data (HTML standard, section 9.2)."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(data) + b"\n\n"


def line(data: object) -> bytes:
    """A line of newline-delimited JSON."""
    return json_bytes(data) + b"\n"


class EventStream(Response):
    """Sends `chunks` as they come. However it ends, it ends `answers`: within a step of the engine when the
    client goes away."""

    media_type = "text/event-stream"
    ping: bytes | None = b": ping\n\n"

    def __init__(
        self,
        answers: Closing,
        chunks: AsyncIterator[bytes],
        *,
        send_timeout_s: float,
        failed: Callable[[ApiError], bytes] | None = None,
        ping_s: float = PING_S,
    ) -> None:
        """`failed` is the last chunk of an answer that breaks off; by default an event with the error.
        A client that takes nothing for `send_timeout_s` is given up."""
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers = answers
        self._chunks = chunks
        self._send_timeout_s = send_timeout_s
        self._failed = failed
        self._ping_s = ping_s
        self._sent_at = time.monotonic()
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.create_task(self._write(scope["path"], send)),
            asyncio.create_task(disconnected(receive)),
            asyncio.create_task(self._keep_alive(send)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(Exception):
                await asyncio.gather(*tasks, return_exceptions=True)
            await self._answers.close()

    async def _write(self, path: str, send: Send) -> None:
        async with self._sending:
            await self._send(
                send, type="http.response.start", status=self.status_code, headers=self.raw_headers
            )
        try:
            async for chunk in self._chunks:
                await self._send_chunk(send, chunk)
        except (OSError, TimeoutError):  # the client's connection: nobody can be told
            raise
        except Exception as error:
            await self._send_chunk(send, self._last_words(api_error(error), path))
        await self._send(send, type="http.response.body", body=b"", more_body=False)

    def _last_words(self, error: ApiError, path: str) -> bytes:
        return event(error_object(error, shape_of(path))) if self._failed is None else self._failed(error)

    async def _keep_alive(self, send: Send) -> None:
        while self.ping is not None:
            silent_s = time.monotonic() - self._sent_at
            if silent_s >= self._ping_s:
                await self._send_chunk(send, self.ping)
            await asyncio.sleep(max(self._ping_s - silent_s, self._ping_s / 4))
        await asyncio.Event().wait()

    async def _send_chunk(self, send: Send, chunk: bytes) -> None:
        async with self._sending:
            await self._send(send, type="http.response.body", body=chunk, more_body=True)
        self._sent_at = time.monotonic()

    async def _send(self, send: Send, **message: Any) -> None:
        async with asyncio.timeout(self._send_timeout_s):
            await send(message)


class LineStream(EventStream):
    """Newline-delimited JSON, which has no comments to keep a connection alive with."""

    media_type = "application/x-ndjson"
    ping = None


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
