"""What the harness asks of an engine, ours and a peer's alike.

An engine runs in a process of its own (`worker.py`), so that its threads, its memory and its crashes are its
own; the harness talks to it through `EngineProcess` (`process.py`). An adapter is one module with one class
that satisfies `Engine`; it imports its engine's package only in `__init__`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

from pocketlm.errors import PocketlmError


class EngineError(PocketlmError):
    """An engine failed: it could not load its weights, crashed or gave an answer that makes no sense."""


class EngineMissingError(EngineError):
    """An engine is not installed, or cannot do what a case asks; it is skipped, and the message says why."""


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Query:
    """One prompt, answered greedily from an empty cache, `new_tokens` long whatever the model would end."""

    prompt_ids: tuple[int, ...]  # with the chat template applied
    new_tokens: int
    messages: tuple[Message, ...] = ()  # the same prompt for an engine that takes only messages; or nothing


@dataclass(frozen=True)
class Trace:
    """How one query went, in seconds. None is what the engine does not tell."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, not computed again
    new_tokens: int
    prefill_s: float | None  # from handing the prompt over to the first token
    decode_s: float | None  # for `decode_tokens`
    decode_tokens: int  # new_tokens − 1, as the first comes from prefill; an engine may count otherwise
    gaps_s: tuple[float, ...]  # between the arrivals of the tokens behind the first; may be empty
    text: str


@dataclass(frozen=True)
class EngineSpec:
    """Which engine, on which weights."""

    kind: str  # "pocketlm", "llama.cpp", "llama-bench", "onnxruntime-genai", "openvino", …
    weights: str  # a file, a folder or a URL
    threads: int
    context_length: int  # tokens that a query takes at most, prompt and answer
    python: str | None = None  # the interpreter to run it with; None: this one
    program: str | None = None  # the engine's own program, where it has one


EnergySeen = Literal["process", "machine", "never"]
"""Which probes see the energy of an engine's queries while they run: any, as it computes in its worker's
process or a child of that; only those that watch the whole machine, as it computes elsewhere on it; or none,
as it computes on another machine or its windows hold other work too."""


@dataclass(frozen=True)
class EngineInfo:
    """What runs, once it is loaded."""

    name: str  # "llama.cpp"
    version: str
    precision: str  # as the engine names it: "Q8_0", "int4", "float32"; "unknown" where it does not tell
    weight_bytes: int | None
    load_s: float | None
    sampling_included: bool  # whether its times hold sampling and detokenization
    note: str = ""  # what a reader of its figures has to know
    energy_seen: EnergySeen = "process"


class Engine(Protocol):
    """Loaded by `__init__(spec: EngineSpec)`, which raises EngineMissingError or EngineError."""

    info: EngineInfo

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        """Answers all queries, concurrently if the engine can, one after the other if not.

        With several, `prefill_s` counts from the moment that all were handed over.
        Raises EngineMissingError for a case that the engine cannot do and EngineError.
        """
        ...

    def close(self) -> None: ...
