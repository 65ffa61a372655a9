"""Many answers from one model: one thread computes, requests join and leave between any two steps.

A step is one chunk of one prompt, then one token for each answer under way, so that a long prompt holds the
others up by no more than a chunk. Prompts take turns. Answers under way share a forward pass; one that is
alone may be sped up by speculation instead (see `speculate`). The method is known as continuous batching
(Orca, Yu et al., OSDI 2022), with the chunked prefill of Sarathi (Agrawal et al., arXiv 2308.16369).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread, current_thread
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pocketlm.compute_time import ComputeTime
from pocketlm.constraint import Constraint
from pocketlm.errors import PocketlmError
from pocketlm.generate import Answer, Channel, FinishReason
from pocketlm.kv_cache import KVCache
from pocketlm.kv_pool import KVPool
from pocketlm.prefill import PREFILL_CHUNK, passes
from pocketlm.sampling import Sampler
from pocketlm.session import Session
from pocketlm.speculate import LONGEST_DRAFT, Speculator

T = TypeVar("T")


class QueueFullError(PocketlmError):
    """More requests wait for the engine than it is allowed to keep."""

    def __init__(self, waiting: int, more: int) -> None:
        super().__init__(
            f"{waiting:,} requests wait for the engine already; with {more:,} more it would be beyond its "
            "limit. Try again later, or load the model with a larger queue_limit."
        )
        self.waiting = waiting


@dataclass(eq=False)
class Request:
    """A prompt, and all that is needed to answer it."""

    prompt: list[int]
    sampler: Sampler
    answer: Answer
    channel: Channel
    constraint: Constraint | None = None
    speculator: Speculator | None = None
    cache_prompt: bool = True  # whether what is cached may be used, and what is computed is kept
    settle: bool = False  # whether the answer is computed again as a prompt, for the next turn (`KVCache`)
    deadline: float | None = None  # of time.perf_counter
    after: Request | None = None  # begins when that one's prompt is computed, to share it
    cache: KVCache | None = field(default=None, init=False)
    newest: int | None = field(default=None, init=False)  # the token that is not in the cache yet
    finished: FinishReason | None = field(default=None, init=False)
    ended: bool = field(default=False, init=False)

    @property
    def prefilled(self) -> bool:
        return self.newest is not None or self.ended

    def end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        self.ended = True
        self.channel.end(reason, error)


class Scheduler:
    """The engine's thread and what it works on. `submit` and `close` may be called from any thread."""

    def __init__(
        self,
        session: Session,
        pool: KVPool,
        *,
        chunk: int = PREFILL_CHUNK,
        concurrency: int = 8,
        queue_limit: int = 64,
        reproducible: bool = False,
    ) -> None:
        """`concurrency` is how many requests are under way at most, those aside that wait for their reader;
        `queue_limit` is how many more may wait.

        `reproducible` computes every token as a prompt's are, at least two at a time and each answer by
        itself, so that speculation changes no bit of the logits either (see `KVCache`).
        """
        self._session = session
        self._pool = pool
        self._chunk = chunk
        self._concurrency = concurrency
        self._queue_limit = queue_limit
        self._reproducible = reproducible
        self._time = ComputeTime()
        self._changed = Condition()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # the engine's thread alone changes it
        self._unsettled: deque[tuple[KVCache, list[int]]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = self._closed = False
        self._thread: Thread | None = None

    def submit(self, *requests: Request) -> None:
        """Raises QueueFullError, or PocketlmError after `close`, and then takes none of them."""
        with self._changed:
            self._start()
            taken = sum(not each.channel.cancelled for each in self._requests())
            if taken + len(requests) > self._concurrency + self._queue_limit:
                raise QueueFullError(len(self._waiting), len(requests))
            for request in requests:
                request.channel.wake = self._wake
            self._waiting.extend(requests)

    def call(self, work: Callable[[KVPool], T]) -> Future[T]:
        """Runs `work` on the engine's thread, between two steps. Raises PocketlmError after `close`."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work(self._pool))
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            self._start()
            self._calls.append(run)
        return future

    def close(self) -> None:
        """Ends what is under way as cancelled, and the thread with it."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is None:
            self._pool.close()
        elif thread is not current_thread():
            thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are under way, and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    def busy_s(self) -> float:
        """Seconds that the engine's thread has computed so far, for answers (`Timings.compute_s`) and for
        nobody: what was called between steps, and the settling of answers that have ended."""
        return self._time.busy_s

    def _start(self) -> None:
        """Has the thread look at what is about to change. The lock is held."""
        if self._closed:
            raise PocketlmError("The model has been closed. Load it again.")
        if self._thread is None:
            # A daemon: a program that forgets to close a model can end all the same.
            self._thread = Thread(target=self._run, name="pocketlm-engine", daemon=True)
            self._thread.start()
        self._woken = True
        self._changed.notify()

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def _run(self) -> None:
        while self._await_work():
            try:
                self._step()
            except BaseException as error:  # whatever it was, nobody must wait for ever
                for request in self._requests():
                    self._end(request, "cancelled", error)
        for request in self._requests():
            request.end("cancelled")
        while self._calls:
            self._calls.popleft()()
        self._pool.close()
        # Streams know the scheduler, so they would keep the weights, and a draft model's, as long as they
        # are kept.
        with self._changed:
            self._running, self._waiting = [], deque()
        del self._session

    def _step(self) -> None:
        for _ in range(len(self._calls)):  # what comes meanwhile waits for the next step
            with self._time.spent_on():
                self._calls.popleft()()
        self._drop()
        self._admit()
        self._prefill_one()
        self._decode_all()
        self._drop()  # what has just finished, so that its reader does not wait for the next step
        if not self._running:
            self._settle_some()

    def _requests(self) -> list[Request]:
        with self._changed:
            return [*self._running, *self._waiting]

    def _has_room(self) -> bool:
        """Whether one more may begin. An answer that waits for its reader does not count: he may be waiting
        for one behind it."""
        return sum(not request.channel.paused for request in self._running) < self._concurrency

    def _await_work(self) -> bool:
        """Waits until there is something to do. False when it is time to end."""
        with self._changed:
            while not self._closed:
                if self._woken:  # something has changed: look at everything once
                    self._woken = False
                    break
                active = any(not request.channel.paused for request in self._running)
                next_one = self._waiting and self._has_room()
                if active or next_one or (self._unsettled and not self._running):
                    break
                deadlines = [each.deadline for each in self._requests() if each.deadline is not None]
                self._changed.wait(max(0.0, min(deadlines) - time.perf_counter()) if deadlines else None)
                if deadlines:
                    break
            return not self._closed

    def _drop(self) -> None:
        """Ends the requests that are finished or that nobody waits for any more."""
        now = time.perf_counter()
        for request in self._requests():
            if request.finished is not None:
                self._end(request, request.finished)
            elif request.channel.cancelled:
                self._end(request, "cancelled")
            elif request.deadline is not None and now >= request.deadline:
                self._end(request, "timeout")

    def _admit(self) -> None:
        while self._has_room():
            with self._changed:
                request = next(
                    (each for each in self._waiting if each.after is None or each.after.prefilled), None
                )
                if request is None:
                    return
                self._waiting.remove(request)
                self._running.append(request)
            request.channel.begun_at = time.perf_counter()
            # The last token's logits are in no cache, so it stays to be computed, and one more with it, so
            # that they are computed as in any prompt (see `KVCache`).
            known = request.prompt[: max(0, len(request.prompt) - 2)] if request.cache_prompt else []
            with self._ending(request), self._time.spent_on(request.channel):  # fails where memory is short
                request.cache = cache = self._pool.take(known)
                self._unsettled = deque(each for each in self._unsettled if each[0] is not cache)
                request.channel.cached_tokens = len(cache)

    def _prefill_one(self) -> None:
        """One chunk of the prompt whose turn it is."""
        request = next((each for each in self._running if not each.prefilled), None)
        if request is None or request.cache is None:
            return
        begun = time.perf_counter()
        start, end = next(passes(len(request.cache), len(request.prompt), self._chunk))
        with self._ending(request), self._time.spent_on(request.channel):
            logits = self._session.forward(request.prompt[start:end], request.cache)
            request.channel.prefill_s += time.perf_counter() - begun
            if end == len(request.prompt):
                self._take_tokens(request, logits)
        if request.ended:
            return
        # The next prompt's turn. In one go, as `submit` looks at how many there are.
        self._running = [*(each for each in self._running if each is not request), request]

    def _decode_all(self) -> None:
        """One step for each answer under way."""
        ready = [
            request
            for request in self._running
            if request.newest is not None and request.finished is None and not request.channel.pause_if_full()
        ]
        if self._reproducible or len(ready) == 1:
            for request in ready:
                with self._ending(request), self._time.spent_on(request.channel):
                    self._decode_alone(request)
        elif ready:
            with self._ending(*ready):
                self._decode_together(ready)

    @contextlib.contextmanager
    def _ending(self, *requests: Request) -> Iterator[None]:
        """What goes wrong ends these requests, and they pass it on to their readers."""
        try:
            yield
        except Exception as error:
            for request in requests:
                self._end(request, "cancelled", error)

    def _decode_together(self, requests: Sequence[Request]) -> None:
        newest = {each.cache: each.newest for each in requests if each.cache and each.newest is not None}
        with self._time.spent_on(*(each.channel for each in requests)):
            self._pool.gather(newest)
            logits = self._session.forward_each(newest)
        for request, row in zip(requests, logits, strict=True):
            with self._ending(request), self._time.spent_on(request.channel):
                self._take_tokens(request, row[None])

    def _decode_alone(self, request: Request) -> None:
        """The newest token and, behind it, those that are expected to follow: as far as the model agrees,
        each is what decoding one by one would have given."""
        cache, newest = request.cache, request.newest
        if cache is None or newest is None:
            return
        drafts = self._drafts(request, cache)
        ids = [newest, *drafts]
        known = len(cache)
        if self._reproducible and not drafts and known:
            known -= 1
            ids.insert(0, cache.ids[known])
            cache.truncate(known)
        first = len(ids) - 1 - len(drafts)
        logits = self._session.forward(ids, cache, range(first, len(ids)))
        taken = self._take_tokens(request, logits, drafts)
        cache.truncate(known + first + taken)
        request.channel.drafted_tokens += len(drafts)
        request.channel.accepted_tokens += taken - 1

    def _drafts(self, request: Request, cache: KVCache) -> list[int]:
        # Behind the newest token, as many as can become tokens of the answer before its last one.
        room = min(
            request.answer.limit - request.answer.count - 1, cache.capacity - len(cache) - 1, LONGEST_DRAFT
        )
        if room < 1 or request.speculator is None:
            return []
        forced = request.constraint.forced() if request.constraint else []
        return forced[:room] or request.speculator.propose(room)

    def _take_tokens(self, request: Request, logits: NDArray[np.float32], drafts: Sequence[int] = ()) -> int:
        """Draws a token from each row of `logits` (1 + drafts, vocabulary), as long as the one before is the
        draft that the row was computed for. Returns how many were drawn."""
        constraint, tokens = request.constraint, []
        reason: FinishReason | None = None
        for row, draft in zip(logits, [*drafts, None], strict=True):
            if constraint is not None:
                constraint.mask(row)
            sampled = request.sampler.sample(row)
            if constraint is not None:
                constraint.accept(sampled.token_id)
            tokens.append(sampled.token_id)
            last = constraint is not None and constraint.must_stop
            piece, reason = request.answer.add(sampled, last=last)
            request.channel.put(piece)
            if reason is not None or sampled.token_id != draft:
                break
        request.newest = tokens[-1]
        if request.speculator is not None:
            request.speculator.advance(tokens)
        if reason is not None:
            request.finished = reason
        return len(tokens)

    def _end(self, request: Request, reason: FinishReason, error: BaseException | None = None) -> None:
        if request.ended:
            return
        with self._changed:
            (self._running if request in self._running else self._waiting).remove(request)
        try:
            if request.cache is not None:
                with self._time.spent_on(request.channel):
                    self._leave(request, request.cache, failed=error is not None)
        finally:  # whatever happens, nobody must wait for ever
            request.end(reason, error)

    def _leave(self, request: Request, cache: KVCache, *, failed: bool) -> None:
        """Gives the request's cache back, with what may serve another sequence."""
        if not request.cache_prompt:
            cache.truncate(0)
        elif request.settle and not failed and request.newest is not None and cache.settled < len(cache):
            self._unsettled.append((cache, [*cache.ids, request.newest]))
            cache.truncate(cache.settled)
        self._pool.give_back(cache)

    def _settle_some(self) -> None:
        """A chunk of an answer that has ended, so that the next turn finds it computed as a prompt is."""
        if not self._unsettled:
            return
        cache, ids = self._unsettled.popleft()
        known = len(cache)
        chunk = ids[known : known + self._chunk]
        if len(chunk) < 2 or not known or cache.ids != ids[:known]:  # it may have lost its place meanwhile
            return
        # Nobody waits for it: where it fails, the next turn computes it.
        with contextlib.suppress(Exception), self._time.spent_on():
            self._session.forward(chunk, cache)
            self._unsettled.appendleft((cache, ids))
