"""Everything that clients do to a server, for minutes: does its memory grow, and does it keep its pace?"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from pocketlm_benchmarks.serving_client import Answered, Client
from pocketlm_benchmarks.serving_process import Served

TURNS = 6
"""Of a conversation, before it begins anew."""

_SEED = 0
_PEOPLE = 6  # clients at once, beside two conversations
_SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["yes", "no"]}},
    "required": ["sure", "kind"],
}


@dataclass(frozen=True)
class Sample:
    """One stretch of the run."""

    at_s: float  # its end
    own_bytes: int | None
    requests: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None


@dataclass
class Soak:
    samples: list[Sample] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)  # by kind
    errors: Counter[str] = field(default_factory=Counter)  # "kind: what came"

    @property
    def growth_mb_per_min(self) -> float | None:
        """The slope of the least-squares line through the samples' second half: caches fill up first."""
        half = [each for each in self.samples[len(self.samples) // 2 :] if each.own_bytes is not None]
        if len(half) < 2:
            return None
        slope, _ = np.polyfit([each.at_s for each in half], [each.own_bytes or 0 for each in half], 1)
        return float(slope) * 60 / 1e6

    @property
    def worst_p99_s(self) -> float | None:
        return max((each.ttft_p99_s for each in self.samples if each.ttft_p99_s is not None), default=None)


async def soak(
    server: Served, seconds: float, every_s: float, max_tokens: int, told: Callable[[Sample], object]
) -> Soak:
    """Drives `server` for so long; `told` is told each sample."""
    load = _Load(server.client, max_tokens)
    people = [load.person(number) for number in range(_PEOPLE)] + [load.conversation(n) for n in range(2)]
    tasks = [asyncio.create_task(each) for each in people]
    begun = time.monotonic()
    try:
        while (at_s := time.monotonic() - begun) < seconds:
            await asyncio.sleep(min(every_s, seconds - at_s))
            load.result.samples.append(load.sample(time.monotonic() - begun, server.own_bytes))
            told(load.result.samples[-1])
            for task in tasks:
                if task.done():
                    task.result()  # raises what ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return load.result


class _Load:
    def __init__(self, client: Client, max_tokens: int) -> None:
        self.result = Soak()
        self._client = client
        self._max_tokens = max_tokens
        self._random = np.random.default_rng(_SEED)
        self._ttfts_s: list[float] = []
        self._done = 0
        self._kinds: dict[str, Callable[[], Awaitable[str | None]]] = {
            "stream": self._stream,
            "whole": self._whole,
            "disconnect": self._disconnect,
            "slow reader": self._slow_reader,
            "bad request": self._bad_request,
            "JSON schema": self._json_schema,
            "embeddings": self._embeddings,
        }

    def sample(self, at_s: float, own_bytes: int | None) -> Sample:
        ttfts_s, self._ttfts_s = self._ttfts_s, []
        requests, self._done = self._done, 0
        p50, p99 = np.percentile(ttfts_s, (50, 99)) if ttfts_s else (None, None)
        return Sample(
            at_s,
            own_bytes,
            requests,
            None if p50 is None else float(p50),
            None if p99 is None else float(p99),
        )

    async def person(self, number: int) -> None:
        """One request after the other, each kind in its turn."""
        names = list(self._kinds)
        for turn in count(number):
            name = names[turn % len(names)]
            self._note(name, await self._kinds[name]())

    async def conversation(self, number: int) -> None:
        """Turns that share all that was said before."""
        name = f"conversation {number + 1}"
        while True:
            messages = [{"role": "system", "content": "Answer in few words. " * 5}]
            for _ in range(TURNS):
                messages.append({"role": "user", "content": self._words()})
                answered = await self._ask(messages)
                self._note(name, self._wrong(answered))
                if not answered.ok:
                    break
                messages.append({"role": "assistant", "content": answered.text})

    def _note(self, name: str, wrong: str | None) -> None:
        self._done += 1
        self.result.requests[name] += 1
        if wrong is not None:
            self.result.errors[f"{name}: {wrong}"] += 1

    def _words(self) -> str:
        return "Add " + " and ".join(str(each) for each in self._random.integers(100, 1000, 4)) + "."

    def _chat(self, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self._words()}]
        return {"messages": messages, "max_tokens": self._max_tokens, **more}

    async def _ask(self, messages: Sequence[dict[str, str]], **reading: Any) -> Answered:
        body = {"messages": messages, "max_tokens": self._max_tokens}
        answered = await self._client.chat(body, **reading)
        if answered.ttft_s is not None:
            self._ttfts_s.append(answered.ttft_s)
        return answered

    def _wrong(self, answered: Answered) -> str | None:
        return None if answered.ok else str(answered.status or "broken connection")

    async def _stream(self) -> str | None:
        return self._wrong(await self._ask(self._chat()["messages"]))

    async def _disconnect(self) -> str | None:
        return self._wrong(await self._client.chat(self._chat(ignore_eos=True), leave_after=2))

    async def _slow_reader(self) -> str | None:
        return self._wrong(await self._client.chat(self._chat(), pause_s=0.05))

    async def _whole(self) -> str | None:
        status, _ = await self._client.post("/chat/completions", self._chat(n=2, temperature=0.8, seed=1))
        return None if status == 200 else str(status)

    async def _bad_request(self) -> str | None:
        bodies = (b'{"messages": [', b'{"messages": [], "temperature": 1e400}', b"\xff" * 100)
        status, _ = await self._client.post("/chat/completions", bodies[self._random.integers(len(bodies))])
        return None if status in (400, 422) else str(status)

    async def _json_schema(self) -> str | None:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}}
        status, answer = await self._client.post(
            "/chat/completions", {**self._chat(response_format=form), "max_tokens": 64}
        )
        if status != 200:
            return str(status)
        try:
            choice = answer["choices"][0]
            wrong = choice["finish_reason"] != "stop" or json.loads(choice["message"]["content"]).keys() != {
                "sure",
                "kind",
            }
        except (ValueError, KeyError, TypeError):
            wrong = True
        return "not what the schema says" if wrong else None

    async def _embeddings(self) -> str | None:
        status, answer = await self._client.post("/embeddings", {"input": [self._words(), self._words()]})
        refused = status == 400 and _code(answer) == "no_embeddings"  # the model has none
        return None if status == 200 or refused else str(status)


def _code(answer: Any) -> Any:
    """What an error is called for programs."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return error.get("code") if isinstance(error, dict) else None
