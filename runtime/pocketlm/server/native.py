"""What llama-server has beside the APIs of others: health, metrics, properties, tokens and templates."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from pocketlm.bundle import open_bundle
from pocketlm.sampling import Sampling
from pocketlm.server.answers import MAX_TEXTS, Service, ServiceOf
from pocketlm.server.config import ServerConfig
from pocketlm.server.errors import ApiError, blaming
from pocketlm.server.event_stream import json_bytes
from pocketlm.server.fields import Fields, ModelName
from pocketlm.server.model_store import ModelState
from pocketlm.server.openai.fields import TokenId
from pocketlm.server.openai.messages import Conversation, template_messages
from pocketlm.server.openai.tools import Tools
from pocketlm.tokenizer import Tokenizer
from pocketlm.tools import Tool

T = TypeVar("T")

_PART = 1 << 16  # tokens


class ErrorFields(BaseModel):
    """What is wrong: for people, and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    error: ErrorFields


def _errors(**texts: str) -> dict[int | str, dict[str, Any]]:
    return {int(name[1:]): {"model": ErrorObject, "description": text} for name, text in texts.items()}


_WRONG, _UNKNOWN = "The request is wrong.", "There is no such model."
_OF_MODELS = _errors(_400=_WRONG, _404=_UNKNOWN, _503="Not now: try again.")

router = APIRouter(tags=["pocketlm"])


class TokenizeRequest(Fields):
    content: str
    model: ModelName | None = None
    """null: the server's first"""
    add_special: bool | None = None
    """true: the model's begin-of-text token goes in front, if the model was trained so"""
    parse_special: Literal[True] | None = None
    """special tokens are always recognised"""
    with_pieces: bool | None = None
    """true: each token comes with its text, or its bytes where they are no whole characters"""


class DetokenizeRequest(Fields):
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    model: ModelName | None = None


class TemplateRequest(Fields):
    messages: Conversation
    tools: Tools | None = None
    model: ModelName | None = None
    add_generation_prompt: bool | None = None
    """null or true: the prompt ends with the beginning of the answer"""


@router.get("/health", responses=_errors(_503="No requests are answered yet, or any more."))
@router.head("/health", include_in_schema=False)
async def health(service: ServiceOf) -> dict[str, str]:
    """Whether requests are answered."""
    service.check_ready()
    return {"status": "ok"}


@router.get(
    "/metrics",
    response_model=None,
    responses={200: {"description": "Counts for Prometheus.", "content": {"text/plain": {}}}},
)
async def metrics(service: ServiceOf, accept: Annotated[str | None, Header()] = None) -> Response:
    """What the server has counted."""
    content, content_type = service.metrics.render(accept)
    return Response(content, headers={"Content-Type": content_type})


@router.get("/props", response_model=None, responses=_errors(_400=_WRONG, _404=_UNKNOWN))
async def props(service: ServiceOf, model: Annotated[str | None, Query(max_length=256)] = None) -> Response:
    """What holds for requests that do not say otherwise, of a model (the server's first, unless it is named),
    and what this server is."""
    states = service.store.states()
    served = service.store.get(model)
    state = next(each for each in states if each.served is served)
    template = await asyncio.to_thread(lambda: open_bundle(served.folder, verify=False).chat_template)
    described = {
        "default_generation_settings": {
            "n_ctx": state.context_length,
            "params": _defaults(service.config),
        },
        "total_slots": served.concurrency,
        "model_path": served.name,
        "chat_template": template or "",
        "modalities": {"vision": False, "audio": False},
        "build_info": f"pocketlm {importlib.metadata.version('pocketlm')}",
        "models": [_described(each) for each in states],
        **_of_server(service),
    }
    return Response(json_bytes(described), media_type="application/json")


@router.post("/tokenize", response_model=None, responses=_OF_MODELS)
async def tokenize(body: TokenizeRequest, service: ServiceOf) -> Response:
    """A text as token ids."""

    def work(tokenizer: Tokenizer) -> bytes:
        ids = tokenizer.encode(body.content, add_bos=None if body.add_special else False)
        return b'{"tokens":[' + _tokens(tokenizer, ids, pieces=bool(body.with_pieces)) + b"]}"

    with blaming("content"):
        return Response(await _with_tokenizer(service, body.model, work), media_type="application/json")


@router.post("/detokenize", response_model=None, responses=_OF_MODELS)
async def detokenize(body: DetokenizeRequest, service: ServiceOf) -> Response:
    """The text of token ids, that of special tokens included."""

    def work(tokenizer: Tokenizer) -> bytes:
        return json_bytes({"content": tokenizer.decode(_known(tokenizer, body.tokens), skip_special=False)})

    return Response(await _with_tokenizer(service, body.model, work), media_type="application/json")


@router.post("/apply-template", response_model=None, responses=_OF_MODELS)
async def apply_template(body: TemplateRequest, service: ServiceOf) -> Response:
    """The prompt that the model's chat template makes of a conversation."""
    with blaming("messages", tool="tools"):
        messages = template_messages(body.messages)
        tools = [Tool.parse(tool.as_dict()).as_dict() for tool in body.tools or ()]

        def work(tokenizer: Tokenizer) -> bytes:
            begins = body.add_generation_prompt is not False
            prompt = tokenizer.render_chat(messages, tools=tools, add_generation_prompt=begins)
            return json_bytes({"prompt": prompt})

        return Response(await _with_tokenizer(service, body.model, work), media_type="application/json")


async def _with_tokenizer(service: Service, model: str | None, work: Callable[[Tokenizer], T]) -> T:
    """What `work` makes of the model's tokenizer, in a thread: a long text takes its time."""
    async with await service.acquire(model) as lease:
        return await asyncio.to_thread(work, lease.model.model.tokenizer)


def _tokens(tokenizer: Tokenizer, ids: Sequence[int], *, pieces: bool) -> bytes:
    """The items of a JSON list."""
    if not pieces:
        # In parts, between which other threads have their turn.
        return b",".join(json_bytes(ids[at : at + _PART])[1:-1] for at in range(0, len(ids), _PART))
    # A long text has far more tokens than there are different ones.
    items = {
        token_id: json_bytes({"id": token_id, "piece": _piece(tokenizer.token_bytes(token_id))})
        for token_id in set(ids)
    }
    return b",".join(items[token_id] for token_id in ids)


def _piece(content: bytes) -> str | list[int]:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)


def _known(tokenizer: Tokenizer, ids: Sequence[int]) -> Sequence[int]:
    """`ids`. Raises ApiError for one that the model does not have."""
    largest, size = max(ids, default=0), tokenizer.vocabulary_size
    if largest >= size:
        message = f"tokens has the id {largest:,}; this model has {size:,}, from 0 on."
        raise ApiError(400, message, code="invalid_value", param="tokens")
    return ids


def _defaults(config: ServerConfig) -> dict[str, Any]:
    sampling = Sampling()
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
        "n_predict": -1 if config.max_tokens is None else config.max_tokens,
    }


def _described(state: ModelState) -> dict[str, Any]:
    return {
        "name": state.served.name,
        "precision": state.served.manifest.precision.name,
        "context_length": state.context_length,
        "loaded": state.loaded,
        "loading": state.loading,
    }


def _of_server(service: Service) -> dict[str, Any]:
    config, probe, lock = service.config, service.probe, service.network_lock
    return {
        "energy": {"source": probe.source, "scope": probe.scope, "kind": probe.kind},
        "network_lock": None if lock is None else {"kind": lock.kind, "reason": lock.reason},
        "limits": {
            "max_body_bytes": config.max_body_bytes,
            "max_connections": config.max_connections,
            "max_tokens": config.max_tokens,
            "max_answers": config.max_answers,
            "max_texts": MAX_TEXTS,
            "answer_timeout_s": config.answer_timeout_s,
        },
    }
