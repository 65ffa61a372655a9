"""What requests for text have in common, and the settings that they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field
from pydantic_core import PydanticCustomError

from pocketlm.server.errors import ApiError
from pocketlm.server.fields import Count, Fields, ModelName, Penalty, Seed, Share, Stops, Temperature, given
from pocketlm.settings import Settings

T = TypeVar("T")

MAX_TIMEOUT_S = 86_400

Limit = Count | Literal[-1]  # in this order, as what is wrong is told of the first
"""Tokens; −1 is llama-server's and LM Studio's "no limit"."""

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
_TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationFields(Fields):
    """How an answer is generated. What is left out is as `pocketlm.settings.Settings` has it."""

    model: ModelName | None = None
    """None: the server's first"""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Limit | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    ignore_eos: bool | None = None
    stop: Stops | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """llama-server's name of repetition_penalty"""
    logit_bias: Annotated[dict[_TokenIdText, _Bias], Field(max_length=1024)] | None = None
    seed: Seed | None = None
    regex: str | None = None
    """the whole answer matches"""
    grammar: str | None = None
    """a Lark grammar that the answer follows"""
    cache_prompt: bool | None = None
    timeout_s: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)] | None = None
    """the answer ends then, as with max_tokens"""
    user: str | None = None
    """a label; it has no effect"""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> Settings:
        """The settings of these fields. Raises ApiError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options is given without stream. Leave it out.", param="stream_options"
            )
        penalty = one_of("repetition_penalty", self.repetition_penalty, "repeat_penalty", self.repeat_penalty)
        bias = self.logit_bias
        settings = given(
            max_tokens=None if self.max_tokens == -1 else self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=self.stop,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=penalty,
            logit_bias=None if bias is None else {int(id_): value for id_, value in bias.items()},
            seed=self.seed,
            regex=self.regex,
            grammar=self.grammar,
            cache_prompt=self.cache_prompt,
            timeout_s=self.timeout_s,
        )
        return cast(Settings, settings)


def one_of(name: str, value: T | None, other_name: str, other: T | None) -> T | None:
    """The value of a field that has two names. Raises ApiError if both are given and differ."""
    if value is not None and other is not None and value != other:
        message = f"{name} is {value} and {other_name} is {other}. They mean the same: leave one of them out."
        raise ApiError(400, message, code="invalid_value", param=name)
    return other if value is None else value


def use_instead(instead: str) -> Any:
    """A validator for a field that others have replaced: null asks for nothing."""

    def check(value: object) -> None:
        if value is not None:
            raise PydanticCustomError(
                "unsupported_field", "It is not supported: use {instead}", {"instead": instead}
            )

    return check
