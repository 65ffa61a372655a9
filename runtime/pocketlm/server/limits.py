"""How much of it: requests at once, and how large a body may be and how long it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pocketlm.files import readable_size
from pocketlm.server.config import ServerConfig
from pocketlm.server.errors import error_response
from pocketlm.server.metrics import Refusal
from pocketlm.server.open_paths import is_open

Refused = Callable[[Refusal], None]
"""Is told of each request that is not let in."""

RETRY_AFTER_S = 1

LINGER_S = 2.0
LINGER_BYTES = 64 << 20
"""What is still read, and thrown away, of a body that is too large: a client that sends before it reads would
otherwise meet a broken connection instead of the answer."""

_CLOSE = {"Connection": "close"}


def ignored(reason: Refusal) -> None:
    """Counts nothing."""


class RequestLimit:
    """`config.max_connections` requests at once: 503 beyond. Open paths answer at once, so they do not count:
    /health says that the server is well when it is full."""

    def __init__(self, app: ASGIApp, config: ServerConfig, refused: Refused = ignored) -> None:
        self._app = app
        self._refused = refused
        self._most = config.max_connections
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        if self._under_way >= self._most:
            self._refused("too_many")
            message = f"The server is at work on {self._most:,} requests, the most it takes. Try again later."
            headers = {**_CLOSE, "Retry-After": str(RETRY_AFTER_S)}
            response = error_response(scope["path"], 503, message, code="too_many_requests", headers=headers)
            await response(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1


class BodyLimit:
    """Reads a request's body before anything else is done for it: 413 if it is larger than
    `config.max_body_bytes`, 408 if it has not come after `config.body_timeout_s`."""

    def __init__(self, app: ASGIApp, config: ServerConfig, refused: Refused = ignored) -> None:
        self._app = app
        self._refused = refused
        self._most = config.max_body_bytes
        self._timeout_s = config.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            if _declared_size(scope) > self._most:
                raise _TooLargeError
            async with asyncio.timeout(self._timeout_s):
                if not await self._read(receive, body):
                    return  # the client has gone
        except _TooLargeError:
            self._refused("too_large")
            await _answer_early(self._too_large(scope), scope, receive, send)
        except TimeoutError:
            self._refused("timeout")
            message = f"The request's body had not come after {self._timeout_s:g} s."
            response = error_response(scope["path"], 408, message, code="request_timeout", headers=_CLOSE)
            await response(scope, receive, send)
        else:
            await self._app(scope, _replay(bytes(body), receive), send)

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Appends all of it to `body`; False if the client has gone before."""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return False
            body += message.get("body", b"")
            if len(body) > self._most:
                raise _TooLargeError
            if not message.get("more_body", False):
                return True

    def _too_large(self, scope: Scope) -> Response:
        size = _declared_size(scope)
        message = (
            f"The request's body is {readable_size(size) if size else 'larger'}; this server takes "
            f"{readable_size(self._most)} at most. Send less, or start it with a larger --max-body."
        )
        return error_response(scope["path"], 413, message, code="request_too_large", headers=_CLOSE)


class _TooLargeError(Exception):
    pass


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _declared_size(scope: Scope) -> int:
    """Bytes, as Content-Length has them; 0 where the body comes in chunks."""
    for name, value in scope["headers"]:
        # Not more digits than a number is quickly made of; whoever has read the head has checked the rest.
        if name == b"content-length":
            return int(value) if len(value) < 20 and value.isdigit() else 10**20
    return 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one piece, and then what comes after it."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def _answer_early(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends a whole answer while the body is still coming, and leaves the connection open until the client
    has had the time to read it: the kernel drops what was sent when a connection closes with bytes unread."""

    async def send_without_end(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "more_body": True}  # Content-Length tells the client that this is all
        await send(message)

    await response(scope, receive, send_without_end)
    thrown_away = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while thrown_away <= LINGER_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
                thrown_away += len(message.get("body", b""))
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
