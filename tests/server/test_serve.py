"""The process that listens: real sockets, real signals, tiny applications."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from helpers import serve_process
from helpers.processes import ROOT, wait_for
from pocketlm.server import http_protocol
from pocketlm.server import serve as serve_module
from pocketlm.server.access_log import ACCESS_LOGGER, PROMPTS_LOGGER, configure_logging
from pocketlm.server.config import ServerConfig
from pocketlm.server.security import protect
from pocketlm.server.serve import ListenError, StoppedError, listen, serve, url_of

PATIENCE_S = 20.0
SHORT_S = 0.15
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


class Tiny:
    """An application, and what becomes of it."""

    def __init__(self, **config: Any) -> None:
        self.config = ServerConfig(port=0, **config)
        self.events: list[str] = []
        self.streaming = threading.Event()
        self.finish = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/echo", self._echo, methods=["POST"]),
                Route("/v1/stream", self._stream),
                Route("/v1/flood", self._flood),
                Route("/v1/stuck", self._stuck),
            ],
            lifespan=self._lifespan,
        )
        self.app.state.service = SimpleNamespace(state="loading")
        protect(self.app, self.config)

    @property
    def state(self) -> str:
        return self.app.state.service.state

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.events.append("opened")
        yield
        self.events.append("closed")

    async def _health(self, _: Request) -> Response:
        return PlainTextResponse(self.state)

    async def _echo(self, request: Request) -> Response:
        return Response(await request.body())

    async def _stream(self, _: Request) -> Response:
        """Begins, and ends when it is told to."""

        async def chunks() -> AsyncIterator[bytes]:
            yield b"begun "
            self.streaming.set()
            while not self.finish.is_set():
                await asyncio.sleep(0.01)
            yield b"ended"

        return StreamingResponse(chunks())

    async def _flood(self, _: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)
            finally:
                self.events.append("flood ended")

        return StreamingResponse(chunks())

    async def _stuck(self, _: Request) -> Response:
        self.streaming.set()
        await asyncio.Event().wait()
        raise AssertionError

    def serve(self, client: Callable[[str], Any], **options: Any) -> Any:
        """What `client` gives, called in a thread with the URL of a server, which SIGTERM ends then."""
        outcome: list[Any] = []

        def run(url: str) -> None:
            try:
                outcome.extend([client(url), None])
            except BaseException as error:
                outcome.extend([None, error])
            finally:
                self.finish.set()
                end()

        def ready(url: str) -> None:
            threading.Thread(target=run, args=(url,)).start()

        serve(self.config, lambda: self.app, ready=ready, **options)
        wait_for(lambda: len(outcome) == 2)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def end() -> None:
    """SIGTERM for this process, which a server takes that runs in its main thread."""
    if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
        os.kill(os.getpid(), signal.SIGTERM)


def connect(url: str) -> socket.socket:
    target = httpx.URL(url)
    return socket.create_connection((target.host, target.port), timeout=PATIENCE_S)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def read_answer(connection: socket.socket) -> bytes:
    """One answer with its Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:")
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def test_it_listens_where_it_says() -> None:
    tiny, told = Tiny(), []

    def client(url: str) -> httpx.Response:
        told.append(url)
        return httpx.get(f"{url}/health")

    answer = tiny.serve(client, listening=told.append)
    assert answer.text == "ready"
    assert told[0] == told[1]
    assert told[0].startswith("http://127.0.0.1:")
    assert "server" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert tiny.events == ["opened", "closed"]
    assert tiny.state == "draining"


def test_ipv6() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    assert Tiny(host="::1").serve(lambda url: httpx.get(f"{url}/health").text) == "ready"
    with listen(ServerConfig(host="::", port=0, api_keys=("key",))) as both:
        assert url_of(both).startswith("http://[::1]:")
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, both.getsockname()[1]), timeout=PATIENCE_S).close()


def test_a_person_is_shown_an_address_that_works() -> None:
    with listen(ServerConfig(host="0.0.0.0", port=0, api_keys=("key",))) as everywhere:
        assert url_of(everywhere).startswith("http://127.0.0.1:")
    with listen(ServerConfig(host="localhost", port=0)) as named:
        assert url_of(named).startswith("http://127.0.0.1:")


def test_an_address_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match=rf"port {port} .* in use.*--port"):
            serve(ServerConfig(port=port), lambda: Starlette())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "no address models.lan.*--host"),
        (OSError(errno.EADDRNOTAVAIL, "not available"), "no address models.lan.*--host"),
        (PermissionError(errno.EACCES, "denied"), "1024"),
        (OSError(errno.ENOBUFS, "no buffer space"), "no buffer space"),
    ],
)
def test_an_address_that_cannot_be_had(error: OSError, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ListenError, match=told):
        listen(ServerConfig(host="models.lan", port=80, api_keys=("key",)))


def test_it_answers_while_it_loads() -> None:
    tiny, order = Tiny(), []
    made, loaded = threading.Event(), threading.Event()
    urls: list[str] = []

    def make_app() -> Starlette:
        order.append("make")
        assert made.wait(PATIENCE_S)
        return tiny.app

    async def load(app: Starlette) -> None:
        order.append("load")
        while not loaded.is_set():
            await asyncio.sleep(0.01)

    def ask() -> None:
        url = urls[0]
        try:
            wait_for(lambda: bool(order))
            for path in ("/health", "/v1/models"):
                answer = httpx.get(url + path)
                seen.append((answer.status_code, answer.json()["error"]["message"]))
            page = httpx.get(f"{url}/", headers={"Accept": "text/html,*/*"})
            seen.append((page.headers["refresh"], "Quantizing: 35 %" in page.text))
            made.set()
            wait_for(lambda: "load" in order)
            seen.append(httpx.get(f"{url}/health").text)
            loaded.set()
            wait_for(lambda: "ready" in order)
            seen.append(httpx.get(f"{url}/health").text)
        finally:
            made.set()
            loaded.set()
            end()

    seen: list[Any] = []
    client = threading.Thread(target=ask)

    def listening(url: str) -> None:
        urls.append(url)
        client.start()

    serve(
        tiny.config,
        make_app,
        load=load,
        listening=listening,
        lock=lambda: order.append(f"lock while {tiny.state}"),
        ready=lambda url: order.append("ready"),
        phase=lambda: "Quantizing: 35 %",
    )
    client.join(PATIENCE_S)
    assert seen == [(503, "Loading model"), (503, "Loading model"), ("1", True), "loading", "ready"]
    assert order == ["make", "load", "lock while loading", "ready"]


@pytest.mark.parametrize("step", ["make_app", "load", "lock", "ready"])
def test_a_start_that_fails_ends_the_server_with_its_error(step: str) -> None:
    tiny = Tiny()

    def fail(*_: Any) -> Any:
        raise MemoryError(step)

    async def fail_later(_: Any) -> None:
        fail()

    steps = {"make_app": lambda: tiny.app, step: fail_later if step == "load" else fail}
    with pytest.raises(MemoryError, match=step):
        serve(tiny.config, **steps)
    assert tiny.events == ([] if step == "make_app" else ["opened", "closed"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_a_signal_breaks_off_can_clean_up(number: signal.Signals) -> None:
    stopping, events = threading.Event(), []

    def make_app() -> Starlette:
        try:
            os.kill(os.getpid(), number)
            assert stopping.wait(PATIENCE_S)
            raise InterruptedError("as the work's progress raises")
        finally:
            time.sleep(SHORT_S)
            events.append("cleaned up")

    with pytest.raises(StoppedError, match="before the server was ready") as caught:
        serve(ServerConfig(port=0), make_app, stopping=stopping)
    assert caught.value.signal_number == number
    assert events == ["cleaned up"]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_start_that_does_not_end_is_given_up(signals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, or at the second signal."""
    monkeypatch.setattr(serve_module, "STOP_S", SHORT_S if signals == 1 else 600.0)
    stopping, over = threading.Event(), threading.Event()

    def make_app() -> Starlette:
        end()
        assert stopping.wait(PATIENCE_S)
        if signals == 2:
            end()
        over.wait(PATIENCE_S)
        raise AssertionError("nobody waits for this any more")

    with pytest.raises(StoppedError):
        serve(ServerConfig(port=0), make_app, stopping=stopping)
    assert not over.is_set()
    over.set()


def test_a_signal_while_the_model_is_loaded() -> None:
    tiny = Tiny()

    async def load(_: Starlette) -> None:
        end()
        await asyncio.Event().wait()

    with pytest.raises(StoppedError):
        serve(tiny.config, lambda: tiny.app, load=load)
    assert tiny.events == ["opened", "closed"]


@pytest.mark.parametrize("sent", [b"", GET], ids=["nothing", "half a head"])
@pytest.mark.parametrize("answered", [False, True])
def test_a_head_that_does_not_come_is_not_waited_for(
    sent: bytes, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "KEEP_ALIVE_S", SHORT_S)

    def client(url: str) -> bytes:
        with connect(url) as connection:
            if answered:
                connection.sendall(GET + b"\r\n")
                read_answer(connection)
            connection.sendall(sent)
            return read_all(connection)

    assert Tiny(body_timeout_s=SHORT_S).serve(client) == b""


def test_a_head_in_drips_is_not_waited_for() -> None:
    def client(url: str) -> None:
        with connect(url) as connection:
            connection.sendall(GET)
            drip(connection)

    Tiny(body_timeout_s=SHORT_S).serve(client)


def drip(connection: socket.socket) -> None:
    """Sends a byte now and then, until the server has closed the connection."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            connection.sendall(b"x")
        except OSError:
            return
        time.sleep(SHORT_S / 4)
    raise TimeoutError("the connection stayed open")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    def client(url: str) -> bytes:
        with connect(url) as connection:
            connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf")
            return read_all(connection)

    answer = Tiny(body_timeout_s=SHORT_S).serve(client)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


def test_a_client_that_sends_too_much_can_read_why() -> None:
    def client(url: str) -> tuple[int, int]:
        declared = httpx.post(f"{url}/v1/echo", content=b"x" * (4 << 20))
        chunked = httpx.post(f"{url}/v1/echo", content=(b"x" * 65536 for _ in range(64)))
        return declared.status_code, chunked.status_code

    assert Tiny(max_body_bytes=1000).serve(client) == (413, 413)


def test_a_client_that_does_not_read_is_given_up() -> None:
    tiny = Tiny(send_timeout_s=SHORT_S)

    def client(url: str) -> None:
        with connect(url) as connection:
            connection.sendall(b"GET /v1/flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: "flood ended" in tiny.events)

    tiny.serve(client)


def test_a_client_that_reads_slowly_is_not_given_up() -> None:
    """Its pauses are shorter than the limit, all of them together are longer."""

    def client(url: str) -> int:
        with connect(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.sendall(b"GET /v1/flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
            read, until = 0, time.monotonic() + 1.0
            while time.monotonic() < until:
                read += len(connection.recv(1 << 20))
                time.sleep(0.01)
            return read

    assert Tiny(send_timeout_s=0.5).serve(client) > 1 << 20


def test_a_large_answer_over_a_slow_line_is_not_given_up() -> None:
    """The client always reads, and for longer than the limit there is always something left for it."""
    size = 16 << 20  # more than the kernel keeps

    def client(url: str) -> int:
        with connect(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
            connection.sendall(f"Content-Length: {size}\r\n\r\n".encode() + b"x" * size)
            read = 0
            while part := connection.recv(1 << 18):
                read += len(part)
                time.sleep(0.01)
            return read

    assert Tiny(send_timeout_s=0.2, max_body_bytes=size).serve(client) > size


def test_so_many_connections_and_no_more() -> None:
    most = http_protocol.IDLE_SHARE * 2

    def client(url: str) -> tuple[bytes, bytes]:
        idle = [connect(url) for _ in range(most)]
        try:
            with connect(url) as one_more:
                refused = read_all(one_more)
            idle[0].sendall(GET + b"\r\n")
            return refused, read_answer(idle[0])
        finally:
            for connection in idle:
                connection.close()

    refused, answer = Tiny(max_connections=2).serve(client)
    assert refused.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 1" in refused
    assert answer.startswith(b"HTTP/1.1 200")


def test_nonsense_is_a_bad_request() -> None:
    def client(url: str) -> list[bytes]:
        answers = []
        for nonsense in (b"\0\xff nonsense\r\n\r\n", GET + b"x" * 20_000, b"GET / HTTP/1.1\r\n\r\n"):
            with connect(url) as connection:
                connection.sendall(nonsense)
                answers.append(read_all(connection))
        return answers

    for answer in Tiny().serve(client):
        assert answer.startswith(b"HTTP/1.1 400")


def test_answers_under_way_are_finished() -> None:
    tiny = Tiny()

    def client(url: str) -> tuple[bytes, bytes]:
        with connect(url) as idle, connect(url) as busy:
            idle.sendall(GET + b"\r\n")
            read_answer(idle)
            busy.sendall(b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert tiny.streaming.wait(PATIENCE_S)
            end()
            wait_for(lambda: tiny.state == "draining")
            rest = read_all(idle)
            with pytest.raises(ConnectionRefusedError):
                connect(url)
            tiny.finish.set()
            return rest, read_all(busy)

    # The signal that `serve` sends at the end would be the second one.
    rest, answer = serve_until_it_ends_itself(tiny, client)
    assert rest == b""
    assert b"begun " in answer
    assert b"ended" in answer
    assert answer.endswith(b"0\r\n\r\n")
    assert tiny.events == ["opened", "closed"]


def test_answers_that_take_too_long_are_cut_off() -> None:
    tiny = Tiny(drain_s=SHORT_S)

    def client(url: str) -> tuple[bytes, bytes]:
        with connect(url) as begun, connect(url) as stuck:
            stuck.sendall(b"GET /v1/stuck HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert tiny.streaming.wait(PATIENCE_S)
            tiny.streaming.clear()
            begun.sendall(b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert tiny.streaming.wait(PATIENCE_S)
            end()
            return read_all(begun), read_all(stuck)

    begun, stuck = serve_until_it_ends_itself(tiny, client)
    assert b"begun " in begun
    assert not begun.endswith(b"0\r\n\r\n"), "the client can tell that it is not whole"
    assert stuck.startswith(b"HTTP/1.1 503")
    assert b"draining" in stuck
    assert tiny.events == ["opened", "closed"]


def serve_until_it_ends_itself(tiny: Tiny, client: Callable[[str], Any]) -> Any:
    """What `client` gives, which ends the server."""
    outcome: list[Any] = []
    threads: list[threading.Thread] = []

    def run(url: str) -> None:
        try:
            outcome.append(client(url))
        finally:
            tiny.finish.set()

    def ready(url: str) -> None:
        threads.append(threading.Thread(target=run, args=(url,)))
        threads[0].start()

    serve(tiny.config, lambda: tiny.app, ready=ready)
    threads[0].join(PATIENCE_S)
    return outcome[0]


@contextmanager
def process(drain_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """helpers/serve_process.py, and its URL."""
    paths = [str(ROOT / folder) for folder in ("models", "runtime", "tests")]
    with subprocess.Popen(
        [sys.executable, str(Path(serve_process.__file__)), str(drain_s)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def test_a_drained_process_has_succeeded() -> None:
    with process(drain_s=0.2) as (server, url), httpx.stream("GET", f"{url}/endless") as answer:
        pieces = answer.iter_raw()
        next(pieces)
        server.send_signal(signal.SIGINT)
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
        assert server.wait(PATIENCE_S) == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    with process(drain_s=600) as (server, url), httpx.stream("GET", f"{url}/endless") as answer:
        pieces = answer.iter_raw()
        next(pieces)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: not takes_connections(url))
        assert next(pieces), "answers go on meanwhile"
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == -signal.SIGTERM


def takes_connections(url: str) -> bool:
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_log_has_a_line_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    tiny = Tiny(api_keys=("sk-secret",))

    def client(url: str) -> None:
        httpx.post(f"{url}/v1/echo?key=sk-secret", content=b"a prompt", headers={"x-api-key": "sk-secret"})
        httpx.get(f"{url}/v1/a%0Aline?x=sk-secret")
        with httpx.stream("GET", f"{url}/v1/flood", headers={"x-api-key": "sk-secret"}):
            pass
        wait_for(lambda: len(caplog.messages) == 3)

    with caplog.at_level(logging.INFO, logger=ACCESS_LOGGER):
        tiny.serve(client)
    lines = [line.rpartition(" s")[0].rpartition(" ")[0] for line in caplog.messages]
    assert lines == [
        "127.0.0.1 POST /v1/echo 200",
        "127.0.0.1 GET /v1/a%0Aline 401",
        "127.0.0.1 GET /v1/flood 200",
    ]
    assert caplog.messages[2].endswith("broken off")
    assert "secret" not in caplog.text
    assert "prompt" not in caplog.text


def test_log_levels(capsys: pytest.CaptureFixture[str], restored_logging: None) -> None:
    configure_logging("warning")
    logging.getLogger(ACCESS_LOGGER).info("a request")
    logging.getLogger("pocketlm.server").warning("a remark")
    logging.getLogger("uvicorn.error").warning("nonsense came")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["WARNING a remark"]


def test_prompts_are_logged_at_any_level(capsys: pytest.CaptureFixture[str], restored_logging: None) -> None:
    configure_logging("error")
    logging.getLogger(PROMPTS_LOGGER).info("a prompt")
    assert "a prompt" in capsys.readouterr().err


def test_the_log_goes_where_standard_error_is_at_the_moment(
    monkeypatch: pytest.MonkeyPatch, restored_logging: None
) -> None:
    configure_logging("info")
    for_bars = io.StringIO()  # as rich has one while it draws
    monkeypatch.setattr("sys.stderr", for_bars)
    logging.getLogger(ACCESS_LOGGER).info("a request")
    assert for_bars.getvalue().endswith(" INFO a request\n")


def test_a_log_that_cannot_be_written_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, restored_logging: None
) -> None:
    configure_logging("info")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    monkeypatch.setattr("logging.raiseExceptions", False)
    logging.getLogger(ACCESS_LOGGER).info("a request")


@pytest.fixture
def restored_logging() -> Iterator[None]:
    names = ("pocketlm", "uvicorn", PROMPTS_LOGGER)
    before = [(log, log.handlers, log.propagate, log.level) for log in map(logging.getLogger, names)]
    yield
    for log, handlers, propagate, level in before:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)
