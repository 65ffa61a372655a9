"""A Hugging Face Hub on 127.0.0.1: just enough of its interface for huggingface_hub 0.36 and 2."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "tiny/Tiny-Model"
CHECKPOINT = {
    "README.md": b"hello",
    "config.json": b"{ }",
    "tokenizer.json": b"[]",
    "pytorch_model.bin": b"never fetched",
    "consolidated.safetensors": b"never fetched either",
    "onnx/model.onnx": b"nor this",
    "model.safetensors": b"weights " * 1000,
}


@dataclass
class FakeHub:
    """One repository. Change the fields to change what it serves."""

    url: str
    files: dict[str, bytes] = field(default_factory=lambda: dict(CHECKPOINT))
    commit: str = "a" * 40
    refuse: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # "api" or "resolve" → status, error code
    announced_sha256: str | None = None  # instead of the true one
    requests: list[str] = field(default_factory=list)
    user_agents: set[str] = field(default_factory=set)
    authorizations: set[str | None] = field(default_factory=set)

    def served(self) -> set[str]:
        """The names of the files that were downloaded."""
        gets = [
            line.split(" ")[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line
        ]
        return {path.split("/", 5)[5] for path in gets}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        hub.user_agents.add(self.headers["User-Agent"])
        hub.authorizations.add(self.headers["Authorization"])
        kind = "api" if path.startswith("/api/") else "resolve"
        if kind in hub.refuse:
            status, code = hub.refuse[kind]
            return self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})
        api, file = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            return self._send(200, json.dumps(self._info(hub)).encode(), {"Content-Type": "application/json"})
        if path.startswith(file):
            name = path[len(file) :].partition("/")[2]
            if name in hub.files:
                return self._send(200, hub.files[name], self._file_headers(hub, name))
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _info(self, hub: FakeHub) -> dict[str, object]:
        siblings = []
        for name, data in hub.files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            if _is_large(name):
                sha256 = hub.announced_sha256 or hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        return {
            "id": REPOSITORY,
            "modelId": REPOSITORY,
            "sha": hub.commit,
            "private": False,
            "tags": [],
            "cardData": {"license": "mit"},
            "siblings": siblings,
        }

    def _file_headers(self, hub: FakeHub, name: str) -> dict[str, str]:
        etag = hashlib.sha256(hub.files[name]).hexdigest()
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{etag if _is_large(name) else etag[:40]}"'}
        if _is_large(name):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(hub.files[name]))}
        return headers

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))
