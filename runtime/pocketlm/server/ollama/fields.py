"""What requests have in common, and the settings that they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from pocketlm.errors import InvalidSettingError
from pocketlm.quantities import parse_seconds
from pocketlm.server.answers import Service
from pocketlm.server.errors import ApiError
from pocketlm.server.fields import Count, Fields, ModelName, Penalty, Seed, Share, Stops, Temperature, given
from pocketlm.server.model_store import ModelState
from pocketlm.settings import Settings

_LONGEST_S = 1e9


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_seconds(value)
    except InvalidSettingError:
        raise PydanticCustomError(
            "duration", "Input should be seconds, or a duration as 10m or 1h30m; below 0 is for ever"
        ) from None


def _nothing(value: object) -> object:
    return None if value in ("", []) else value


KeepAlive = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(ge=-_LONGEST_S, le=_LONGEST_S),
    WithJsonSchema({"type": ["number", "string"]}),
]
"""Seconds; below 0 for ever."""

Nothing = Annotated[None, BeforeValidator(_nothing), WithJsonSchema({"enum": [None, "", []]})]
"""A field that asks for something that is not done here, unless it is empty."""

_Number = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
_AtOne = Annotated[float, Field(ge=1, le=1)]
_Penalized = Annotated[float, Field(gt=0, le=100)]


class Options(Fields):
    """`options`. Those in the second half have only the values that ask for what is done anyway."""

    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    seed: Seed | Literal[-1] | None = None
    """−1: a random one"""
    num_predict: Count | Literal[-1, -2] | None = None
    """tokens; −1 and −2: until the context is full"""
    num_ctx: Count | None = None
    """tokens, at most as many as the server's context has"""
    stop: Stops | None = None
    repeat_penalty: _Penalized | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    repeat_last_n: Literal[-1] | None = None
    penalize_newline: Literal[True] | None = None
    typical_p: _AtOne | None = None
    tfs_z: _AtOne | None = None
    mirostat: Literal[0] | None = None
    mirostat_tau: float | None = None
    """of no effect without mirostat"""
    mirostat_eta: float | None = None
    """of no effect without mirostat"""
    num_keep: _Number | None = None
    """of no effect, as nothing is shifted out of the context"""
    num_gpu: Literal[0] | None = None
    main_gpu: Literal[0] | None = None
    low_vram: Literal[False] | None = None
    numa: Literal[False] | None = None
    use_mmap: Literal[True] | None = None
    use_mlock: Literal[False] | None = None
    f16_kv: Literal[False] | None = None
    logits_all: Literal[False] | None = None
    vocab_only: Literal[False] | None = None
    embedding_only: Literal[False] | None = None
    num_thread: None = None
    num_batch: None = None

    def sampling(self) -> dict[str, Any]:
        """The settings of these options."""
        limit = self.num_predict
        return given(
            max_tokens=None if limit is None or limit < 0 else limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=None if self.seed == -1 else self.seed,
            stop=self.stop,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


OPTIONS_OF_SETTINGS = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "stop": "options.stop",
    "json_schema": "format",
}
"""By setting, the field of a request that it comes from, where they have different names."""


class ModelFields(Fields):
    """A request to a model."""

    model: ModelName
    options: Options | None = None
    keep_alive: KeepAlive | None = None
    """how long the model stays behind this request: "10m", seconds, 0 to unload it, −1 for ever"""

    def check_context(self, service: Service) -> None:
        """Raises ApiError for a `num_ctx` beyond the context, and UnknownModelError."""
        wanted = None if self.options is None else self.options.num_ctx
        state = state_of(service, self.model)
        if wanted is not None and wanted > state.context_length:
            raise ApiError(
                400,
                f"options.num_ctx is {wanted:,}; the context of {state.served.name} has "
                f"{state.context_length:,} tokens on this server. Leave it out, or start the server with a "
                "larger --context-length.",
                code="invalid_value",
                param="options.num_ctx",
            )

    def keep(self, service: Service, name: str) -> None:
        """Sets how long the model of that name stays, if the request says so."""
        if self.keep_alive is not None:
            service.store.set_keep_alive(name, self.keep_alive)


class GenerationFields(ModelFields):
    """A request for text."""

    stream: bool | None = None
    """null: it is streamed"""
    format: Literal["", "json"] | dict[str, Any] | None = None
    """"json", or the schema of what the answer has to be"""
    think: Literal[False] | None = None
    shift: Literal[False] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def settings(self) -> Settings:
        """Raises ApiError for fields that contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs is given without logprobs. Set logprobs to true, or leave it out."
            raise ApiError(400, message, code="invalid_value", param="top_logprobs")
        schema = {"type": "object"} if self.format == "json" else self.format
        own = given(
            json_schema=None if schema == "" else schema,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
        )
        return cast(Settings, {**(self.options or Options()).sampling(), **own})


def state_of(service: Service, name: str) -> ModelState:
    """Of the model that goes by that name, loaded or not. Raises UnknownModelError."""
    served = service.store.get(name)
    return next(each for each in service.store.states() if each.served is served)


class ErrorObject(BaseModel):
    """What is wrong, and what to do."""

    error: str


def room() -> APIRouter:
    """A router whose schema tells of the errors."""
    statuses = {400: "The request is wrong.", 404: "There is no such model.", 503: "Not now: try again."}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorObject, "description": text} for status, text in statuses.items()
    }
    return APIRouter(tags=["Ollama"], responses=responses)
