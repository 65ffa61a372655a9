"""The models of a server: loaded when they are asked for, under a budget of memory, unloaded when idle.

Loading and unloading take turns, in tasks of the store's own: whoever waits for a model may go away without
consequences for others. A model with users, be it that they hold a `Lease` or wait for it to be loaded, is
not unloaded before `close`.

What counts against the budget is what a model may grow to (`MemoryEstimate.most_bytes`). A model for which
that alone is too much is loaded all the same if one answer at a time fits, but only when no other is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from pocketlm.aio import AsyncModel
from pocketlm.errors import InvalidSettingError
from pocketlm.files import readable_size
from pocketlm.server.model_use import (
    Lease,
    ModelState,
    ModelTooLargeError,
    ModelUnavailableError,
    UnknownModelError,
)
from pocketlm.server.served_models import ServedModel, served_models
from pocketlm.session import return_freed_memory

__all__ = [
    "Lease",
    "ModelState",
    "ModelStore",
    "ModelTooLargeError",
    "ModelUnavailableError",
    "ServedModel",
    "UnknownModelError",
    "served_models",
]

_log = logging.getLogger("pocketlm.server")


class _Entry:
    """A served model and what has become of it."""

    def __init__(self, served: ServedModel, keep_alive_s: float | None) -> None:
        self.served = served
        self.keep_alive_s = keep_alive_s
        self.model: AsyncModel | None = None
        self.loading: asyncio.Task[None] | None = None
        self.users = 0  # leases, and those who wait for one
        self.idle_since = 0.0  # of the store's clock; of no meaning while there are users
        self.unload_when_idle = False
        self.timer: asyncio.TimerHandle | None = None

    def left_s(self, now: float) -> float | None:
        """Until it is to be unloaded; None: it is not, as things are."""
        if self.model is None or self.users:
            return None
        if self.unload_when_idle:
            return 0.0
        if self.keep_alive_s is None:
            return None
        return max(0.0, self.idle_since + self.keep_alive_s - now)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class ModelStore:
    """For one event loop. `acquire` a model, use it, release it."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        load: Callable[[ServedModel], Awaitable[AsyncModel]],
        budget_bytes: int | None,
        keep_alive_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load` is cancelled where it is not needed any more. Without `budget_bytes` nothing is unloaded to
        make room. A model that has been idle for `keep_alive_s` seconds is unloaded; None: never.

        Names are matched whatever their case; "NAME:latest" and "NAME:PRECISION" stand for NAME too.

        Raises InvalidSettingError without a model, for two of the same name, and for numbers out of range.
        """
        if budget_bytes is not None and budget_bytes < 1:
            raise InvalidSettingError(
                f"the memory budget is {budget_bytes:,} bytes; a number from 1 on is expected."
            )
        self._load_model = load
        self._budget_bytes = budget_bytes
        self._keep_alive_s = _checked_keep_alive(keep_alive_s)
        self._clock = clock
        self._entries = [_Entry(model, self._keep_alive_s) for model in models]
        self._by_name = _by_name(self._entries)
        self._turn = asyncio.Lock()  # held by what loads or unloads
        self._load_call: asyncio.Future[AsyncModel] | None = None
        self._closing: AsyncModel | None = None
        self._busy_s_before = 0.0  # of models that have been unloaded
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def busy_s(self) -> float:
        """Seconds in which engines have computed, of all models that were ever loaded. It never falls."""
        models = [*(entry.model for entry in self._entries), self._closing]
        return self._busy_s_before + sum(each.model.busy_s for each in models if each is not None)

    def get(self, name: str | None) -> ServedModel:
        """The model of that name, loaded or not; None: the first. Raises UnknownModelError."""
        return self._entry(name).served

    def states(self) -> list[ModelState]:
        """Of each model, in the order in which they were given."""
        return [self._state(entry) for entry in self._entries]

    async def acquire(self, name: str | None) -> Lease:
        """A use of the model of that name, None for the first one, which is loaded if need be.

        Raises UnknownModelError; ModelUnavailableError if there is no room while others are busy, and after
        `close`; ModelTooLargeError; and what loading raises, to all who wait for it. The next call tries
        again.
        """
        entry = self._entry(name)
        entry.users += 1
        try:
            return Lease(entry.served.name, await self._loaded(entry), partial(self._let_go, entry))
        except BaseException:
            self._let_go(entry)
            raise

    def set_keep_alive(self, name: str, seconds: float | None) -> None:
        """How many seconds the model stays when it is idle: 0 unloads it as soon as it is, None or less than
        0 never does. This holds until it is unloaded; if it is not loaded, for its next time.

        Raises UnknownModelError, and InvalidSettingError for NaN.
        """
        entry = self._entry(name)
        entry.keep_alive_s = _checked_keep_alive(seconds)
        self._watch(entry)

    async def unload(self, name: str) -> None:
        """Unloads the model: now if it is idle, otherwise as soon as it is, and then this does not wait for
        it. Raises UnknownModelError."""
        entry = self._entry(name)
        if entry.model is None and entry.loading is None:
            return
        entry.unload_when_idle = True
        if entry.model is not None and not entry.users:
            await asyncio.wait([self._spawn(self._unload_expired(entry))])

    async def close(self) -> None:
        """Unloads all models, whoever uses them, and ends what is being loaded."""
        self._closed = True
        for entry in self._entries:
            entry.stop_timer()
        if self._load_call is not None:
            self._load_call.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        async with self._turn:
            for entry in self._entries:
                await self._unload(entry, "as the server ends")

    def _entry(self, name: str | None) -> _Entry:
        if name is None:
            return self._entries[0]
        entry = self._by_name.get(name.lower())
        if entry is None:
            raise UnknownModelError(name, [each.served.name for each in self._entries])
        return entry

    def _state(self, entry: _Entry) -> ModelState:
        served, model = entry.served, entry.model
        running, waiting = (0, entry.users) if model is None else model.model.under_way
        left_s = entry.left_s(self._clock())
        return ModelState(
            served,
            loaded=model is not None,
            loading=entry.loading is not None,
            running=running,
            waiting=waiting,
            memory_bytes=None if model is None else served.memory.most_bytes,
            expires_at=None if left_s is None else time.time() + left_s,
            context_length=served.context_length if model is None else model.model.context_length,
        )

    async def _loaded(self, entry: _Entry) -> AsyncModel:
        """The entry's model; the caller counts as a user already."""
        while True:
            self._check_open()
            if entry.model is not None:
                return entry.model
            if entry.loading is None:
                entry.loading = self._spawn(self._load(entry))
            loading = entry.loading
            await asyncio.wait([loading])  # which goes on if this is cancelled
            loading.result()

    async def _load(self, entry: _Entry) -> None:
        name = entry.served.name
        try:
            async with self._turn:
                if not entry.users:  # they have all gone while it waited for its turn
                    return
                self._check_open()
                await self._make_room(entry)
                self._check_open()
                begun = self._clock()
                entry.model = await self._call_load(entry.served)
                entry.idle_since = self._clock()
                _log.info("loaded %s in %.1f s", name, self._clock() - begun)
        except Exception as error:
            if not self._closed:
                _log.warning("could not load %s: %s", name, error)
            raise
        finally:
            entry.loading = None
            if entry.model is None:
                entry.unload_when_idle = False
            self._watch(entry)

    async def _call_load(self, served: ServedModel) -> AsyncModel:
        self._load_call = asyncio.ensure_future(self._load_model(served))
        try:
            return await self._load_call
        except asyncio.CancelledError:
            # Cancelled by `close`, it is an error for those who wait, who are not cancelled themselves.
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            self._check_open()
            raise ModelUnavailableError(f"loading {served.name} was cancelled. Try again.") from None
        finally:
            self._load_call = None

    async def _make_room(self, entry: _Entry) -> None:
        """Unloads idle models, the least recently used ones first, until the entry's fits the budget.

        Raises ModelTooLargeError, and ModelUnavailableError without having unloaded anything in vain.
        """
        budget, memory = self._budget_bytes, entry.served.memory
        if budget is None:
            return
        if memory.least_bytes > budget:
            raise ModelTooLargeError(entry.served, budget)
        while loaded := [each for each in self._entries if each.model is not None]:
            busy = [each for each in loaded if each.users]
            if busy and _most_bytes(busy) + memory.most_bytes > budget:
                raise ModelUnavailableError(_no_room(entry.served, busy, budget))
            if _most_bytes(loaded) + memory.most_bytes <= budget:
                break
            idle = min((each for each in loaded if not each.users), key=lambda each: each.idle_since)
            await self._unload(idle, f"to make room for {entry.served.name}")
        if memory.most_bytes > budget:
            _log.warning(
                "%s may grow to %s, beyond the memory budget of %s, so it is loaded alone; a smaller "
                "--context-length or --concurrency makes it fit beside others",
                *(entry.served.name, readable_size(memory.most_bytes), readable_size(budget)),
            )

    def _let_go(self, entry: _Entry) -> None:
        entry.users -= 1
        if not entry.users:
            entry.idle_since = self._clock()
            self._watch(entry)

    def _watch(self, entry: _Entry) -> None:
        """Sees to it that an idle model is unloaded when its time has come."""
        entry.stop_timer()
        left_s = entry.left_s(self._clock())
        if left_s is None or self._closed:
            return
        if left_s:
            entry.timer = asyncio.get_running_loop().call_later(left_s, self._watch, entry)
        else:
            self._spawn(self._unload_expired(entry))

    async def _unload_expired(self, entry: _Entry) -> None:
        async with self._turn:
            if entry.left_s(self._clock()) == 0:  # nobody has asked for it again meanwhile
                idle = f"after {_duration(self._clock() - entry.idle_since)} idle"
                await self._unload(entry, "as it was asked to" if entry.unload_when_idle else idle)

    async def _unload(self, entry: _Entry, why: str) -> None:
        """Frees the model's memory, if it is loaded. The caller has the turn."""
        model, entry.model = entry.model, None
        if model is None:
            return
        entry.stop_timer()
        entry.unload_when_idle = False
        entry.keep_alive_s = self._keep_alive_s
        self._closing = model
        try:
            await model.close()
            _log.info("unloaded %s %s", entry.served.name, why)
        except Exception:
            _log.exception("unloading %s failed", entry.served.name)
        self._busy_s_before += model.model.busy_s
        self._closing = model = None
        # Once more, for what the model itself has held: its tokenizer's tables are large.
        await _return_freed_memory()

    def _check_open(self) -> None:
        if self._closed:
            raise ModelUnavailableError("the server is about to end.")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it is logged, and whoever waits for it gets it: asyncio need not complain


async def _return_freed_memory() -> None:
    await asyncio.to_thread(return_freed_memory)


def _by_name(entries: Sequence[_Entry]) -> dict[str, _Entry]:
    """Whatever a client may call a model, in lower case."""
    if not entries:
        raise InvalidSettingError("a server needs a model; none was given.")
    names: dict[str, _Entry] = {}
    for entry in entries:
        if names.setdefault(entry.served.name.lower(), entry) is not entry:
            raise InvalidSettingError(f"two models have the name {entry.served.name}.")
    for entry in entries:
        name = entry.served.name.lower()
        for tag in ("latest", entry.served.manifest.precision.name) if ":" not in name else ():
            names.setdefault(f"{name}:{tag}", entry)
    return names


def _checked_keep_alive(seconds: float | None) -> float | None:
    if seconds is None or seconds < 0 or seconds == math.inf:
        return None
    if math.isnan(seconds):
        raise InvalidSettingError("keep_alive is NaN; seconds are expected, or a negative number for ever.")
    return seconds


def _most_bytes(entries: Sequence[_Entry]) -> int:
    return sum(entry.served.memory.most_bytes for entry in entries)


def _no_room(model: ServedModel, busy: Sequence[_Entry], budget_bytes: int) -> str:
    names = ", ".join(entry.served.name for entry in busy)
    return (
        f"{model.name} takes up to {readable_size(model.memory.most_bytes)}, and the memory budget of "
        f"{readable_size(budget_bytes)} is taken up by models in use: {names}. Try again later, or start the "
        "server with a larger --memory-budget."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
