"""What a caller may say about one answer, checked once and for all."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from pocketlm.constraint import Grammar
from pocketlm.errors import InvalidSettingError, did_you_mean
from pocketlm.sampling import Sampling
from pocketlm.tools import Tool, ToolChoice

Overflow = Literal["error", "slide"]


class Settings(TypedDict, total=False):
    """How an answer is generated. `Sampling` tells what most of them mean; its defaults hold here too."""

    max_tokens: int | None  # None: until the context is full
    min_tokens: int  # the model may not end the answer before
    stop: str | Sequence[str] | None  # the answer ends before any of these
    ignore_eos: bool  # go on behind the model's own end of text
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    logprobs: bool  # whether pieces carry the log-probability of their token
    top_logprobs: int  # and those of so many most likely tokens
    json_schema: Mapping[str, Any] | bool | str | None  # the answer is JSON that the schema allows
    regex: str | None  # the whole answer matches
    grammar: str | Grammar | None  # the answer follows this Lark grammar, or one that is built already
    tools: Sequence[Mapping[str, Any]]  # functions that the model may call, in the form of the OpenAI API
    tool_choice: str | Mapping[str, Any] | None  # "auto", "none", "required" or one function
    parallel_tool_calls: bool  # False: one call in an answer at most
    overflow: Overflow  # "slide" leaves the oldest messages out where a conversation outgrows the context
    timeout_s: float | None  # from now; the answer then ends as it is
    speculate: bool  # False: no drafts
    cache_prompt: bool  # False: compute the whole prompt, whatever of it is cached, and keep nothing


NO_TOOLS = ToolChoice("none")
_SAMPLING = {each.name for each in fields(Sampling)}


@dataclass(frozen=True)
class AnswerSettings:
    """`Settings` with all defaults filled in. Raises InvalidSettingError."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = NO_TOOLS
    parallel_tool_calls: bool = True
    overflow: Overflow = "error"
    timeout_s: float | None = None
    speculate: bool = True
    cache_prompt: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AnswerSettings:
        for name in settings:
            if name not in Settings.__annotations__:
                raise InvalidSettingError(
                    f"There is no setting {name!r}.{did_you_mean(name, Settings.__annotations__)}"
                )
        rest = {name: value for name, value in settings.items() if name not in _SAMPLING}
        rest["stop"] = () if rest.get("stop") is None else rest["stop"]
        logprobs, top_logprobs = rest.pop("logprobs", False), rest.pop("top_logprobs", None)
        rest["top_logprobs"] = 0 if logprobs and top_logprobs is None else top_logprobs
        rest["grammar"] = _grammar({name: rest.pop(name, None) for name in _GRAMMARS})
        rest["tools"] = tuple(Tool.parse(tool) for tool in rest.get("tools") or ())
        rest["tool_choice"] = ToolChoice.parse(rest.get("tool_choice"), rest["tools"])
        if rest["grammar"] is not None and rest["tool_choice"].mode != "none":
            raise InvalidSettingError(
                "tools are given and a form of the answer too; a call has its own. Leave one of them out, or "
                'set tool_choice to "none".'
            )
        return cls(Sampling(**{name: value for name, value in settings.items() if name in _SAMPLING}), **rest)

    def __post_init__(self) -> None:
        limit = self.max_tokens
        if limit is not None and (
            not isinstance(limit, numbers.Integral) or isinstance(limit, bool) or int(limit) < 1
        ):
            raise InvalidSettingError(
                f"max_tokens is {self.max_tokens!r}; a whole number from 1 on is expected."
            )
        if self.overflow not in ("error", "slide"):
            raise InvalidSettingError(f'overflow is {self.overflow!r}; "error" or "slide" is expected.')
        timeout = self.timeout_s
        if timeout is not None and not (
            isinstance(timeout, numbers.Real) and not isinstance(timeout, bool) and 0 < timeout < math.inf
        ):
            raise InvalidSettingError(f"timeout_s is {timeout!r}; a number of seconds above 0 is expected.")


_GRAMMARS = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "grammar": Grammar.lark}


def _grammar(given: Mapping[str, Any]) -> Grammar | None:
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise InvalidSettingError(
            f"{' and '.join(named)} are given; an answer follows one of them. Leave the others out."
        )
    for name, value in named.items():
        return value if isinstance(value, Grammar) else _GRAMMARS[name](value)
    return None
