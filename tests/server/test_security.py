"""Who is let in: hosts, origins and keys, before a tiny application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pocketlm.errors import InvalidSettingError
from pocketlm.server.config import ServerConfig
from pocketlm.server.open_paths import is_open
from pocketlm.server.security import protect

KEY = "sk-secret-é"
REACHABLE = {"host": "0.0.0.0", "api_keys": (KEY,)}


async def _answer(request: Request) -> Response:
    return JSONResponse({"path": request.url.path, "got": (await request.body()).decode()})


async def _page(request: Request) -> Response:
    return PlainTextResponse("page", headers={"Content-Security-Policy": "default-src 'self'"})


def protected(**config: Any) -> Starlette:
    app = Starlette(
        routes=[
            Route("/", _page),
            Route("/page/{name:path}", _page),
            Route("/health", _answer),
            Route("/{path:path}", _answer, methods=["GET", "POST", "DELETE"]),
        ]
    )
    protect(app, ServerConfig(**config))
    return app


def send(
    app: Starlette,
    method: str = "GET",
    path: str = "/v1/models",
    headers: Mapping[str, str | bytes] | None = None,
    base: str = "http://127.0.0.1:8642",
    **options: Any,
) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(ask())


def message_of(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8642", "LocalHost:1", "localhost.", "a.localhost:8642", "127.0.0.1:8642"),
        *("127.0.0.2", "[::1]", "[::1]:8642", "models.lan", "MODELS.lan:80", "a.b.home.arpa"),
    ],
)
def test_it_answers_to_its_names(host: str) -> None:
    app = protected(allowed_hosts=("models.lan", "*.home.arpa"))
    assert send(app, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8642", "localhost.evil.example", "notlocalhost", "home.arpa", ""),
        *("127.0.0.1.evil.example", "localhost:8642:1", "localhost@evil.example", "192.168.1.5", "0.0.0.0"),
        *("localhost, evil.example", "[::2]", "localhost/", "localhost:x", "[::1", "1.models.lan"),
    ],
)
def test_it_answers_to_no_other_name(host: str) -> None:
    response = send(protected(allowed_hosts=("models.lan", "*.home.arpa")), headers={"Host": host})
    assert response.status_code == 403
    assert "--allowed-host" in message_of(response)


@pytest.mark.parametrize("hosts", [[], [b"localhost", b"localhost"]])
def test_it_wants_one_host(hosts: list[bytes]) -> None:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health",
        "headers": [(b"host", host) for host in hosts],
        "query_string": b"",
        "scheme": "http",
        "client": None,
        "server": None,
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def note(message: Any) -> None:
        sent.append(message)

    asyncio.run(protected()(scope, receive, note))
    assert sent[0]["status"] == 403


def test_any_address_is_right_where_other_machines_can_connect() -> None:
    app = protected(**REACHABLE)
    headers = {"x-api-key": KEY.encode()}
    assert send(app, headers={**headers, "Host": "192.168.1.5:8642"}).status_code == 200
    assert send(app, headers={**headers, "Host": "evil.example"}).status_code == 403


@given(st.text(max_size=40))
def test_a_strange_host_is_refused_and_breaks_nothing(host: str) -> None:
    header = host.encode("utf-8").replace(b"\r", b"").replace(b"\n", b"")
    response = send(protected(), headers={"Host": header})
    assert response.status_code == 403 or response.json()["path"] == "/v1/models"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8642", 200),
        ("HTTP://127.0.0.1:8642", 200),
        ("http://127.0.0.1:3000", 403),
        ("http://127.0.0.1", 403),
        ("https://127.0.0.1:8642", 403),
        ("http://localhost:8642", 403),  # the page was fetched by another name than it calls
        ("null", 403),
        ("", 403),
        ("https://evil.example", 403),
        ("https://app.example", 200),
        ("https://app.example:443", 200),
        ("https://app.example:8443", 403),
        ("http://app.example", 403),
        ("https://app.example.evil.example", 403),
        ("app://obsidian.md", 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_origins_are_refused(method: str, origin: str, status: int) -> None:
    app = protected(allowed_origins=("https://APP.example", "app://obsidian.md"))
    response = send(app, method, headers={"Origin": origin})
    assert response.status_code == status
    if status == 403:
        assert "--allowed-origin" in message_of(response)
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_site_fetches_without_an_origin_is_refused(site: str) -> None:
    app = protected()
    headers = {"Sec-Fetch-Site": site}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/")):
        assert send(app, method, path, headers).status_code == 403
    assert send(app, "GET", "/", headers).status_code == 200, "a link to the chat page may stand anywhere"


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_what_the_page_or_the_user_fetches_is_let_in(site: str) -> None:
    assert send(protected(), headers={"Sec-Fetch-Site": site}).status_code == 200


def preflight(app: Starlette, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-api-key,anthropic-version,"
        "x-stainless-retry-count",
        "Access-Control-Request-Private-Network": "true",
    }
    return send(app, "OPTIONS", "/v1/chat/completions", headers)


def test_cors_is_for_allowed_origins() -> None:
    app = protected(api_keys=(KEY,), allowed_origins=("https://app.example",))
    answer = preflight(app, "https://app.example")
    assert answer.status_code == 200, "a preflight carries no key"
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-stainless-retry-count" in answer.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-private-network"] == "true"

    refused = send(app, headers={"Origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example", "the page can read why"
    assert "Origin" in refused.headers["vary"]
    assert "access-control-allow-credentials" not in refused.headers


def test_cors_is_closed_to_others() -> None:
    for app in (protected(), protected(allowed_origins=("https://app.example",))):
        answer = preflight(app, "https://evil.example")
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert not [name for name in send(protected()).headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": b"Bearer " + KEY.encode()},
        {"authorization": b"bearer  " + KEY.encode() + b" "},
        {"x-api-key": KEY.encode()},
        {"x-api-key": b"second"},
        {"Authorization": b"Bearer wrong", "x-api-key": KEY.encode()},
    ],
)
def test_a_key_opens(headers: dict[str, bytes]) -> None:
    assert send(protected(api_keys=(KEY, "second")), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({}, "asks for a key"),
        ({"Authorization": b"Basic " + KEY.encode()}, "asks for a key"),
        ({"Authorization": KEY.encode()}, "asks for a key"),
        ({"Authorization": b"Bearer "}, "none of this server's"),
        ({"Authorization": b"Bearer " + KEY.encode() + b"x"}, "none of this server's"),
        ({"Authorization": b"Bearer " + KEY.encode()[:-1]}, "none of this server's"),
        ({"Authorization": b"Bearer \xff\xfe"}, "none of this server's"),
        ({"x-api-key": KEY.encode("latin-1")}, "none of this server's"),
        ({"x-api-key": b"SECOND"}, "none of this server's"),
    ],
)
def test_without_the_key_nothing_opens(headers: dict[str, bytes], told: str) -> None:
    app = protected(api_keys=(KEY, "second"))
    response = send(app, "POST", "/v1/chat/completions", headers, content=b"{}")
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert told in message_of(response)
    assert "secret" not in response.text


def test_space_around_a_key_is_not_part_of_it() -> None:
    """A key of the environment may come from a file, with the end of its line. Headers have no such space."""
    app = protected(api_keys=(" second\n",))
    assert send(app, headers={"x-api-key": b"second"}).status_code == 200
    assert send(app, headers={"x-api-key": b"seco nd"}).status_code == 401


@given(st.binary(min_size=1, max_size=30).filter(lambda key: not set(key) & set(b"\0\r\n")))
def test_only_the_key_itself_opens(key: bytes) -> None:
    status = send(protected(api_keys=(KEY,)), headers={"x-api-key": key}).status_code
    assert (status == 200) == (key == KEY.encode())


def test_some_paths_are_open() -> None:
    app = protected(api_keys=(KEY,))
    for path in ("/", "/health", "/page/main.js"):
        assert send(app, path=path).status_code == 200
    for path in ("/metrics", "/page", "/page/other.js", "/v1/models", "/health/x", "/%2e%2e/v1/models"):
        assert send(app, path=path).status_code == 401, path
    assert is_open("/page/main.js")
    assert not is_open("/v1/models")


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/models", lambda body: body["error"]["type"]),
        ("/v1/messages", lambda body: body["type"] == "error" and body["error"]["type"]),
        ("/api/chat", lambda body: isinstance(body["error"], str)),
    ],
)
def test_a_refusal_has_the_shape_of_its_api(path: str, shape: Any) -> None:
    assert shape(send(protected(api_keys=(KEY,)), "POST", path, content=b"{}").json())


def test_keys_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        send(protected(api_keys=(KEY,)), headers={"x-api-key": KEY.encode()})
        send(protected(api_keys=(KEY,)), headers={"x-api-key": b"sk-another"})
    assert "sk-" not in caplog.text


def test_every_answer_has_security_headers() -> None:
    app = protected(api_keys=(KEY,))
    answers = [
        send(app, headers={"Host": "evil.example"}),
        send(app, headers={"Origin": "null"}),
        send(app),
        send(app, path="/health"),
        send(app, headers={"x-api-key": KEY.encode()}),
    ]
    assert [answer.status_code for answer in answers] == [403, 403, 401, 200, 200]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    page = send(app, path="/")
    assert page.headers.get_list("content-security-policy") == ["default-src 'self'"]


def test_lifespan_events_pass() -> None:
    begun: list[str] = []

    async def run() -> None:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            return next(messages)

        async def note(message: Any) -> None:
            begun.append(message["type"])

        await protected(api_keys=(KEY,), allowed_origins=("https://a.example",))(
            {"type": "lifespan", "state": {}}, receive, note
        )

    asyncio.run(run())
    assert begun == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.parametrize(
    "name", ["http://models.lan", "models.lan:80", "*", "a b", "", "models.lan/", "*.", "é.lan"]
)
def test_an_allowed_host_is_a_name(name: str) -> None:
    with pytest.raises(InvalidSettingError, match="without scheme and port"):
        ServerConfig(allowed_hosts=(name,))


@pytest.mark.parametrize(
    "origin", ["*", "null", "app.example", "https://", "https://app.example/", "https://*.example", ""]
)
def test_an_allowed_origin_is_an_origin(origin: str) -> None:
    with pytest.raises(InvalidSettingError, match="scheme and host"):
        ServerConfig(allowed_origins=(origin,))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.lan", ""])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(InvalidSettingError, match="--api-key-file"):
        ServerConfig(host=host)
    assert not ServerConfig(host=host, api_keys=("key",)).loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_the_loopback_needs_none(host: str) -> None:
    assert ServerConfig(host=host).loopback
