"""A real server on loopback, in a thread of the test's process, with tiny models."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from pocketlm.aio import AsyncModel
from pocketlm.energy import CpuEstimate, process_cpu_seconds
from pocketlm.manifest import read_manifest
from pocketlm.server.answers import Service
from pocketlm.server.app import create_app
from pocketlm.server.config import ServerConfig
from pocketlm.server.http_protocol import http_protocol
from pocketlm.server.model_store import ModelStore, ServedModel

PATIENCE_S = 30.0
"""How long a test waits for what must happen before it fails."""


@dataclass(frozen=True)
class Running:
    url: str  # http://127.0.0.1:PORT
    app: FastAPI
    server: uvicorn.Server

    @property
    def service(self) -> Service:
        return self.app.state.service

    def client(self, **options: Any) -> httpx.Client:
        # Without certificates, which take a while to read.
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, verify=False, **options)


def tiny_store(bundles: Mapping[str, Path], **load: Any) -> ModelStore:
    """The models of these names, on one thread each; `load` goes to `AsyncModel.load`."""
    served = [
        ServedModel(name, folder, read_manifest(folder), folder.stat().st_mtime)
        for name, folder in bundles.items()
    ]
    options = {"threads": 1, **load}
    return ModelStore(
        served,
        load=lambda model: AsyncModel.load(model.folder, **options),
        budget_bytes=None,
        keep_alive_s=None,
    )


@contextmanager
def running(
    bundles: Mapping[str, Path], config: ServerConfig | None = None, **load: Any
) -> Iterator[Running]:
    """A server that is ready for requests, and drained behind the block."""
    config = config or ServerConfig(port=0)
    app = create_app(config, tiny_store(bundles, **load), CpuEstimate(process_cpu_seconds()))
    app.state.service.state = "ready"
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=http_protocol(config),
            loop="asyncio",
            ws="none",
            log_config=None,  # as `serve` has it: what uvicorn sets would outlive this server
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(256)
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        try:
            _await_start(server, thread)
            yield Running(f"http://127.0.0.1:{port}", app, server)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


def _await_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    waited = threading.Event()
    for _ in range(int(PATIENCE_S / 0.01)):
        if server.started:
            return
        if not thread.is_alive():
            break
        waited.wait(0.01)
    raise RuntimeError("the server did not start")
