"""An answer on its way: token ids become pieces of text on the engine's thread, a reader takes them.

Answer    sampled tokens → pieces       whole characters, stop strings taken out; says when it ends
Channel   the engine's thread → the reader's
Stream    the reader's end: iterate for pieces, `close()` to stop early, `completion` for what there is
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, Self

from pocketlm.sampling import Sampled
from pocketlm.stops import StopMatcher
from pocketlm.tokenizer import TextStream
from pocketlm.tools import ToolCall, ToolCallParser

FinishReason = Literal["stop", "length", "cancelled", "timeout"]

READ_AHEAD = 256
"""Pieces that may wait for their reader; then the engine leaves the answer alone until some are read."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added. `text` may be empty: half a character, or perhaps the start of a stop string.

    Log-probabilities are in nats, under the model's own distribution, whatever the sampling; where the form
    of the answer is given, among the tokens that it allows.
    """

    text: str
    token_id: int
    logprob: float | None = None  # None: not asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the most likely token ids, the first one first
    tool_calls: tuple[ToolCall, ...] = ()  # those that are whole with this token; they are no part of texts
    stop: str | None = None  # the stop string that ends the answer here; it is no part of texts


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in a cache and not computed again
    completion_tokens: int  # an end-of-text token included
    dropped_messages: int = 0  # the oldest of the conversation, left out because it outgrew the context

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds. Rates are None where there is nothing to rate.

    While several answers share the engine, each one's seconds hold the work for the others too, except
    `prefill_s` and `compute_s`.
    """

    queue_s: float  # waited for the engine to begin
    prefill_s: float
    decode_s: float  # for all tokens behind the first
    ttft_s: float  # time to first token, from when it was asked for
    total_s: float  # until the last token
    prefill_tokens_per_s: float | None  # of the tokens that were not cached
    decode_tokens_per_s: float | None  # of the tokens behind the first
    drafted_tokens: int = 0  # by speculation
    accepted_tokens: int = 0  # of the drafted ones, those that the model agreed with
    compute_s: float = 0.0  # the engine's work for this answer: prefill, its part of shared passes, sampling


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    pieces: tuple[Piece, ...] = ()

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """What the model wants to have called."""
        return tuple(call for piece in self.pieces for call in piece.tool_calls)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self.pieces[-1].stop if self.pieces else None


class Answer:
    """What has been generated so far, as text. For the engine's thread."""

    def __init__(
        self,
        decoder: TextStream,
        stops: StopMatcher,
        eos: Collection[int],
        limit: int,
        calls: ToolCallParser | None = None,
    ) -> None:
        """`limit` is in tokens; `calls` takes tool calls out of the text."""
        self._decoder = decoder
        self._stops = stops
        self._eos = eos
        self._calls = calls
        self.limit = limit
        self.count = 0  # tokens

    def add(self, sampled: Sampled, *, last: bool = False) -> tuple[Piece, FinishReason | None]:
        """The piece that the token adds, and why the answer ends with it, if it does.

        `last` says that nothing can follow, for other reasons than those that are looked at here.
        """
        self.count += 1
        at_eos, at_limit = sampled.token_id in self._eos, self.count == self.limit
        text, stopped = self._stops.push("" if at_eos else self._decoder.push(sampled.token_id))
        if not stopped and (at_eos or at_limit or last):
            rest, stopped = self._stops.push(self._decoder.flush())
            text += rest if stopped else rest + self._stops.flush()
        reason: FinishReason | None = None
        if stopped or at_eos or last:
            reason = "stop"
        elif at_limit:
            reason = "length"
        text, calls = self._without_calls(text, last=reason is not None)
        return Piece(text, sampled.token_id, sampled.logprob, sampled.top, calls, self._stops.stop), reason

    def _without_calls(self, text: str, *, last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        if self._calls is None:
            return text, ()
        parts = self._calls.feed(text) + (self._calls.finish() if last else [])
        calls = tuple(part for part in parts if isinstance(part, ToolCall))
        return "".join(part for part in parts if isinstance(part, str)), calls


@dataclass(frozen=True, slots=True)
class _Emitted:
    piece: Piece
    at: float  # perf_counter


@dataclass(frozen=True, slots=True)
class _End:
    reason: FinishReason
    error: BaseException | None


class Channel:
    """Pieces on their way to the reader, and what the engine notes about the answer meanwhile.

    The engine does not know the stream: one that is dropped is freed, and cancels, at once.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.prefill_s = 0.0
        self.compute_s = 0.0
        self.asked_at = time.perf_counter()
        self.begun_at: float | None = None
        self.cancelled = False
        self.paused = False  # whether the engine waits for the reader
        self.wake: Callable[[], None] = lambda: None
        """Tells the engine that something has changed."""
        self.on_item: Callable[[], None] | None = None
        """Called on the engine's thread for each item that has come: it must return at once."""
        self._items: SimpleQueue[_Emitted | _End] = SimpleQueue()

    def put(self, piece: Piece) -> None:
        self._put(_Emitted(piece, time.perf_counter()))

    def end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        self._put(_End(reason, error))

    def _put(self, item: _Emitted | _End) -> None:
        self._items.put(item)
        if self.on_item is not None:
            self.on_item()

    def get(self) -> _Emitted | _End:
        item = self._items.get()
        if self.paused and self._items.qsize() < READ_AHEAD // 2:
            self.paused = False
            self.wake()
        return item

    @property
    def ready(self) -> bool:
        """Whether `get` would return at once."""
        return not self._items.empty()

    def pause_if_full(self) -> bool:
        self.paused = True  # before the look, so that a reader who makes room meanwhile sees it
        if self._items.qsize() < READ_AHEAD:
            self.paused = False
        return self.paused

    def cancel(self) -> None:
        self.cancelled = True
        self.wake()


class Stream:
    """An answer under way: iterate for its pieces, `close()` to stop early, `completion` for what there is.

    The engine computes it on its own thread, some way ahead of the reader. `close()` may be called from any
    thread. `on_end` is called once, on a reader's thread, in whatever way it ended.
    """

    def __init__(
        self,
        channel: Channel,
        on_end: Callable[[Stream], None] | None = None,
        dropped_messages: int = 0,
        owner: object = None,
    ) -> None:
        """`owner` is kept as long as the stream: a model that is dropped ends its answers."""
        self._owner = owner
        self._channel = channel
        self._on_end = [] if on_end is None else [on_end]
        self._dropped_messages = dropped_messages
        self._pieces: list[Piece] = []
        self._first_at = self._last_at = channel.asked_at
        self._finish_reason: FinishReason = "cancelled"
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        item = self._channel.get()
        if self._ended:  # by another thread meanwhile
            self._channel.end("cancelled")  # wakes the next one, if several wait
            raise StopIteration
        if isinstance(item, _End):
            self._finish_reason = item.reason
            self._end()
            if item.error is not None:
                raise item.error
            raise StopIteration
        self._pieces.append(item.piece)
        self._last_at = item.at
        if len(self._pieces) == 1:
            self._first_at = item.at
        return item.piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the answer here. What was read of it so far stays in `completion`."""
        if not self._ended:
            self._channel.cancel()
            self._end()

    def finish(self) -> Completion:
        """Reads the answer to its end."""
        with self:
            for _ in self:
                pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The answer as far as it was read; "cancelled" is why it ended unless it was read to the end."""
        channel, count = self._channel, len(self._pieces)
        computed = channel.prompt_tokens - channel.cached_tokens
        decode_s = self._last_at - self._first_at
        begun_at = channel.asked_at if channel.begun_at is None else channel.begun_at
        return Completion(
            text="".join(piece.text for piece in self._pieces),
            token_ids=tuple(piece.token_id for piece in self._pieces),
            finish_reason=self._finish_reason,
            usage=Usage(channel.prompt_tokens, channel.cached_tokens, count, self._dropped_messages),
            timings=Timings(
                queue_s=begun_at - channel.asked_at,
                prefill_s=channel.prefill_s,
                decode_s=decode_s,
                ttft_s=self._first_at - channel.asked_at,
                total_s=self._last_at - channel.asked_at,
                prefill_tokens_per_s=computed / channel.prefill_s if channel.prefill_s else None,
                decode_tokens_per_s=(count - 1) / decode_s if decode_s else None,
                drafted_tokens=channel.drafted_tokens,
                accepted_tokens=channel.accepted_tokens,
                compute_s=channel.compute_s,
            ),
            pieces=tuple(self._pieces),
        )

    def _end(self) -> None:
        self._ended = True
        self._channel.end("cancelled")  # wakes a reader that waits in another thread
        # Two threads may come here at once; only one of them gets it.
        with contextlib.suppress(IndexError):
            self._on_end.pop()(self)
