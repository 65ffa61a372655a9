"""`/v1/models`: what can be asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from pocketlm.server.answers import ServiceOf
from pocketlm.server.event_stream import json_bytes
from pocketlm.server.model_store import ModelState

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=None)
async def models(service: ServiceOf) -> Response:
    """All models of this server, loaded or not."""
    data = [describe(state) for state in service.store.states()]
    return Response(json_bytes({"object": "list", "data": data}), media_type="application/json")


@router.get("/v1/models/{name:path}", response_model=None)
async def model(name: str, service: ServiceOf) -> Response:
    """One of them, by any of its names."""
    served = service.store.get(name)
    state = next(each for each in service.store.states() if each.served is served)
    return Response(json_bytes(describe(state)), media_type="application/json")


def describe(state: ModelState) -> dict[str, Any]:
    """A model as the API has it; `meta` is pocketlm's own, as far as its manifest tells."""
    manifest = state.served.manifest
    quality = manifest.quality
    return {
        "id": state.served.name,
        "object": "model",
        "created": int(state.served.modified_at),
        "owned_by": "pocketlm",
        "meta": {
            "family": manifest.family,
            "precision": manifest.precision.name,
            "bytes": manifest.bytes,
            "parameters": manifest.parameters,
            "context_length": state.context_length,
            "trained_context_length": manifest.dimensions.context_length,
            "embedding_length": manifest.dimensions.hidden,
            "loaded": state.loaded,
            "licence": manifest.licence,
            "quality": quality
            and {"kl": quality.kl_mean, "top1": quality.top1_agreement, "perplexity": quality.perplexity},
        },
    }
