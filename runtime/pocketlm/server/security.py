"""Who is let in: which names the server answers to, which pages may call it, and which keys open it.

A web page that somebody has open can send requests to this machine too, so an address on the loopback alone
protects nothing. Three checks, from the outside in:

- Host: a page whose own name was made to point at 127.0.0.1 (DNS rebinding) still sends its name.
- Origin and Sec-Fetch-Site: any other page says where it comes from (Fetch standard, W3C Fetch Metadata).
- API key, where the operator has set one.

What comes of a request that is let in is bounded in limits.py.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from typing import Any, cast

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pocketlm.server.config import ServerConfig
from pocketlm.server.errors import error_response
from pocketlm.server.limits import BodyLimit, Refused, RequestLimit, ignored
from pocketlm.server.open_paths import is_open

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::[0-9]{1,5})?")
_BEARER = b"bearer "
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_METHODS = ("GET", "HEAD", "POST", "DELETE")


def protect(app: Starlette, config: ServerConfig, refused: Refused = ignored) -> None:
    """Puts all checks and limits before `app`. A request passes HostCheck first and BodyLimit last."""
    # The middleware that is added last is the first that a request meets.
    app.add_middleware(cast(Any, BodyLimit), config, refused)
    app.add_middleware(cast(Any, RequestLimit), config, refused)
    if config.api_keys:
        app.add_middleware(cast(Any, ApiKeyCheck), config, refused)
    if config.allowed_origins:
        # Before the key: the browser asks without one whether it may send it, and a page is to read a 401.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[_normal_origin(origin) for origin in config.allowed_origins],
            allow_methods=_METHODS,
            allow_headers=["*"],  # clients send many of their own: x-stainless-*, anthropic-*
            expose_headers=["*"],
            allow_private_network=True,  # a page of the internet that the operator has named
        )
    app.add_middleware(cast(Any, OriginCheck), config, refused)
    app.add_middleware(cast(Any, HostCheck), config, refused)
    app.add_middleware(cast(Any, SecurityHeaders))


class HostCheck:
    """Answers to the loopback's names, the address it listens on and the hosts that the operator has named.

    Where the server can be reached from other machines, any address is right: a rebound name is a name.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, refused: Refused = ignored) -> None:
        self._app = app
        self._refused = refused
        named = [name.lower().strip("[]").rstrip(".") for name in (config.host, *config.allowed_hosts)]
        self._names = {"localhost", "127.0.0.1", "::1", *named}
        self._suffixes = (".localhost", *(name[1:] for name in named if name.startswith("*.")))
        self._loopback = config.loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        hosts = _header(scope, b"host")
        if len(hosts) == 1 and self._is_ours(hosts[0]):
            await self._app(scope, receive, send)
            return
        self._refused("forbidden")
        came = ", ".join(_printable(host) for host in hosts) or "no host"
        message = (
            f"This server does not go by the name in the Host header ({came}). If it should, start it with "
            "--allowed-host NAME."
        )
        response = error_response(scope["path"], 403, message, code="host_not_allowed")
        await response(scope, receive, send)

    def _is_ours(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].decode("ascii").lower().strip("[]").rstrip(".")
        return name in self._names or name.endswith(self._suffixes) or self._is_address(name)

    def _is_address(self, name: str) -> bool:
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._loopback


class OriginCheck:
    """Refuses what pages of other origins send, unless the operator has named theirs.

    Browsers send Origin with all but plain GETs, and Sec-Fetch-Site with everything. Programs send neither.
    A page on another port of this machine is another page, though browsers call it the same site.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, refused: Refused = ignored) -> None:
        self._app = app
        self._refused = refused
        self._allowed = {_normal_origin(origin) for origin in config.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stranger = self._stranger(scope) if scope["type"] == "http" else None
        if stranger is None:
            await self._app(scope, receive, send)
            return
        self._refused("forbidden")
        message = (
            f"Pages of {stranger} may not call this server. If they should, start it with "
            "--allowed-origin SCHEME://HOST[:PORT]."
        )
        response = error_response(scope["path"], 403, message, code="origin_not_allowed")
        await response(scope, receive, send)

    def _stranger(self, scope: Scope) -> str | None:
        """Who sends this and may not, for a person."""
        origins = _header(scope, b"origin")
        if origins:
            own = b"".join([scope["scheme"].encode("ascii"), b"://", *_header(scope, b"host")])
            ours = len(origins) == 1 and (
                origins[0].lower() == own.lower()
                or _normal_origin(origins[0].decode("latin-1")) in self._allowed
            )
            return None if ours else f"the origin {', '.join(_printable(origin) for origin in origins)}"
        sites = _header(scope, b"sec-fetch-site")
        if all(site in (b"same-origin", b"none") for site in sites):
            return None
        # A link to the chat page may stand anywhere.
        if scope["method"] in ("GET", "HEAD") and is_open(scope["path"]):
            return None
        return "other sites"


class ApiKeyCheck:
    """Asks for one of the operator's keys, as OpenAI's or as Anthropic's clients send it, on all paths but
    the open ones."""

    def __init__(self, app: ASGIApp, config: ServerConfig, refused: Refused = ignored) -> None:
        self._app = app
        self._refused = refused
        # Without space around it, which headers cannot hold: a key from a file often ends with a newline.
        self._digests = [_digest(key.strip().encode()) for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]) or self._is_known(given := _keys(scope)):
            await self._app(scope, receive, send)
            return
        self._refused("unauthorized")
        message = (
            "The API key is none of this server's."
            if given
            else "This server asks for a key. Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
        )
        response = error_response(
            scope["path"],
            401,
            message,
            code="invalid_api_key" if given else "missing_api_key",
            headers={"WWW-Authenticate": 'Bearer realm="pocketlm"'},
        )
        await response(scope, receive, send)

    def _is_known(self, given: list[bytes]) -> bool:
        # Digests have one length, and all pairs are compared: the time tells nothing of what is right.
        known = False
        for key in given:
            digest = _digest(key)
            for expected in self._digests:
                known |= hmac.compare_digest(digest, expected)
        return known


class SecurityHeaders:
    """Headers that keep an answer from being taken for something else. What an answer sets itself stays."""

    _HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
        (b"cache-control", b"no-store"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ())]
                names = {name.lower() for name, _ in headers}
                headers += [header for header in self._HEADERS if header[0] not in names]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _header(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _keys(scope: Scope) -> list[bytes]:
    """The keys that came with a request."""
    bearers = [value for value in _header(scope, b"authorization") if value[:7].lower() == _BEARER]
    return [value[7:].strip() for value in bearers] + _header(scope, b"x-api-key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _normal_origin(origin: str) -> str:
    """An origin as browsers send it: in lower case, without its scheme's own port."""
    origin = origin.lower()
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ""))


def _printable(value: bytes) -> str:
    """At most 100 characters of a header, for a message."""
    return ascii(value[:100].decode("latin-1"))[1:-1]
