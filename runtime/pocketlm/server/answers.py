"""A request → a model's answers, piece by piece, and what they have cost: what all APIs share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, Unpack, cast

from fastapi import Depends
from starlette.requests import Request

from pocketlm.aio import AsyncModel, AsyncStream
from pocketlm.embed import Embeddings
from pocketlm.energy import Probe, Reading
from pocketlm.energy.sharing import SharedMeter, SharedWindow
from pocketlm.engine import Prompt
from pocketlm.generate import Completion, Piece, Usage
from pocketlm.network_lock import NetworkLock
from pocketlm.server.access_log import PROMPTS_LOGGER
from pocketlm.server.config import ServerConfig
from pocketlm.server.errors import ApiError
from pocketlm.server.event_stream import disconnected
from pocketlm.server.metrics import ERROR, OK, Metrics
from pocketlm.server.model_store import Lease, ModelStore
from pocketlm.settings import Settings

T = TypeVar("T")

MAX_TEXTS = 256
"""To embed in one request: enough for a batch, and the others' turn comes within seconds."""

_prompts = logging.getLogger(PROMPTS_LOGGER)


class ClientGoneError(Exception):
    """The client has closed its connection, so nobody reads what would be answered."""


@dataclass(frozen=True)
class Result:
    """Answers that have ended."""

    completions: tuple[Completion, ...]
    reading: Reading  # of all of them together


class Answers:
    """Answers to one prompt, under way. `close()` ends them and gives the model back: it must be called."""

    def __init__(
        self, api: str, lease: Lease, streams: list[AsyncStream], window: SharedWindow, metrics: Metrics
    ) -> None:
        self.model_name = lease.name
        self.model: AsyncModel = lease.model
        self.created = int(time.time())  # epoch seconds
        self._api = api
        self._lease = lease
        self._streams = streams
        self._window = window
        self._metrics = metrics
        self._pumps: list[asyncio.Task[None]] = []
        self._counting: asyncio.Future[Result] | None = None
        self._result: Result | None = None
        self._status: int | None = OK

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece with the number of its answer."""
        try:
            async for numbered in merged(self._streams, self._pumps):
                yield numbered
        except Exception:
            self._status = ERROR
            raise
        await self._count()

    async def finish(self) -> Result:
        """Reads all of them to their ends."""
        try:
            await asyncio.gather(*(stream.finish() for stream in self._streams))
        except Exception:
            self._status = None  # it becomes the request's answer, which is counted by itself
            raise
        return await self._count()

    @property
    def usage(self) -> Usage:
        """The first answer's, as far as it was read. What was cached is known with its first piece."""
        return self._streams[0].completion.usage

    @property
    def result(self) -> Result:
        """What there is of the answers, once they were read to their ends or closed."""
        if self._result is None:
            raise RuntimeError("the answers are still under way")
        return self._result

    async def close(self) -> None:
        try:
            for pump in self._pumps:
                pump.cancel()
            for stream in self._streams:
                await stream.close()
            await self._count()  # what was computed counts, however it ended
        finally:
            self._lease.release()

    async def _count(self) -> Result:
        if self._counting is None:
            self._counting = asyncio.ensure_future(self._end_window())
        return await asyncio.shield(self._counting)

    async def _end_window(self) -> Result:
        completions = tuple(stream.completion for stream in self._streams)
        compute_s = sum(each.timings.compute_s for each in completions)
        reading = await asyncio.wrap_future(self._window.ending(compute_s))
        self._metrics.answered(self._api, self.model_name, completions, reading, status=self._status)
        self._result = Result(completions, reading)
        return self._result


async def merged(
    sources: Sequence[AsyncIterable[T]], pumps: list[asyncio.Task[None]]
) -> AsyncIterator[tuple[int, T]]:
    """What comes from any of `sources`, with its number. Tasks that read them are put into `pumps`, for the
    caller to cancel."""
    if len(sources) == 1:
        async for item in sources[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(1)
    pumps += [asyncio.create_task(_pump(number, source, queue)) for number, source in enumerate(sources)]
    under_way = len(sources)
    while under_way:
        numbered = await queue.get()
        if isinstance(numbered, BaseException):
            raise numbered
        if numbered is None:
            under_way -= 1
        else:
            yield numbered


async def _pump(
    number: int, source: AsyncIterable[T], queue: asyncio.Queue[tuple[int, T] | BaseException | None]
) -> None:
    try:
        async for item in source:
            await queue.put((number, item))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)


class Service:
    """What the rooms of the APIs work with."""

    def __init__(self, config: ServerConfig, store: ModelStore, meter: SharedMeter, metrics: Metrics) -> None:
        self.config = config
        self.store = store
        self.metrics = metrics
        self.state: Literal["loading", "ready", "draining"] = "loading"
        """Answers are given in between: when the first model is there, until the server is told to end."""
        self.network_lock: NetworkLock | None = None
        """How far the process is kept from opening connections; None: it is not, or not yet."""
        self._meter = meter

    @property
    def probe(self) -> Probe:
        """Where figures of energy come from."""
        return self._meter.probe

    def check_ready(self) -> None:
        """Raises ApiError before the server is ready, and when it is about to end."""
        if self.state != "ready":
            message = "Loading model" if self.state == "loading" else "The server is about to end."
            raise ApiError(503, message, code=self.state, headers={"Retry-After": "1"})

    async def acquire(self, model: str | None) -> Lease:
        """A use of a model, None for the server's first. Raises ApiError before the server is ready, and what
        `ModelStore.acquire` raises."""
        self.check_ready()
        return await self.store.acquire(model)

    async def ask(
        self,
        api: str,
        model: str | None,
        prompt: Prompt,
        *,
        n: int = 1,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Answers:
        """`n` answers to `prompt`, which have begun when this returns; see `acquire` for `model`.

        Raises ApiError beyond the server's limits, and whatever `acquire` and `Model.streams` raise.
        """
        settings = self._limited(n, settings)
        lease = await self.acquire(model)
        try:
            if self.config.log_prompts:
                _prompts.info("%s %s: %r", api, lease.name, prompt)
            window = self._meter.begin()
            try:
                streams = await lease.model.streams(prompt, n, raw=raw, **settings)
            except BaseException:
                window.ending(0.0)
                raise
        except BaseException:
            lease.release()
            raise
        return Answers(api, lease, streams, window, self.metrics)

    async def embed(
        self, api: str, model: str | None, texts: Sequence[str | Sequence[int]]
    ) -> tuple[str, Embeddings, Reading]:
        """The model's name, the vectors of `texts` and what they have cost.

        Raises ApiError for too many texts and for those that take longer than answers may, and whatever
        `acquire` and `Model.embed` raise.
        """
        if len(texts) > MAX_TEXTS:
            raise ApiError(
                400, f"input has {len(texts):,} texts, at most {MAX_TEXTS} are possible.", param="input"
            )
        async with await self.acquire(model) as lease:
            if self.config.log_prompts:
                _prompts.info("%s %s: %r", api, lease.name, texts)
            window = self._meter.begin()
            compute_s = 0.0
            try:
                async with asyncio.timeout(self.config.answer_timeout_s):
                    embeddings = await lease.model.embed(texts)
                compute_s = embeddings.compute_s
            except TimeoutError:
                limit_s = self.config.answer_timeout_s
                message = f"The texts took longer than the {limit_s:g} s of --answer-timeout. Send fewer."
                raise ApiError(503, message, code="timeout", param="input") from None
            finally:
                ending = window.ending(compute_s)
            reading = await asyncio.wrap_future(ending)
        self.metrics.answered(api, lease.name, (), reading, prompt_tokens=embeddings.prompt_tokens)
        return lease.name, embeddings, reading

    def _limited(self, n: int, settings: Settings) -> Settings:
        config = self.config
        if n > config.max_answers:
            raise ApiError(400, f"n is {n}; this server gives {config.max_answers} at most.", param="n")
        wanted = settings.get("max_tokens")
        if config.max_tokens is not None and wanted is not None and wanted > config.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {wanted:,}; this server gives {config.max_tokens:,} at most.",
                param="max_tokens",
            )
        limited = cast(Settings, dict(settings))
        if wanted is None:
            limited["max_tokens"] = config.max_tokens
        limits_s = [each for each in (settings.get("timeout_s"), config.answer_timeout_s) if each is not None]
        limited["timeout_s"] = min(limits_s, default=None)
        return limited


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


ServiceOf = Annotated[Service, Depends(_service)]
"""What a path operation declares to get the application's `Service`."""


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Raises ClientGoneError then."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def finished(request: Request, answers: Answers) -> Result:
    """Reads `answers` to their ends for a client that waits for all of it, and closes them."""
    try:
        return await while_connected(request, answers.finish())
    finally:
        await answers.close()
