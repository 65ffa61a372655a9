"""The application: the rooms of the APIs, what stands before them, and what is said when something fails."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pocketlm.energy import Probe
from pocketlm.energy.sharing import SharedMeter
from pocketlm.errors import PocketlmError
from pocketlm.server import anthropic, native, ollama, page, security
from pocketlm.server.answers import ClientGoneError, Service
from pocketlm.server.config import ServerConfig
from pocketlm.server.errors import ApiError, api_error, as_response
from pocketlm.server.fields import refused
from pocketlm.server.metrics import Metrics
from pocketlm.server.model_store import ModelStore
from pocketlm.server.openai import chat, completions, embeddings, models, responses
from pocketlm.server.watched_send import WatchedSend

_CLIENT_GONE = 499  # nginx's number; nobody reads it but the log


def create_app(config: ServerConfig, store: ModelStore, probe: Probe) -> FastAPI:
    """The server's application, which owns `store` and `probe`: they are closed when it shuts down.

    `app.state.service` is its `Service`.
    """
    meter = SharedMeter(probe, lambda: store.busy_s)
    service = Service(config, store, meter, Metrics(store))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await store.close()
        meter.close()

    app = FastAPI(
        title="pocketlm",
        version=importlib.metadata.version("pocketlm"),
        description="Small language models on this device, for the clients of other servers.",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    for room in (chat, completions, embeddings, models, responses, anthropic, ollama, native):
        app.include_router(room.router)
    app.include_router(page.routes())
    for kind in (ApiError, PocketlmError, HTTPException, RequestValidationError, ClientGoneError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(cast(Any, _BodyIsJson))
    app.add_middleware(cast(Any, _ErrorsAreAnswers))
    security.protect(app, config, service.metrics.refused)
    _declare_refusals(app)
    return app


def _declare_refusals(app: FastAPI) -> None:
    """In the schema too, what is wrong with a body is a 400, as OpenAI's clients expect."""
    paths: dict[str, dict[str, Any]] = app.openapi()["paths"]
    for operations in paths.values():
        for operation in operations.values():
            if operation["responses"].pop("422", None):
                operation["responses"].setdefault("400", {"description": "The request is refused"})


async def _answer_error(request: Request, error: Exception) -> Response:
    match error:
        case ClientGoneError():
            return Response(status_code=_CLIENT_GONE)
        case RequestValidationError():
            told = refused(error.errors(), error.body)
        case HTTPException():
            told = ApiError(error.status_code, f"{error.detail}: {request.url.path}", headers=error.headers)
        case _:
            told = api_error(error)
    request.app.state.service.metrics.failed(request.url.path, None, told.status, code=told.code)
    return as_response(told, request.url.path)


class _BodyIsJson:
    """Every body is JSON, whatever its type is called: `curl -d` calls it a form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [item for item in scope["headers"] if item[0] != b"content-type"]
            scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await self._app(scope, receive, send)


class _ErrorsAreAnswers:
    """Answers what nobody foresaw, too. Starlette's own handler answers and then raises it again, and uvicorn
    closes the connection, on which the client's next request may be on its way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = WatchedSend(send)
        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if watch.begun or scope["type"] != "http":
                raise
            response = await _answer_error(Request(scope, receive), error)
            await response(scope, receive, send)
