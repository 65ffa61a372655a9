"""Generation in layers: token ids, then text, then a whole answer.

rewind, prefill    prompt ids → logits           only what the cache lacks is computed
generate_tokens    logits → token ids            one forward pass each
Stream             token ids → pieces of text    whole characters, stop strings taken out
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from pocketlm.kv_cache import KVCache
from pocketlm.sampling import Sampler
from pocketlm.session import Session
from pocketlm.stops import StopMatcher
from pocketlm.tokenizer import TextStream

FinishReason = Literal["stop", "length", "cancelled"]

PREFILL_CHUNK = 128
"""Tokens in one forward pass of a prompt. Attention's scratch memory grows with it, and with that memory
time; fewer rows leave the matrix products' speed unused."""


@dataclass(frozen=True)
class Piece:
    """What one token added. `text` may be empty: half a character, or perhaps the start of a stop string."""

    text: str
    token_id: int
    logprob: float  # nats, under the model's own distribution, whatever the sampling


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in a cache and not computed again
    completion_tokens: int  # an end-of-text token included

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds of work, sampling and detokenization included. Rates are None where there is nothing to rate.

    The clocks stand still while the caller holds a piece.
    """

    prefill_s: float
    decode_s: float  # for all tokens behind the first
    ttft_s: float  # time to first token, from when it was asked for
    total_s: float
    prefill_tokens_per_s: float | None  # of the tokens that were not cached
    decode_tokens_per_s: float | None  # of the tokens behind the first


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


def rewind(cache: KVCache, ids: Sequence[int]) -> int:
    """Shortens the cache to what it can lend to `ids`; returns how many tokens that is.

    The last one's logits are not in the cache, so it stays to be computed, and one more with it, so that
    they are computed as in any prompt (see `KVCache`).
    """
    cache.truncate(min(cache.reusable(ids), max(0, len(ids) - 2)))
    return len(cache)


def passes(start: int, end: int, chunk: int = PREFILL_CHUNK) -> Iterator[tuple[int, int]]:
    """Where the forward passes over the tokens `start` … `end` − 1 of a prompt begin and end.

    `chunk` is how many tokens go in one; from three on, none goes alone if it can be helped (see `KVCache`).
    """
    while start < end:
        count = chunk - 1 if end - start == chunk + 1 and chunk > 2 else chunk
        yield start, min(start + count, end)
        start += count


def prefill(
    session: Session, cache: KVCache, ids: Sequence[int], chunk: int = PREFILL_CHUNK
) -> NDArray[np.float32]:
    """Computes what the cache lacks of `ids`, of which it holds a proper prefix.

    Returns the logits (vocabulary) behind the last one, in a buffer that the next pass overwrites.
    """
    logits = np.empty((1, 0), np.float32)
    for start, end in passes(len(cache), len(ids), chunk):
        logits = session.forward(ids[start:end], cache)
    last: NDArray[np.float32] = logits[0]
    return last


def generate_tokens(
    session: Session,
    cache: KVCache,
    logits: NDArray[np.float32],
    sampler: Sampler,
    *,
    eos: Collection[int],
    limit: int,
) -> Iterator[tuple[int, float]]:
    """At most `limit` tokens and their log-probabilities; an id of `eos` is the last."""
    for remaining in range(limit - 1, -1, -1):
        token_id, logprob = sampler.sample(logits)
        yield token_id, logprob
        if token_id in eos or not remaining:
            return
        logits = session.forward([token_id], cache)[0]


class Stream:
    """An answer under way: iterate for its pieces, `close()` to stop early, `completion` for what there is.

    The cache belongs to the stream until it ends; `on_end` is then called once, in whatever way it ended.
    """

    def __init__(
        self,
        session: Session,
        cache: KVCache,
        prompt: Sequence[int],
        sampler: Sampler,
        decoder: TextStream,
        stops: StopMatcher,
        *,
        eos: Collection[int],
        limit: int,
        settle: bool = False,
        on_end: Callable[[Stream], None],
    ) -> None:
        """`prompt` and at most `limit` tokens of answer fit the cache.

        `settle` computes the answer once more when it is complete, as a prompt, so that what follows it can
        reuse it (see `KVCache`). The timings do not count it.
        """
        self.cache = cache
        self._on_end: Callable[[Stream], None] | None = on_end
        # The generator does not know the stream, so a stream that is dropped is freed, and ends, at once.
        self._answer = _Answer(prompt, decoder, stops, eos, limit)
        self._pieces = self._answer.pieces(session, cache, sampler, settle=settle)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        finally:
            if getgeneratorstate(self._pieces) == GEN_CLOSED:  # it has returned or failed
                self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the answer here. What was generated so far stays in `completion`."""
        self._pieces.close()
        self._end()

    @property
    def completion(self) -> Completion:
        """The answer so far. Its finish reason is "cancelled" unless it came to its own end."""
        return self._answer.completion()

    def _end(self) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)


class _Answer:
    """What a stream has generated so far."""

    def __init__(
        self,
        prompt: Sequence[int],
        decoder: TextStream,
        stops: StopMatcher,
        eos: Collection[int],
        limit: int,
    ) -> None:
        self._prompt = prompt
        self._decoder = decoder
        self._stops = stops
        self._eos = eos
        self._limit = limit
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason = "cancelled"
        self._cached_tokens = 0
        self._prefill_s = self._ttft_s = self._decode_s = 0.0

    def pieces(
        self, session: Session, cache: KVCache, sampler: Sampler, *, settle: bool
    ) -> Generator[Piece, None, None]:
        # Clocks run only between two pieces, so that a slow reader does not look like a slow model.
        begun = time.perf_counter()
        self._cached_tokens = rewind(cache, self._prompt)
        logits = prefill(session, cache, self._prompt)
        self._prefill_s = time.perf_counter() - begun
        tokens = generate_tokens(session, cache, logits, sampler, eos=self._eos, limit=self._limit)
        for token_id, logprob in tokens:
            piece = Piece(self._accept(token_id), token_id, logprob)
            elapsed = time.perf_counter() - begun
            if len(self._token_ids) == 1:
                self._ttft_s = elapsed
            else:
                self._decode_s += elapsed
            yield piece
            if self._finish_reason != "cancelled":
                break
            begun = time.perf_counter()
        if settle:
            sequence = [*self._prompt, *self._token_ids]
            rewind(cache, sequence)
            prefill(session, cache, sequence)

    def completion(self) -> Completion:
        count = len(self._token_ids)
        computed = len(self._prompt) - self._cached_tokens
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            usage=Usage(len(self._prompt), self._cached_tokens, count),
            timings=Timings(
                prefill_s=self._prefill_s,
                decode_s=self._decode_s,
                ttft_s=self._ttft_s,
                total_s=self._ttft_s + self._decode_s,
                prefill_tokens_per_s=computed / self._prefill_s if self._prefill_s else None,
                decode_tokens_per_s=(count - 1) / self._decode_s if self._decode_s else None,
            ),
        )

    def _accept(self, token_id: int) -> str:
        """Adds a token to the answer; returns the text that is certain with it."""
        self._token_ids.append(token_id)
        at_eos, at_limit = token_id in self._eos, len(self._token_ids) == self._limit
        text, stopped = self._stops.push("" if at_eos else self._decoder.push(token_id))
        if not stopped and (at_eos or at_limit):
            rest, stopped = self._stops.push(self._decoder.flush())
            text += rest if stopped else rest + self._stops.flush()
        if stopped or at_eos:
            self._finish_reason = "stop"
        elif at_limit:
            self._finish_reason = "length"
        self._text.append(text)
        return text
