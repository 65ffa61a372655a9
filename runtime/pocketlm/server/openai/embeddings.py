"""`/v1/embeddings`: texts as vectors of length one."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from pocketlm.server.answers import ServiceOf, while_connected
from pocketlm.server.errors import ApiError, blaming
from pocketlm.server.event_stream import json_bytes
from pocketlm.server.fields import Fields, ModelName
from pocketlm.server.model_store import ModelStore
from pocketlm.server.openai.completions import Texts, separate

router = APIRouter(tags=["OpenAI"])


class EmbeddingRequest(Fields):
    input: Texts
    """a text or token ids, or a list of either, 256 at most"""
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of little-endian float32, which the openai package asks for"""
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """only as many as the model has"""
    user: str | None = None
    """a label; it has no effect"""


@router.post("/v1/embeddings", response_model=None)
async def embeddings(request: Request, body: EmbeddingRequest, service: ServiceOf) -> Response:
    """Each text as a vector: the mean of the model's hidden states behind its tokens."""
    check_dimensions(service.store, body.model, body.dimensions)
    with blaming("input"):
        work = service.embed("embeddings", body.model, separate(body.input, "input"))
        name, embedded, reading = await while_connected(request, work)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(embedded.vectors)
    ]
    tokens = embedded.prompt_tokens
    costs = {"prompt_tokens": tokens, "total_tokens": tokens, "energy": reading.as_object()}
    answer = {"object": "list", "data": data, "model": name, "usage": costs}
    return Response(json_bytes(answer), media_type="application/json")


def check_dimensions(store: ModelStore, model: str | None, wanted: int | None) -> None:
    """Raises ApiError for another length of vectors than the model's, and UnknownModelError."""
    served = store.get(model)
    size = served.manifest.dimensions.hidden
    if wanted not in (None, size):
        message = f"dimensions is {wanted:,}; the vectors of {served.name} have {size:,}. Leave it out."
        raise ApiError(400, message, code="invalid_value", param="dimensions")


def _encoded(vector: NDArray[np.float32], encoding: str | None) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values
