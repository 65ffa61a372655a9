"""`/api/embed` and its predecessor `/api/embeddings`: texts as vectors of length one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from pocketlm.embed import Embeddings
from pocketlm.energy import Reading
from pocketlm.server.answers import Service, ServiceOf, while_connected
from pocketlm.server.errors import blaming
from pocketlm.server.event_stream import json_bytes
from pocketlm.server.ollama.fields import ModelFields, room
from pocketlm.server.ollama.times import nanoseconds
from pocketlm.server.openai.completions import separate
from pocketlm.server.openai.embeddings import check_dimensions

router = room()


class EmbedRequest(ModelFields):
    input: str | Annotated[list[str], Field(fail_fast=True)]
    """a text or several, 256 at most"""
    truncate: bool | None = None
    """it has no effect: a text that is too long is refused either way, never cut"""
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """only as many as the model has"""


class EmbeddingsRequest(ModelFields):
    prompt: str


@router.post("/api/embed", response_model=None)
async def embed(request: Request, body: EmbedRequest, service: ServiceOf) -> Response:
    """Each text as a vector: the mean of the model's hidden states behind its tokens."""
    check_dimensions(service.store, body.model, body.dimensions)
    begun = time.perf_counter()
    with blaming("input"):
        texts = separate(body.input, "input")
        load_s, name, embedded, reading = await while_connected(request, _embed(body, service, texts))
    answer = {
        "model": name,
        "embeddings": embedded.vectors.tolist(),
        "total_duration": nanoseconds(time.perf_counter() - begun),
        "load_duration": nanoseconds(load_s),
        "prompt_eval_count": embedded.prompt_tokens,
        "energy": reading.as_object(),
    }
    return Response(json_bytes(answer), media_type="application/json")


@router.post("/api/embeddings", response_model=None)
async def embeddings(request: Request, body: EmbeddingsRequest, service: ServiceOf) -> Response:
    """One text as a vector."""
    with blaming("prompt"):
        _, _, embedded, _ = await while_connected(request, _embed(body, service, [body.prompt]))
    answer: dict[str, Any] = {"embedding": embedded.vectors[0].tolist()}
    return Response(json_bytes(answer), media_type="application/json")


async def _embed(
    body: ModelFields, service: Service, texts: Sequence[str | Sequence[int]]
) -> tuple[float, str, Embeddings, Reading]:
    """How long the model took to load, in seconds, and what `Service.embed` gives."""
    body.check_context(service)
    begun = time.perf_counter()
    async with await service.acquire(body.model):
        load_s = time.perf_counter() - begun
        name, embedded, reading = await service.embed("ollama_embed", body.model, texts)
        body.keep(service, name)
    return load_s, name, embedded, reading
