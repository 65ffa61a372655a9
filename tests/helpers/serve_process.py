"""A server whose answers never end: `python serve_process.py DRAIN_S`. It prints its URL when ready."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from pocketlm.server.config import ServerConfig
from pocketlm.server.serve import serve


async def _endless(_: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    return StreamingResponse(chunks())


def main(drain_s: float) -> None:
    app = Starlette(routes=[Route("/endless", _endless)])
    app.state.service = SimpleNamespace(state="loading")
    config = ServerConfig(port=0, drain_s=drain_s)
    serve(config, lambda: app, ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main(float(sys.argv[1]))
