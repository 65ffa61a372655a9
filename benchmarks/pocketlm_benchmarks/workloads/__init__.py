"""The prompts that the package ships, one TOML file for each workload, named after it; README.md lists them.

description = "one line for a person"
licence = "SPDX id"
new_tokens = 128            # of each answer, whatever the model would end
concurrent = 1              # prompts handed over at once

[[prompts]]                 # whole groups of `concurrent`, two at least, all different
[[prompts.messages]]        # user and assistant in turn, a user first and last: some templates refuse others
role = "user"
content = "…"               # blank space at both ends is taken away
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Literal

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pocketlm.errors import InvalidSettingError, PocketlmError, did_you_mean
from pocketlm_benchmarks.engines.protocol import Message

_SUFFIX = ".toml"
_LEAST_GROUPS = 2  # with one, an engine would get the same prompts twice in a row


class WorkloadError(PocketlmError):
    """A workload's file does not follow its schema: a mistake in the file, not of a user."""


@dataclass(frozen=True)
class Workload:
    """A fixed set of prompts, each of them a conversation that ends with what a user says."""

    name: str
    description: str
    licence: str  # SPDX
    new_tokens: int  # for each prompt
    concurrent: int  # prompts handed over at once
    prompts: tuple[tuple[Message, ...], ...]


def workload_names() -> tuple[str, ...]:
    """All workloads, in alphabetical order."""
    names = (path.name for path in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def load_workload(name: str) -> Workload:
    """The workload `name`. Raises InvalidSettingError for a name that is not known, and WorkloadError."""
    known = workload_names()
    if name not in known:
        raise InvalidSettingError(
            f"there is no workload {name!r}.{did_you_mean(name, known)} Known are {', '.join(known)}."
        )
    return parse_workload(
        name, resources.files(__name__).joinpath(name + _SUFFIX).read_text(encoding="utf-8")
    )


def parse_workload(name: str, text: str) -> Workload:
    """The workload `name` from the text of its TOML file. Raises WorkloadError, naming the field."""
    where = name + _SUFFIX
    try:
        file = _FILE.validate_python(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise WorkloadError(f"{where} is not valid TOML: {error}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        came = "missing" if first["type"] == "missing" else repr(first["input"])
        raise WorkloadError(f"{where}: {place} is {came}: {first['msg']}.") from None
    prompts = tuple(
        tuple(Message(role=turn.role, content=turn.content.strip()) for turn in prompt.messages)
        for prompt in file.prompts
    )
    _check_prompts(prompts, file.concurrent, where)
    return Workload(name, file.description, file.licence, file.new_tokens, file.concurrent, prompts)


_CONFIG = ConfigDict(extra="forbid")

_Text = Annotated[str, Field(strict=True, pattern=r"\S")]
_Count = Annotated[int, Field(strict=True, ge=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)
class _Turn:
    role: Literal["user", "assistant"]
    content: _Text


@pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)
class _Prompt:
    messages: list[_Turn]


@pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)
class _File:
    description: _Text
    licence: _Text
    new_tokens: _Count
    concurrent: _Count
    prompts: list[_Prompt]


_FILE = TypeAdapter(_File)


def _check_prompts(prompts: tuple[tuple[Message, ...], ...], concurrent: int, where: str) -> None:
    groups, rest = divmod(len(prompts), concurrent)
    if rest or groups < _LEAST_GROUPS:
        raise WorkloadError(
            f"{where} has {len(prompts)} prompts, expected a multiple of {concurrent}, the prompts handed "
            f"over at once, from {_LEAST_GROUPS * concurrent} on."
        )
    for index, prompt in enumerate(prompts):
        roles = [message["role"] for message in prompt]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            raise WorkloadError(
                f"{where}: prompts.{index} is said by {', '.join(roles) or 'nobody'}; expected user and "
                "assistant in turn, a user first and last."
            )
        if prompt in prompts[:index]:
            raise WorkloadError(f"{where}: prompts.{index} is there twice. Write another one.")
