"""Clients of an OpenAI-compatible server, hundreds in one event loop: HTTP/1.1 over asyncio's streams.

Each request has a connection of its own, as the requests of different people have.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pocketlm_benchmarks.engines.http_json import parse_url
from pocketlm_benchmarks.engines.protocol import EngineError

MAX_LINE_BYTES = 1 << 24


@dataclass(frozen=True)
class Answered:
    """What became of a request. Times are None where there was no token, or too few of them."""

    status: int  # 0: the connection broke
    tokens: int = 0
    ttft_s: float | None = None
    token_s: float | None = None  # for each token behind the first
    text: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200


class Client:
    """Of a server at `http://HOST[:PORT][/BASE]`; BASE is /v1 unless the URL has one."""

    def __init__(self, url: str) -> None:
        """Raises EngineError for a URL that is none, and for https."""
        try:
            secure, self._host, port, path = parse_url(url)
        except ValueError as error:
            raise EngineError(str(error)) from None
        if secure:
            raise EngineError(
                f"{url} is https; these clients speak http alone. Use the server's own address."
            )
        self.port = port or 80
        self._base = path.rstrip("/") or "/v1"

    async def chat(self, body: Mapping[str, Any], *, pause_s: float = 0.0, leave_after: int = 0) -> Answered:
        """A streamed answer, counted by the server's own `usage`. The reader waits `pause_s` behind each
        event, and goes away behind `leave_after` of them (0: never)."""
        asked, first, last, tokens, texts, seen = time.perf_counter(), None, 0.0, 0, [], 0
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with contextlib.suppress(OSError, EOFError):
            async with self._post("/chat/completions", {**body, **options}) as (status, chunks):
                if status != 200:
                    return Answered(status)
                async for event in _events(chunks):
                    last = time.perf_counter()
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    content = "".join(
                        each["delta"].get("content") or "" for each in event.get("choices") or ()
                    )
                    texts.append(content)
                    if content:
                        first, last_content = first or last, last
                        seen += 1
                    if leave_after and seen >= leave_after:
                        return Answered(200, seen, None if first is None else first - asked)
                    if pause_s:
                        await asyncio.sleep(pause_s)
                if first is None:
                    return Answered(200, tokens)
                token_s = (last_content - first) / (tokens - 1) if tokens > 1 else None
                return Answered(200, tokens, first - asked, token_s, "".join(texts))
        return Answered(0)

    async def post(self, path: str, body: Mapping[str, Any] | bytes) -> tuple[int, Any]:
        """The status and the JSON of a whole answer; (0, None) where the connection broke or it is none."""
        with contextlib.suppress(OSError, EOFError, ValueError):
            async with self._post(path, body) as (status, chunks):
                return status, json.loads(b"".join([chunk async for chunk in chunks]))
        return 0, None

    @asynccontextmanager
    async def _post(
        self, path: str, body: Mapping[str, Any] | bytes
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {self._base}{path} HTTP/1.1\r\nHost: {self._host}:{self.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(self._host, self.port, limit=MAX_LINE_BYTES)
        try:
            writer.write(head.encode("ascii") + content)
            lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            status = int(lines[0].split()[1])
            chunked = any(each.startswith(b"transfer-encoding:") and b"chunked" in each for each in lines)
            yield status, _chunks(reader) if chunked else _rest(reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """RFC 9112, section 7.1."""
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    yield await reader.read()


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events until `[DONE]`. Raises EOFError for a stream that ends before."""
    data = b""
    async for chunk in chunks:
        *lines, data = (data + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                text = line.removeprefix(b"data:").strip()
                if text == b"[DONE]":
                    return
                yield json.loads(text)
    raise EOFError
