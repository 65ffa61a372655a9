"""An OpenAI-compatible server on loopback: it echoes, counts and, where told to, lacks what others have."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LLAMA_SERVER_MODEL = {"id": "tiny", "owned_by": "llamacpp", "meta": {"ftype": "Q8_0", "size": 1234}}


@dataclass
class Behaviour:
    """What the server can do. The defaults are llama-server's."""

    models: list[dict[str, Any]] = field(default_factory=lambda: [LLAMA_SERVER_MODEL])
    pages: dict[str, Any] = field(default_factory=lambda: {"/props": {"build_info": "b42-abc"}})
    takes_ids: bool = True
    takes_extras: bool = True
    counts: bool = True  # tells usage when asked for
    miscounts_ids: bool = False  # takes a list of ids for some text
    fails: str | None = None  # what an answer reports instead of tokens
    merges_chunks: bool = False  # two tokens in each chunk
    ends_after: int | None = None  # tokens, however many were asked for
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    barrier: threading.Barrier | None = None  # answers wait until so many are under way


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The server's URL, as far as /v1."""

    class Handler(_Handler):
        told = behaviour

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    told: Behaviour
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Tests do not read a log."""

    def do_GET(self) -> None:
        pages: Mapping[str, Any] = {**self.told.pages, "/v1/models": {"data": self.told.models}}
        if self.path in pages:
            self._send(200, pages[self.path])
        else:
            self._send(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.told.requests.append((self.path, body))
        if self.told.barrier is not None:
            self.told.barrier.wait(timeout=10)
        chat = self.path == "/v1/chat/completions"
        if "prompt" in body and not self.told.takes_ids:
            self._send(400, {"error": {"message": "prompt must be a string"}})
        elif "ignore_eos" in body and not self.told.takes_extras:
            self._send(422, {"detail": "extra fields not permitted"})
        else:
            self._stream(body, chat)

    def _stream(self, body: dict[str, Any], chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in self._events(body, chat):
            self._chunk(f"data: {json.dumps(event)}\n\n".encode())
        self._chunk(b": a comment\n\ndata: [DONE]\n\n")
        self._chunk(b"")

    def _events(self, body: dict[str, Any], chat: bool) -> Iterator[dict[str, Any]]:
        if self.told.fails is not None:
            yield {"error": {"message": self.told.fails}}
            return
        asked = body["max_tokens"]
        count = asked if self.told.ends_after is None else min(asked, self.told.ends_after)
        if chat:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]}
        step = 2 if self.told.merges_chunks else 1
        for start in range(0, count, step):
            text = "".join(f" t{number}" for number in range(start, min(start + step, count)))
            token = {"delta": {"content": text}} if chat else {"text": text}
            yield {"choices": [{"index": 0, "finish_reason": None, **token}]}
        end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield {"choices": [{"index": 0, "finish_reason": "length", **end}]}
        if self.told.counts and body.get("stream_options", {}).get("include_usage"):
            yield {"choices": [], "usage": self._usage(body, count)}

    def _usage(self, body: dict[str, Any], count: int) -> dict[str, Any]:
        prompt = len(body["prompt"]) if "prompt" in body else 11
        return {
            "prompt_tokens": prompt + self.told.miscounts_ids,
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 4 if body.get("cache_prompt", True) else 0},
        }

    def _send(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
