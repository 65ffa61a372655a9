"""Any server that speaks OpenAI's HTTP interface: llama-server, vLLM, Ollama, LM Studio.

What a server can do is found out by asking it: a first, tiny request with token ids; where it refuses those,
one with a message; each with the fields that make an answer comparable (no end of text, no prompt cache),
which are llama-server's and partly vLLM's, or else without them.

After the reference of OpenAI's completions and chat completions with `stream` and `stream_options`, and
llama.cpp's tools/server/README.md.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pocketlm_benchmarks.engines.http_json import Server
from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineInfo,
    EngineMissingError,
    EngineSpec,
    Message,
    Query,
    Trace,
)

LLAMA_SERVER = "llama-server"
_EXTRAS: dict[str, Any] = {"ignore_eos": True, "cache_prompt": False}
_FIRST = Query((1, 2, 3), 2, (Message(role="user", content="Hello"),))  # ids that every vocabulary has


@dataclass(frozen=True)
class Manner:
    """How a server takes a prompt."""

    ids: bool  # token ids, as completions; else messages, as chat completions
    extras: bool  # whether it takes the fields that make an answer comparable

    @property
    def path(self) -> str:
        return "/completions" if self.ids else "/chat/completions"


@dataclass(frozen=True)
class Answer:
    """What a stream held. Times are on the monotonic clock."""

    handed_over_s: float
    arrivals_s: tuple[float, ...]  # of the chunks, which mostly hold one token
    text: str
    usage: dict[str, Any] | None  # the server's own counts


class OpenAIServer:
    """Hands all queries over at once, each on a connection of its own; the server batches them or not."""

    def __init__(self, spec: EngineSpec) -> None:
        """`spec.weights` is the URL, with #MODEL behind it where the server has several.

        Raises EngineMissingError if nothing answers there, and EngineError.
        """
        url, _, model = spec.weights.partition("#")
        self._server = Server(url)
        try:
            listed = self._server.get("/models")["data"]
        except (OSError, KeyError, TypeError) as error:
            raise EngineMissingError(f"no OpenAI-compatible server answers at {url} ({error!r})") from None
        self._model = model or _only_model([entry["id"] for entry in listed], url)
        self._manner, has_usage = self._manner_of_server()
        entry: dict[str, Any] = next((entry for entry in listed if entry["id"] == self._model), {})
        # llama-server tells more than the standard asks for.
        meta = entry.get("meta") or {}
        name, version = self._identity(entry)
        self.info = EngineInfo(
            name=name,
            version=version,
            precision=str(meta.get("ftype") or "unknown"),
            weight_bytes=meta.get("size"),
            load_s=None,
            sampling_included=True,
            note=_note(name, self._manner, has_usage),
            energy_seen="machine" if _is_loopback(self._server.host) else "never",
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        if not self._manner.ids and not all(query.messages for query in queries):
            raise EngineMissingError(
                "this server takes no token ids, so the synthetic cases cannot be put to it; workloads can"
            )
        with ThreadPoolExecutor(len(queries)) as threads:
            handed_over_s = time.perf_counter()
            answers = list(threads.map(lambda query: self._ask(query, self._manner), queries))
        return [_trace(query, answer, handed_over_s) for query, answer in zip(queries, answers, strict=True)]

    def close(self) -> None:
        """Each query has closed its connection."""

    def _manner_of_server(self) -> tuple[Manner, bool]:
        """The most comparable manner that works, and whether the server then counts tokens."""
        problem = ""
        for manner in (Manner(ids, extras) for ids in (True, False) for extras in (True, False)):
            try:
                usage = self._ask(_FIRST, manner).usage
            except EngineError as error:
                problem = str(error)
                continue
            # A server that takes ids for text answers too; its count of the prompt's tokens gives it away.
            if not manner.ids or (usage and usage.get("prompt_tokens") == len(_FIRST.prompt_ids)):
                return manner, usage is not None
        raise EngineError(f"{problem}. Name the model behind the URL if it is another one: URL#MODEL.")

    def _ask(self, query: Query, manner: Manner) -> Answer:
        prompt = {"prompt": list(query.prompt_ids)} if manner.ids else {"messages": list(query.messages)}
        body = {
            "model": self._model,
            **prompt,
            "max_tokens": query.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(_EXTRAS if manner.extras else {}),
        }
        handed_over_s = time.perf_counter()
        arrivals_s: list[float] = []
        text: list[str] = []
        usage: dict[str, Any] | None = None
        for chunk in self._server.stream(manner.path, body):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                piece = _piece(choice)
                if piece is not None:
                    arrivals_s.append(time.perf_counter())
                    text.append(piece)
        return Answer(handed_over_s, tuple(arrivals_s), "".join(text), usage)

    def _identity(self, entry: dict[str, Any]) -> tuple[str, str]:
        """Name and version, each server in its own way."""
        if entry.get("owned_by") == "llamacpp":
            return LLAMA_SERVER, str(self._asked("/props").get("build_info", "unknown"))
        if entry.get("owned_by") == "vllm":
            return "vllm", str(self._asked("/version").get("version", "unknown"))
        if version := self._asked("/api/version").get("version"):
            return "ollama", str(version)
        return "server", "unknown"

    def _asked(self, path: str) -> dict[str, Any]:
        """What the server says at `path` beside its OpenAI interface, or nothing."""
        with contextlib.suppress(OSError, EngineError):
            found = self._server.get(path, beside=True)
            return found if isinstance(found, dict) else {}
        return {}


def _piece(choice: dict[str, Any]) -> str | None:
    """The text of a token; None for a chunk that opens or ends an answer.

    A token may have no text: half a character, or a control token.
    """
    delta = choice.get("delta")
    if delta is None:
        piece = choice.get("text") or ""
        opens = False
    else:
        piece = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
        opens = "role" in delta
    ends = choice.get("finish_reason") is not None
    return None if not piece and (opens or ends) else str(piece)


def _trace(query: Query, answer: Answer, handed_over_s: float) -> Trace:
    usage, arrivals_s = answer.usage or {}, answer.arrivals_s
    if not arrivals_s:
        raise EngineError("the server answered without a token")
    new_tokens = int(usage.get("completion_tokens") or len(arrivals_s))
    gaps_s = tuple(later - earlier for earlier, later in pairwise(arrivals_s))
    details = usage.get("prompt_tokens_details") or {}
    return Trace(
        prompt_tokens=int(usage.get("prompt_tokens") or len(query.prompt_ids)),
        cached_tokens=int(details.get("cached_tokens") or 0),
        new_tokens=new_tokens,
        prefill_s=arrivals_s[0] - handed_over_s,
        decode_s=arrivals_s[-1] - arrivals_s[0] if len(arrivals_s) > 1 else None,
        decode_tokens=new_tokens - 1,
        # Where a chunk held more or less than a token, the gaps are not between tokens.
        gaps_s=gaps_s if len(arrivals_s) == new_tokens else (),
        text=answer.text,
    )


def _only_model(names: list[str], url: str) -> str:
    if len(names) == 1:
        return names[0]
    raise EngineError(f"{url} has {len(names)} models; name one: {url}#MODEL. It has: {', '.join(names)}")


def _note(name: str, manner: Manner, has_usage: bool) -> str:
    facts = ["over HTTP, with the server's own number of threads"]
    facts.append("prompts as token ids" if manner.ids else "prompts as messages, through its own template")
    if name != LLAMA_SERVER or not manner.extras:  # others take the fields and may not heed them
        facts.append("answers may end early and prompts may come from its cache")
    if not has_usage:
        facts.append("tokens counted by the chunks that came")
    return "; ".join(facts)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
