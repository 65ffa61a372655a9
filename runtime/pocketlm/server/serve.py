"""The process that listens: one address, a model loaded while it already answers, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import FrameType
from typing import TypeVar, cast

import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pocketlm.errors import PocketlmError
from pocketlm.server.access_log import AccessLog
from pocketlm.server.config import ServerConfig
from pocketlm.server.errors import error_response
from pocketlm.server.http_protocol import http_protocol
from pocketlm.server.security import SecurityHeaders
from pocketlm.server.watched_send import WatchedSend

T = TypeVar("T")

KEEP_ALIVE_S = 30
"""A connection without a request is closed after this. Longer than what usual clients keep theirs open, as
otherwise one is closed while a request is on its way."""

BACKLOG = 512
"""Connections that the kernel holds until they are accepted."""

CUT_OFF_S = 2.0
"""For answers that are cut off, to give back what they hold."""

STOP_S = 5.0
"""For a start that is cut off, to end its step and remove its temporary files."""

_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


class ListenError(PocketlmError):
    """The address cannot be listened on."""


class StoppedError(PocketlmError):
    """SIGTERM or SIGINT came before the server was ready.

    Threads of the start may still run. Native code in them aborts an interpreter that ends as usual, so the
    process had better end with `os._exit`.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("Stopped before the server was ready.")
        self.signal_number = signal_number


def listen(config: ServerConfig) -> socket.socket:
    """A socket that takes connections at `config.host` and `config.port`. Raises ListenError."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may stand for both kinds of address; clients that are not told try the older one too.
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(
            cast(tuple[str, int], address),
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=config.host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise ListenError(_why_not(error, config)) from error


def _why_not(error: OSError, config: ServerConfig) -> str:
    at = f"port {config.port} at {config.host}"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"this machine has no address {config.host}. Give one of its own with --host."
    if error.errno == errno.EADDRINUSE:
        return (
            f"{at} is in use, perhaps by another pocketlm serve. Choose another one with --port, or any free "
            "one with --port 0."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{at} may not be listened on by this user. Choose a port from 1024 on with --port."
    return f"{at} cannot be listened on: {error.strerror or error}."


def url_of(listening: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listening.getsockname()[:2]
    host = _ANY_ADDRESS.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def serve(
    config: ServerConfig,
    make_app: Callable[[], Starlette],
    *,
    load: Callable[[Starlette], Awaitable[None]] | None = None,
    listening: Callable[[str], None] = lambda url: None,
    lock: Callable[[], None] = lambda: None,
    ready: Callable[[str], None] = lambda url: None,
    phase: Callable[[], str] = lambda: "",
    stopping: threading.Event | None = None,
) -> None:
    """Listens until SIGTERM or SIGINT comes, then lets answers under way end and returns.

    Requests meet a 503 until `make_app` has given the application, for which it has a thread of its own and
    all the time that it takes; then `load` is awaited, `lock` called, and `app.state.service.state` becomes
    "ready". `listening` is told the server's URL before all that, and `ready` behind it.

    After the signal the state is "draining": no connection is taken any more, and what is still under way
    after `config.drain_s` is cut off. A second signal ends the process at once.

    `phase` tells a person who opens the page before there is an application what is done meanwhile.

    `stopping` is set once that has begun. A `make_app` that is under way should look at it often and raise;
    it is waited for, up to STOP_S or a second signal.

    Raises ListenError, StoppedError if the signal came before the server was ready, and what `make_app`,
    `load`, `lock` and `ready` raise.
    """
    with listen(config) as sock:
        url = url_of(sock)
        listening(url)
        gate = _Gate(phase)
        server = _Server(
            config, gate, make_app, load, lock, lambda: ready(url), stopping or threading.Event()
        )
        server.run(sockets=[sock])
    if server.failure is not None:
        raise server.failure
    if server.signal_number is not None and not server.was_ready:
        raise StoppedError(server.signal_number)


class _Server(uvicorn.Server):
    failure: Exception | None = None
    signal_number: int | None = None
    was_ready = False

    def __init__(
        self,
        config: ServerConfig,
        gate: _Gate,
        make_app: Callable[[], Starlette],
        load: Callable[[Starlette], Awaitable[None]] | None,
        lock: Callable[[], None],
        ready: Callable[[], None],
        stopping: threading.Event,
    ) -> None:
        self._gate = gate
        self._make_app = make_app
        self._load = load
        self._lock = lock
        self._ready = ready
        self._stopping = stopping
        self._maker: threading.Thread | None = None
        self._hurried = False
        self._lifespan = AsyncExitStack()
        super().__init__(
            uvicorn.Config(
                AccessLog(SecurityHeaders(self._gate)),
                http=http_protocol(config),
                loop="asyncio",
                ws="none",
                lifespan="off",  # the application's begins when there is one
                interface="asgi3",
                workers=1,
                log_config=None,
                access_log=False,
                proxy_headers=False,  # anybody can write them
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=cast(int, config.drain_s),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and (self._hurried or not self.is_making):
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._hurried = self.should_exit
        self.signal_number = self.signal_number or sig
        self.should_exit = True  # uvicorn's own would end the process with this signal after the drain

    @property
    def is_making(self) -> bool:
        """Whether `make_app` is under way."""
        return self._maker is not None and self._maker.is_alive()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        try:
            self._maker, made = _in_thread(self._make_app)
            app = await made
            await self._lifespan.enter_async_context(app.router.lifespan_context(app))
            self._gate.app = app
            if self._load is not None:
                await self._load(app)
            self._lock()
            app.state.service.state = "ready"
            self.was_ready = True
            self._ready()
        except Exception as error:
            self.failure = error
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        self._starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._starting
        if self._gate.app is not None:
            self._gate.app.state.service.state = "draining"
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CUT_OFF_S)
        await self._lifespan.aclose()
        await self._end_making()

    async def _end_making(self) -> None:
        deadline = time.monotonic() + STOP_S
        while self.is_making and not self._hurried and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


class _Gate:
    """Passes requests on to the application, and answers in its place before there is one and when the end of
    the server cuts a request off."""

    def __init__(self, phase: Callable[[], str]) -> None:
        self.app: Starlette | None = None
        self._phase = phase

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is None:
            await _loading(scope, self._phase())(scope, receive, send)
            return
        watch = WatchedSend(send)
        try:
            await self.app(scope, receive, watch)
        except asyncio.CancelledError:
            if not watch.begun:
                await _ending(scope)(scope, receive, send)


def _loading(scope: Scope, phase: str) -> ASGIApp:
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    if scope["method"] == "GET" and b"text/html" in accepted:
        text = f"The chat opens here as soon as the model is ready.\n\n{phase or 'Loading'} …\n"
        return PlainTextResponse(text, 503, {"Refresh": "1", "Retry-After": "1"})
    return _unavailable(scope, "Loading model", "loading")


def _ending(scope: Scope) -> Response:
    return _unavailable(scope, "The server has ended before this was answered.", "draining")


def _unavailable(scope: Scope, message: str, code: str) -> Response:
    return error_response(scope["path"], 503, message, code=code, headers={"Retry-After": "1"})


def _in_thread(function: Callable[[], T]) -> tuple[threading.Thread, asyncio.Future[T]]:
    """A thread for `function`, and what that returns. The process does not wait for it: a download that is no
    longer wanted must not hold up its end, and asyncio's own threads do."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def run() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = function(), None
        except BaseException as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    thread = threading.Thread(target=run, name="pocketlm-start", daemon=True)
    thread.start()
    return thread, future
