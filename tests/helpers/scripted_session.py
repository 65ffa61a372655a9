"""A session without a graph, whose model says what a test wants, and an engine on it.

Every pass checks that the caches it gets really hold what they say they hold: the script's "keys and values"
are the token ids themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Self

import numpy as np

from helpers.tiny import END_OF_TEXT, IM_END, VOCABULARY, Array, tokenizer_json
from pocketlm.generate import Answer, Channel, Stream
from pocketlm.kv_cache import KVCache
from pocketlm.kv_pool import KVPool
from pocketlm.manifest import Dimensions, Tokens
from pocketlm.sampling import Sampler, Sampling
from pocketlm.scheduler import Request, Scheduler
from pocketlm.stops import StopMatcher
from pocketlm.tokenizer import Tokenizer

DIMENSIONS = Dimensions(1, 8, 16, 2, 1, 4, VOCABULARY, 2048)
TOKENIZER = Tokenizer(tokenizer_json(), None, Tokens(None, (END_OF_TEXT,), False))
PATIENCE_S = 30
"""How long a test waits for what must happen before it fails."""

Follow = Callable[[Sequence[int]], int]


def count_up(ids: Sequence[int]) -> int:
    """Each token is followed by the next number, up to 99, and that by 0."""
    return (ids[-1] + 1) % 100


def says(answer: Sequence[int], *, behind: int) -> Follow:
    """Behind a prompt of so many tokens the model wants `answer`, whatever it is given."""
    return lambda ids: answer[len(ids) - behind]


@dataclass(frozen=True)
class Pass:
    """One forward pass: by the first token of each sequence, how many tokens it got."""

    tokens: Mapping[int, int]
    rows: int
    together: bool = False
    slots: int = 1
    """How many took part, idle ones between the others included."""

    @property
    def names(self) -> set[int]:
        return set(self.tokens)


@dataclass
class ScriptedSession:
    """Stands in for a Session: `follow` says which token the model wants behind a sequence."""

    follow: Follow = count_up
    on_pass: Callable[[Pass], None] = lambda each: None
    """Called on the engine's thread before each pass; what it raises, the pass raises."""
    passes: list[Pass] = field(default_factory=list)

    def forward(self, ids: Sequence[int], cache: KVCache, rows: Sequence[int] | None = None) -> Array:
        rows = [len(ids) - 1] if rows is None else rows
        sequence = [*cache.ids, *ids]
        self._begin(Pass({sequence[0]: len(ids)}, len(rows)))
        self._write(cache, ids)
        return self._logits([sequence[: len(sequence) - len(ids) + row + 1] for row in rows])

    def forward_each(self, ids: Mapping[KVCache, int]) -> Array:
        slots = next(iter(ids)).slots
        places = [cache.index for cache in ids]
        between = slots.caches[min(places) : max(places) + 1]
        tokens = {[*cache.ids, token_id][0]: 1 for cache, token_id in ids.items()}
        self._begin(Pass(tokens, len(ids), True, len(between)))
        for cache in between:
            assert cache.slots is slots
            if cache not in ids:
                cache.buffer[..., len(cache), :] = -1  # a token that does not count
        for cache, token_id in ids.items():
            self._write(cache, [token_id])
        return self._logits([cache.ids for cache in ids])

    def _begin(self, each: Pass) -> None:
        self.passes.append(each)
        self.on_pass(each)

    @staticmethod
    def _write(cache: KVCache, ids: Sequence[int]) -> None:
        assert len(cache) + len(ids) <= cache.capacity
        cache.buffer[..., len(cache) : len(cache) + len(ids), :] = np.array(ids)[:, None]
        cache.append(ids)
        check_content(cache)

    def _logits(self, sequences: Sequence[Sequence[int]]) -> Array:
        logits = np.zeros((len(sequences), VOCABULARY), np.float32)
        for row, sequence in zip(logits, sequences, strict=True):
            row[self.follow(sequence)] = 9.0
        return logits


def check_content(cache: KVCache) -> None:
    """What is in the buffer is what the cache says."""
    held = cache.buffer[0, 0, 0, 0, : len(cache), 0].astype(int).tolist()
    assert held == cache.ids, f"the cache says {cache.ids} and holds {held}"


class Gate:
    """Lets the engine do one pass at a time: `on_pass` of a session."""

    def __init__(self) -> None:
        self._arrived: SimpleQueue[Pass] = SimpleQueue()
        self._permits = threading.Semaphore(0)
        self._open = False

    def __call__(self, each: Pass) -> None:
        if not self._open:
            self._arrived.put(each)
            assert self._permits.acquire(timeout=PATIENCE_S)

    def arrived(self) -> Pass:
        """Waits until the engine is at its next pass; it stays there."""
        return self._arrived.get(timeout=PATIENCE_S)

    def go(self) -> None:
        """Lets it go on from there."""
        self._permits.release()

    def step(self) -> Pass:
        each = self.arrived()
        self.go()
        return each

    def open(self) -> None:
        """Lets it go on for good."""
        self._open = True
        self._permits.release()


class ScriptedEngine:
    """A scheduler on a script. As a context it is closed at the end, whatever the engine is waiting for."""

    def __init__(
        self,
        session: Any = None,
        *,
        capacity: int = 2048,
        budget_bytes: int = 1 << 20,
        **options: Any,
    ) -> None:
        self.session: ScriptedSession = session or ScriptedSession()
        self.pool = KVPool(DIMENSIONS, capacity, budget_bytes)
        self.scheduler = Scheduler(self.session, self.pool, **options)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.session.on_pass, Gate):
            self.session.on_pass.open()
        self.scheduler.close()

    def request(
        self,
        prompt: Sequence[int],
        *,
        limit: int = 10,
        stop: str | Sequence[str] = (),
        eos: Sequence[int] = (END_OF_TEXT, IM_END),
        sampler: Any = None,
        **options: Any,
    ) -> Request:
        return Request(
            list(prompt),
            sampler or Sampler(Sampling(), VOCABULARY, ()),
            Answer(TOKENIZER.stream(continues=True), StopMatcher(stop), eos, limit),
            Channel(len(prompt)),
            **options,
        )

    def stream(self, prompt: Sequence[int], **options: Any) -> Stream:
        request = self.request(prompt, **options)
        stream = Stream(request.channel)
        self.scheduler.submit(request)
        return stream

    def ids(self, prompt: Sequence[int], **options: Any) -> list[int]:
        """The tokens of a whole answer."""
        return list(self.stream(prompt, **options).finish().token_ids)

    def idle(self) -> None:
        """Waits until the engine has looked at everything that there is."""
        self.scheduler.call(lambda pool: None).result(PATIENCE_S)
        self.scheduler.call(lambda pool: None).result(PATIENCE_S)


def wait_for(thread: threading.Thread) -> None:
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"{thread.name} waits for ever"


def read(stream: Stream) -> list[int]:
    """The tokens of what is left of it; fails where it does not come to an end."""
    found: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            found.extend(piece.token_id for piece in stream)
        except Exception as error:
            errors.append(error)

    reader = threading.Thread(target=work, name="reader", daemon=True)
    reader.start()
    wait_for(reader)
    if errors:
        raise errors[0]
    return found
