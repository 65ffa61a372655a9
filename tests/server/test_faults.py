"""What a client can do wrong, or to others: each request is refused or given up, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.processes import wait_for
from helpers.serving import Running, running
from helpers.steps import Steps
from pocketlm.generate import READ_AHEAD
from pocketlm.scheduler import Scheduler
from pocketlm.server.config import ServerConfig

WATCHDOG_S = 20.0
"""Against waiting for ever: nothing here takes near as long."""

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
ENDLESS: dict[str, Any] = {"messages": MESSAGES, "ignore_eos": True, "max_tokens": 400, "temperature": 1.0}
DEEP = 100_000


@pytest.fixture(scope="module")
def faulty(int8_bundle: Path, tools_bundle: Path) -> Iterator[Running]:
    """A server with short limits, two answers at once."""
    config = ServerConfig(port=0, body_timeout_s=0.5, send_timeout_s=0.5, answer_timeout_s=10.0)
    bundles = {"tiny": int8_bundle, "tiny-tools": tools_bundle}
    with running(bundles, config, concurrency=2, queue_limit=4) as server:
        assert post(server, fields()).status_code == 200  # the model is loaded
        yield server


@pytest.fixture
def alive(faulty: Running) -> Iterator[Running]:
    """The server, which behind the test has nothing to do any more, and answers."""
    yield faulty
    wait_for(lambda: load(faulty) == (0, 0))
    with faulty.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2})
        assert answer.status_code == 200


def load(server: Running) -> tuple[int, int]:
    """Answers under way, and those that wait, of all models; no use of a model that is left counts as one
    that waits."""
    states = server.service.store.states()
    return sum(each.running for each in states), sum(each.waiting for each in states)


# Bodies


def fields(**more: Any) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": 4, **more}).encode()


def field(name: str, text: str) -> bytes:
    """A request with one more field, whose JSON is `text`."""
    return f'{{"messages":{json.dumps(MESSAGES)},"max_tokens":4,"{name}":{text}}}'.encode()


def schema(text: str) -> bytes:
    form = f'{{"type":"json_schema","json_schema":{{"name":"x","schema":{text}}}}}'
    return field("response_format", form)


def tool(text: str) -> bytes:
    """A tool whose parameters are `text`."""
    tools = f'[{{"type":"function","function":{{"name":"f","parameters":{text}}}}}]'
    return field("tools", tools).replace(b"{", b'{"model":"tiny-tools",', 1)


def nested(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth


BAD_BODIES = {
    "nothing": b"",
    "broken": b'{"messages": [',
    "two values": b"{} {}",
    "a form": b"model=tiny&stream=true",
    "null": b"null",
    "a list": b"[]",
    "NUL bytes": b"\0" * 1000,
    "a NUL in a text": b'{"messages":[{"role":"user","content":"a\0b"}]}',
    "invalid UTF-8": b'{"messages":[{"role":"user","content":"\xff\xfe\xc0\x80"}]}',
    "a cut UTF-8 sequence": b'{"messages":[{"role":"user","content":"\xe2\x82"}]}',
    "half a surrogate pair": b'{"messages":[{"role":"user","content":"\\ud83d"}]}',
    "half a pair as a key": b'{"messages":[{"role":"user","content":"a"}],"\\ud83d":1}',
    "half a pair as a model": field("model", '"\\ud83d"'),
    "half a pair as a stop": field("stop", '"\\ud83d"'),
    "half a pair in a regex": field("regex", '"\\ud83d"'),
    "half a pair in a grammar": field("grammar", '"start: \\"\\ud83d\\""'),
    "half a pair in a schema": schema('{"enum":["\\ud83d"]}'),
    "half a pair in a tool": tool('{"enum":["\\ud83d"]}'),
    "a text for a number": fields(temperature="hot"),
    "a number for a text": fields(model=7),
    "1e400": field("temperature", "1e400"),
    "1e400 tokens": field("max_tokens", "1e400"),
    "1e999…": field("temperature", "1e" + "9" * 10_000),
    "a seed of many digits": field("seed", "1" * 100_000),
    "a temperature of many digits": field("temperature", "9" * 100_000),
    "NaN": field("temperature", "NaN"),
    "Infinity": field("top_p", "Infinity"),
    "-Infinity": field("logit_bias", '{"3":-Infinity}'),
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep messages": b'{"messages":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a deep schema": schema(nested(DEEP)),
    "a deep enum": schema(f'{{"enum":[{"[" * DEEP}{"]" * DEEP}]}}'),
    "a deep tool": tool(nested(DEEP)),
    "a rather deep schema": schema(nested(300)),
    "a rather deep tool": tool(nested(300)),
    "messages without end": fields(messages=MESSAGES * 100_000),
    "wrong messages without end": fields(messages=[{}] * 100_000),
    "fields without end": fields(**{f"field{n}": n for n in range(50_000)}),
    "tools without end": fields(tools=[{"type": "function", "function": {"name": "f"}}] * 20_000),
    "10,000 stops": fields(stop=[f"stop {n}" for n in range(10_000)]),
    "a stop of a million characters": fields(stop="x" * 1_000_000),
    "100,000 biases": fields(logit_bias={str(n): 1 for n in range(100_000)}),
    "a bias for no token": fields(logit_bias={"99999999": 1}),
    "a million answers": fields(n=1_000_000),
    "a prompt of a million characters": fields(messages=[{"role": "user", "content": "x" * 1_000_000}]),
}

BOMBS = {
    "a regex of a million characters": fields(regex="a" * 1_000_000),
    "deep brackets in a regex": fields(regex="(" * 8_000 + ")" * 8_000),
    "a regex that looks ahead": fields(regex="(?=a)b"),
    "a Lark rule without an end": fields(grammar='start: start "a"'),
    "a Lark token of itself": fields(grammar='start: A\nA: A "x"'),
    "deep brackets in Lark": fields(grammar="start: " + "(" * 8_000 + '"a"' + ")" * 8_000),
    "Lark rules without end": fields(grammar='start: "a"\n' + "".join(f"r{n}: /a/\n" for n in range(2_000))),
    "Lark tokens that double": fields(
        grammar="start: A0\n" + "".join(f"A{n}: A{n + 1} A{n + 1}\n" for n in range(60)) + 'A60: "x"\n'
    ),
    "Lark tokens of many tokens": fields(
        grammar="start: A\n"
        + "".join(f"{a}: {f'{b} ' * 8}\n" for a, b in zip("ABCDE", "BCDEF", strict=True))
        + "F: /[a-z]{0,100}/\n"
    ),
    "Lark rules that double": fields(
        grammar="start: r0\n" + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(500)) + 'r500: "x"\n'
    ),
    "a huge enum": schema(json.dumps({"enum": [f"value {n}" for n in range(150_000)]})),
    "$ref in a circle": schema('{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}'),
    "$ref to itself": schema('{"$ref":"#"}'),
    "$ref to elsewhere": schema('{"$ref":"http://192.0.2.1/schema"}'),
    "$ref to a file": schema('{"$ref":"file:///etc/passwd"}'),
    "many options of many": schema(
        json.dumps({"allOf": [{"anyOf": [{"required": [f"{n}{m}"]} for m in range(20)]} for n in range(20)]})
    ),
    "properties without end": schema(json.dumps({"properties": {f"p{n}": {} for n in range(20_000)}})),
    "a bound of many digits": schema(f'{{"type":"integer","minimum":{"1" * 400}}}'),
    "a bound that is none": schema('{"type":"number","maximum":1e400}'),
    "a pattern of many characters": schema(json.dumps({"type": "string", "pattern": "a?" * 100_000})),
}

HARMLESS = {
    "regex: nested repetitions": fields(regex="((((a{0,1000}){0,1000}){0,1000}){0,1000}){0,1000}"),
    "regex: catastrophic backtracking": fields(regex="(a+)+(a*)*(a|a)*b"),
    "regex: exponential states": fields(regex="(.*a.{20}){20}"),
    "regex: Unicode classes": fields(regex=r"\w{0,1000}\p{L}{0,1000}"),
    "Lark: nested repetitions": fields(grammar='start: (((("x"{0,1000}){0,1000}){0,1000}){0,1000})'),
    "Lark: ambiguous": fields(grammar='start: s\ns: s s s | s s | "a" |'),
    "schema: catastrophic backtracking": schema('{"type":"string","pattern":"^(a+)+$"}'),
    "schema: options that branch": schema(
        json.dumps(
            {
                "$ref": "#/$defs/d0",
                "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 8} for n in range(30)}
                | {"d30": {"type": "null"}},
            }
        )
    ),
    "schema: a billion items of a billion": schema(
        '{"type":"array","minItems":1000000000,"items":{"type":"array","minItems":1000000000}}'
    ),
    "a byte-order mark": b"\xef\xbb\xbf" + fields(),
    "UTF-16": fields().decode().encode("utf-16"),
    "a number with a million zeros": field("temperature", "0." + "0" * 1_000_000),
    "a key twice": b'{"messages":[],"messages":[{"role":"user","content":"a"}],"max_tokens":1}',
}


def post(server: Running, content: bytes, path: str = CHAT) -> httpx.Response:
    with httpx.Client(base_url=server.url, timeout=WATCHDOG_S, verify=False) as client:
        return client.post(path, content=content)


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in BAD_BODIES.items()])
def test_what_is_no_request_is_refused(alive: Running, body: bytes) -> None:
    answer = post(alive, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.content) < 2000


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in BOMBS.items()])
def test_a_grammar_bomb_is_refused(alive: Running, body: bytes) -> None:
    answer = post(alive, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in HARMLESS.items()])
def test_what_only_looks_dangerous_is_answered(alive: Running, body: bytes) -> None:
    """These forms cost little here, whatever they would cost elsewhere."""
    answer = post(alive, body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/api/chat", "/api/embed"]
)
@pytest.mark.parametrize(
    "name", ["invalid UTF-8", "deep objects", "a list", "a seed of many digits", "fields without end"]
)
def test_every_api_refuses_it(alive: Running, path: str, name: str) -> None:
    answer = post(alive, BAD_BODIES[name], path)
    assert answer.status_code == 400
    assert answer.json()["error"]


# HTTP itself


def exchange(server: Running, request: bytes, *, goes: bool = False) -> bytes:
    """What comes back on a connection of its own until the server closes it, or until nothing more will be
    sent if the client `goes`."""
    with connected(server) as connection, contextlib.suppress(ConnectionError):  # closed with bytes unread
        connection.sendall(request)
        if goes:
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)
    return b""


def connected(server: Running, **options: int) -> socket.socket:
    target = httpx.URL(server.url)
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(WATCHDOG_S)
    connection.connect((target.host, target.port))
    return connection


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    return data


def http(line: str, body: bytes = b"", *headers: str) -> bytes:
    head = [line, "Host: localhost", "Connection: close", *headers]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def http_post(body: bytes, *headers: str) -> bytes:
    return http(f"POST {CHAT} HTTP/1.1", body, *headers)


BROKEN_HTTP = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "a giant header": http("GET /health HTTP/1.1", b"", "X: " + "x" * 1_000_000),
    "headers without end": http("GET /health HTTP/1.1", b"", *(f"X{n}: {n}" for n in range(50_000))),
    "a giant query": http("GET /health?" + "x" * 1_000_000 + " HTTP/1.1"),
    "a NUL in a header": http("GET /health HTTP/1.1", b"", "X: a\0b"),
    "a space in a name": http("GET /health HTTP/1.1", b"", "X Y: a"),
    "a NUL in the path": http("GET /\0 HTTP/1.1"),
    "a version of HTTP that is none": http("GET /health HTTP/x"),
    "chunks of no size": http_post(b"xyz\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "a negative chunk": http_post(b"-1\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "an enormous chunk": http_post(b"f" * 40 + b"\r\nabc\r\n", "Transfer-Encoding: chunked"),
    "an unknown encoding": http_post(fields(), "Transfer-Encoding: gzip"),
    "a length in words": http_post(fields(), "Content-Length: ten"),
    "a negative length": http_post(fields(), "Content-Length: -5"),
    "two lengths": http_post(fields(), "Content-Length: 5", "Content-Length: 6"),
    "a length too small": http_post(fields(), "Content-Length: 5"),
    "a length of many digits": http_post(fields(), "Content-Length: " + "9" * 5000),
}


@pytest.mark.parametrize("request_", [pytest.param(each, id=name) for name, each in BROKEN_HTTP.items()])
@pytest.mark.filterwarnings("ignore")
def test_broken_http_is_refused(alive: Running, request_: bytes) -> None:
    answer = exchange(alive, request_)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:100]


def test_a_length_too_large_is_not_waited_for(alive: Running) -> None:
    request = http_post(fields(), "Content-Length: 100000")
    assert exchange(alive, request).startswith(b"HTTP/1.1 408")
    assert exchange(alive, request, goes=True) == b""  # a client that has gone is not answered


PATHS = [
    "/../../etc/passwd",
    "/page/../../../../etc/passwd",
    "/page/%2e%2e/%2e%2e/etc/passwd",
    "/page/..%2f..%2fetc%2fpasswd",
    "/page/vendor/..\\..\\main.js",
    "//etc/passwd",
    "/page//etc/passwd",
    "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
    "/v1/models/%2fetc%2fpasswd",
    "/%00",
    "/page/page.css%00.js",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file(alive: Running, path: str) -> None:
    answer = exchange(alive, http(f"GET {path} HTTP/1.1"))
    assert answer.startswith(b"HTTP/1.1 404"), answer[:100]
    assert b"root:" not in answer


@pytest.mark.parametrize("method", ["BREW", "PUT", "TRACE", "CONNECT"])
def test_unknown_methods_are_refused(alive: Running, method: str) -> None:
    assert exchange(alive, http(f"{method} {CHAT} HTTP/1.1")).startswith(b"HTTP/1.1 405")


def test_old_http_and_several_requests_at_once(alive: Running) -> None:
    old = exchange(alive, b"GET /v1/models HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert b" 200 " in old.split(b"\r\n")[0]
    first = http_post(fields(), f"Content-Length: {len(fields())}").replace(b"Connection: close\r\n", b"")
    both = exchange(alive, first + http("GET /v1/models HTTP/1.1"))
    assert both.count(b"HTTP/1.1 200") == 2
    assert both.index(b"chat.completion") < both.index(b'"tiny-tools"')


def test_a_query_changes_nothing(alive: Running) -> None:
    answer = exchange(alive, http("GET /v1/models?" + "x=%FF&" * 5_000 + " HTTP/1.1"))
    assert answer.startswith(b"HTTP/1.1 200")


# Clients that go away


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, alive: Running) -> Iterator[Steps]:
    with alive.client() as client:  # so that the model is there
        client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1})
    wait_for(lambda: load(alive) == (0, 0))
    steps = Steps(monkeypatch)
    yield steps
    steps.free()


@contextmanager
def asking(server: Running, **more: Any) -> Iterator[socket.socket]:
    body = json.dumps({**ENDLESS, **more}).encode()
    with connected(server) as connection:
        connection.sendall(http_post(body, f"Content-Length: {len(body)}"))
        yield connection


def engine(server: Running) -> Scheduler:
    model = server.service.store._entry("tiny").model
    assert model is not None
    return model.model._scheduler


def transport_to(server: Running, client: socket.socket) -> Any:
    """The server's side of a connection; None before it was accepted."""
    transports = [each.transport for each in list(server.server.server_state.connections)]
    return next(
        (each for each in transports if each.get_extra_info("peername") == client.getsockname()), None
    )


def wanted(server: Running) -> int:
    """Requests in the engine that somebody waits for."""
    return sum(not each.channel.cancelled for each in engine(server)._requests())


LONG = [{"role": "user", "content": "A" * 400}]


@pytest.mark.parametrize(
    ("more", "before"),
    [
        pytest.param({"stream": True}, 5, id="in the middle of a stream"),
        pytest.param({"stream": True}, 0, id="before anything was computed"),
        pytest.param({"messages": LONG, "stream": True}, 1, id="within its prompt"),
        pytest.param({"stream": False}, 5, id="waiting for the whole answer"),
        pytest.param({"stream": False, "n": 2}, 5, id="waiting for several answers"),
        pytest.param({"stream": True, "n": 2}, 5, id="in the middle of several answers"),
    ],
)
def test_a_client_that_goes_frees_its_slot_within_a_step(
    alive: Running, steps: Steps, more: dict[str, Any], before: int
) -> None:
    with asking(alive, **more):
        wait_for(lambda: wanted(alive) == more.get("n", 1))
        if before:
            steps.take(before)
        assert sum(load(alive)) == more.get("n", 1)
        if more.get("messages") is LONG:
            assert not engine(alive)._requests()[0].prefilled
    wait_for(lambda: wanted(alive) == 0)
    steps.take()
    assert load(alive) == (0, 0)


def test_a_client_that_goes_while_it_waits_disturbs_nobody(alive: Running, steps: Steps) -> None:
    with asking(alive, max_tokens=30) as first, asking(alive, max_tokens=30, stream=True) as second:
        wait_for(lambda: wanted(alive) == 2)
        steps.take(2)
        with asking(alive, stream=True):
            wait_for(lambda: wanted(alive) == 3)
            steps.take()
            assert load(alive) == (2, 1)
        wait_for(lambda: wanted(alive) == 2)
        steps.take()
        assert load(alive) == (2, 0)
        steps.free()
        assert b'"completion_tokens":30' in read_all(first)
        assert b"data: [DONE]" in read_all(second)


def test_a_client_that_does_not_read_holds_nobody_up(alive: Running) -> None:
    with connected(alive, SO_RCVBUF=4096) as slow:
        wait_for(lambda: transport_to(alive, slow) is not None)
        own = transport_to(alive, slow).get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or the kernel takes all of it
        body = json.dumps({**ENDLESS, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        slow.sendall(http_post(body, f"Content-Length: {len(body)}"))
        wait_for(lambda: any(each.channel.paused for each in engine(alive)._requests()))
        ahead = [each.channel._items.qsize() for each in engine(alive)._requests()]
        assert max(ahead) <= READ_AHEAD
        assert post(alive, fields()).status_code == 200
        wait_for(lambda: load(alive) == (0, 0))  # it was given up
        assert b"[DONE]" not in read_all(slow)
