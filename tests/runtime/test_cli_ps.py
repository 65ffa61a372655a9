"""`pocketlm ps` with servers that a thread of the test plays."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pocketlm.cli import build_app

MODEL: dict[str, Any] = {
    "name": "smollm2-135m",
    "model": "smollm2-135m",
    "size": 1_234_500_000,
    "size_vram": 0,
    "digest": "b179",
    "details": {"family": "llama", "quantization_level": "int8"},
    "expires_at": None,
    "context_length": 8192,
    "running": 2,
    "waiting": 1,
}


class Server(HTTPServer):
    """Answers as told and notes what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.body: bytes | Any = {"models": []}
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked.append((self.path, self.headers["Authorization"]))
        body = server.body if isinstance(server.body, bytes) else json.dumps(server.body).encode()
        self.send_response(server.status)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "HOST", "PORT", "API_KEY", "API_KEY_FILE"):
        monkeypatch.delenv(f"POCKETLM_{name}", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there: it must not be used


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ps(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ["ps", *arguments])


def test_a_table(server: Server) -> None:
    in_five = (datetime.now(UTC) + timedelta(minutes=5.1)).isoformat()
    idle = {**MODEL, "name": "gemma:int4", "details": {}, "running": 0, "waiting": 0}
    server.body = {"models": [MODEL, {**idle, "expires_at": in_five}]}
    result = ps("--url", server.url)
    assert result.exit_code == 0
    header, first, second = (" ".join(line.split()) for line in result.stdout.splitlines())
    assert header == "MODEL PRECISION MEMORY UP TO CONTEXT RUNNING WAITING UNTIL"
    assert first == "smollm2-135m int8 1.2 GB 8,192 2 1 in use"
    assert second == "gemma:int4 – 1.2 GB 8,192 0 0 5 min from now"


@pytest.mark.parametrize(
    ("expires_at", "shown"),
    [
        (timedelta(hours=3.01), "3 h from now"),
        (timedelta(minutes=1.7), "2 min from now"),
        (timedelta(seconds=-5), "0 s from now"),
        (timedelta(days=100_000), "–"),
        (None, "–"),
        ("soon", "–"),
        (5, "–"),
    ],
)
def test_until(server: Server, expires_at: Any, shown: str) -> None:
    if isinstance(expires_at, timedelta):
        expires_at = (datetime.now(UTC) + expires_at).isoformat()
    server.body = {"models": [{**MODEL, "running": 0, "expires_at": expires_at}]}
    assert ps("--url", server.url).stdout.rstrip().endswith(f"1  {shown}")


def test_a_model_of_which_little_is_said(server: Server) -> None:
    server.body = {"models": [{"name": "a\x1b[2J", "size": "much", "details": "none"}]}
    last = ps("--url", server.url).stdout.splitlines()[-1]
    assert last.split() == ["a[2J", "–", "–", "–", "–", "–", "–"]


def test_no_model(server: Server) -> None:
    result = ps("--url", server.url + "/")
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"The server at {server.url} has no model loaded" in result.stderr
    assert server.asked == [("/api/ps", None)]


def test_json(server: Server) -> None:
    server.body = {"models": [MODEL], "more": 1}
    assert json.loads(ps("--url", server.url, "--json").stdout) == server.body


class TestKey:
    def test_from_the_environment(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_API_KEY", " secret\n")
        assert ps("--url", server.url).exit_code == 0
        assert server.asked == [("/api/ps", "Bearer secret")]

    def test_from_a_file(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_API_KEY", "another")
        (tmp_path / "key").write_text("# ours\n\nfrom-the-file\nsecond\n")
        (tmp_path / "key").chmod(0o600)
        assert ps("--url", server.url, "--api-key-file", str(tmp_path / "key")).exit_code == 0
        assert server.asked == [("/api/ps", "Bearer from-the-file")]

    @pytest.mark.parametrize(("key", "wants"), [("", "wants an API key"), ("x", "wants another API key")])
    def test_refused(self, server: Server, monkeypatch: pytest.MonkeyPatch, key: str, wants: str) -> None:
        monkeypatch.setenv("POCKETLM_API_KEY", key)
        server.status = 401
        result = ps("--url", server.url)
        assert result.exit_code == 1
        assert wants in result.stderr
        assert "POCKETLM_API_KEY" in result.stderr

    def test_goes_to_nobody_else(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_API_KEY", "secret")
        server.status, server.headers = 302, {"Location": f"{server.url}/elsewhere"}
        result = ps("--url", server.url)
        assert result.exit_code == 1
        assert "is not a server of pocketlm" in result.stderr
        assert server.asked == [("/api/ps", "Bearer secret")]


class TestWhere:
    def test_the_environment_of_the_server(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_PORT", str(server.server_port))
        assert ps().exit_code == 0
        monkeypatch.setenv("POCKETLM_HOST", "0.0.0.0")
        assert ps().exit_code == 0
        monkeypatch.setenv("POCKETLM_PORT", "1")
        monkeypatch.setenv("POCKETLM_URL", server.url)
        assert ps().exit_code == 0
        assert len(server.asked) == 3

    @pytest.mark.parametrize(
        "url",
        [
            "file:///etc/passwd",
            "127.0.0.1:8642",
            "http://",
            "http://a:b",
            "http://[::1",
            "http://u:p@a",
            "http://a b",
        ],
    )
    def test_what_is_no_address(self, url: str) -> None:
        result = ps("--url", url)
        assert result.exit_code == 1
        assert "is no server's address; one as http://127.0.0.1:8642 is expected" in result.stderr

    def test_an_address_of_the_sixth_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_HOST", "::")
        monkeypatch.setenv("POCKETLM_PORT", "1")
        assert "at http://[::1]:1 (" in ps().stderr

    def test_nobody_there(self, server: Server) -> None:
        with Server() as gone:
            pass
        result = ps("--url", gone.url)
        assert result.exit_code == 1
        assert f"no server answers at {gone.url} (" in result.stderr
        assert "pocketlm serve MODEL" in result.stderr


@pytest.mark.parametrize("body", [b"<html>", b"[" * 100_000, b"\xff", [], {"models": 5}, {"models": [5]}, {}])
def test_somebody_else(server: Server, body: Any) -> None:
    server.body = body
    result = ps("--url", server.url)
    assert result.exit_code == 1
    assert "is not a server of pocketlm" in result.stderr


@pytest.mark.parametrize(
    ("status", "told"),
    [(404, "not a server of pocketlm"), (503, "is not ready"), (500, "with status 500")],
)
def test_an_error(server: Server, status: int, told: str) -> None:
    server.status = status
    result = ps("--url", server.url)
    assert result.exit_code == 1
    assert told in result.stderr
