"""`/api/tags`, `/api/show`, `/api/ps`, `/api/version`: what is here, and no way to change it."""

from __future__ import annotations

import asyncio
import importlib.metadata
from pathlib import Path
from typing import Any

from starlette.responses import Response

from pocketlm.bundle import open_bundle
from pocketlm.server.answers import ServiceOf
from pocketlm.server.errors import ApiError
from pocketlm.server.event_stream import json_bytes
from pocketlm.server.fields import Fields, ModelName
from pocketlm.server.ollama.descriptions import loaded, shown, tagged
from pocketlm.server.ollama.fields import ErrorObject, room, state_of

router = room()


class ShowRequest(Fields):
    model: ModelName
    verbose: bool | None = None
    """no difference: all that there is is shown"""


@router.get("/api/tags", response_model=None)
async def tags(service: ServiceOf) -> Response:
    """All models of this server, loaded or not."""
    return _json({"models": [tagged(state.served) for state in service.store.states()]})


@router.post("/api/show", response_model=None)
async def show(body: ShowRequest, service: ServiceOf) -> Response:
    """One of them, by any of its names. It need not be loaded for that."""
    state = state_of(service, body.model)
    return _json(shown(state, await asyncio.to_thread(_chat_template, state.served.folder)))


@router.get("/api/ps", response_model=None)
async def ps(service: ServiceOf) -> Response:
    """The models that are loaded."""
    return _json({"models": [loaded(state) for state in service.store.states() if state.loaded]})


@router.get("/api/version")
async def version() -> dict[str, str]:
    """pocketlm's version."""
    return {"version": importlib.metadata.version("pocketlm")}


_REFUSED: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorObject, "description": "Models are fetched on the server's machine."}
}


@router.post("/api/pull", response_model=None, status_code=403, responses=_REFUSED)
@router.post("/api/push", response_model=None, status_code=403, responses=_REFUSED)
@router.post("/api/create", response_model=None, status_code=403, responses=_REFUSED)
@router.post("/api/copy", response_model=None, status_code=403, responses=_REFUSED)
@router.delete("/api/delete", response_model=None, status_code=403, responses=_REFUSED)
async def change() -> Response:
    """Not from here: what this server offers is settled when it starts."""
    raise _unchangeable()


@router.post("/api/blobs/{digest}", response_model=None, status_code=403, responses=_REFUSED)
@router.head("/api/blobs/{digest}", response_model=None, status_code=403, include_in_schema=False)
async def blob(digest: str) -> Response:
    """Not from here either."""
    raise _unchangeable()


def _unchangeable() -> ApiError:
    return ApiError(
        403,
        "Models are not changed over HTTP. Fetch one with pocketlm pull on the server's machine, then start "
        "the server again.",
        code="read_only",
    )


def _chat_template(folder: Path) -> str | None:
    return open_bundle(folder, verify=False).chat_template


def _json(value: object) -> Response:
    return Response(json_bytes(value), media_type="application/json")
