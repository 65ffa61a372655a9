"""JSON and server-sent events over HTTP, straight to a server: no proxy that the environment may name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from pocketlm_benchmarks.engines.protocol import EngineError

_GET_TIMEOUT_S = 10.0
_MESSAGE_CHARACTERS = 300


def parse_url(url: str) -> tuple[bool, str, int | None, str]:
    """Whether it is secure, host, port and path of a server's URL. Raises ValueError."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.scheme == "https", parts.hostname, parts.port, parts.path
    raise ValueError(f"{url!r} is no URL of a server; for example http://127.0.0.1:8080/v1 is expected")


class Server:
    """A server at `http(s)://HOST[:PORT][/BASE]`; BASE is /v1 unless the URL has one."""

    def __init__(self, url: str) -> None:
        """Raises EngineError for a URL that is none."""
        try:
            self._secure, self.host, self._port, path = parse_url(url)
        except ValueError as error:
            raise EngineError(str(error)) from None
        self._base = path.rstrip("/") or "/v1"

    def get(self, path: str, *, beside: bool = False) -> Any:
        """The JSON at `path` below the base, or at the root with `beside`.

        Raises OSError if no server is there, and EngineError for anything but JSON.
        """
        with contextlib.closing(self._connection(_GET_TIMEOUT_S)) as connection:
            with _http_errors(path):
                connection.request("GET", path if beside else self._base + path)
                response = connection.getresponse()
                _check(response, path)
                body = response.read()
            return _parsed(body, path)

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """Posts `body` and yields the events of the answer as they arrive, until `[DONE]`.

        After the HTML standard's event streams, of which these servers use the data lines. Raises EngineError
        for a connection that breaks, an answer that is no stream and one that reports an error.
        """
        content = json.dumps(body).encode("ascii")
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        # No time limit here: how long an answer may take is for the harness to say.
        with contextlib.closing(self._connection(None)) as connection, _http_errors(path, OSError):
            connection.request("POST", self._base + path, content, headers)
            response = connection.getresponse()
            _check(response, path)
            while line := response.readline():
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = _parsed(data, path)
                if not isinstance(event, dict) or "error" in event:
                    raise EngineError(f"{path} reported {_message(data)}")
                yield event

    def _connection(self, timeout_s: float | None) -> HTTPConnection:
        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(self.host, self._port, timeout=timeout_s)


@contextlib.contextmanager
def _http_errors(path: str, *more: type[Exception]) -> Iterator[None]:
    caught: tuple[type[Exception], ...] = (HTTPException, *more)
    try:
        yield
    except caught as error:
        raise EngineError(f"{path} did not answer: {error!r}") from None


def _check(response: HTTPResponse, path: str) -> None:
    if response.status != 200:
        raise EngineError(f"{path} answered {response.status}: {_message(response.read())}")


def _parsed(data: bytes, path: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise EngineError(f"{path} answered {data[:_MESSAGE_CHARACTERS]!r}; JSON is expected") from None


def _message(data: bytes) -> str:
    """What an error says, in OpenAI's form or any other."""
    text = data.decode("utf-8", errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return text[:_MESSAGE_CHARACTERS]
