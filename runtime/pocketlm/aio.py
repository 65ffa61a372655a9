"""The async variant: the same models, answers and conversations for a program that runs on asyncio.

>>> from pocketlm.aio import AsyncModel
>>> async with await AsyncModel.load("smollm2-135m") as model:
...     async for piece in model.stream("Why is the sky blue?"):
...         print(piece.text, end="", flush=True)

Nothing here blocks the event loop, and an answer under way holds no thread: the engine's own one wakes the
loop. Whatever the sync API raises is raised here where it is awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self, Unpack

from pocketlm.chat import Chat
from pocketlm.embed import Embeddings, Pooling, collect
from pocketlm.engine import DEFAULT_CACHE_BYTES, Model, Prompt, load
from pocketlm.errors import PocketlmError
from pocketlm.generate import Completion, Piece, Stream
from pocketlm.power import PowerMode
from pocketlm.progress import Progress, silent
from pocketlm.settings import Settings
from pocketlm.tokenizer import Message

__all__ = ["AsyncChat", "AsyncModel", "AsyncStream"]


class AsyncModel:
    """A loaded model for the tasks of an event loop, as many as like at once."""

    def __init__(self, model: Model) -> None:
        """Wraps `model`, which it closes with itself."""
        self.model = model
        """The sync model: its name, manifest, tokenizer and all that takes no time worth awaiting."""

    @classmethod
    async def load(
        cls,
        name_or_path: str | Path,
        *,
        precision: str | None = None,
        context_length: int | None = None,
        threads: int | None = None,
        power: PowerMode = "balanced",
        draft: str | Path | None = None,
        concurrency: int = 8,
        queue_limit: int = 64,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        reproducible: bool = False,
        progress: Progress = silent,
    ) -> Self:
        """As `pocketlm.load`, in a thread; `progress` is called on the event loop.

        Cancelling ends a download or an export at its next report of progress. What was downloaded until
        then is kept, as after any interruption.
        """
        loop, cancelled = asyncio.get_running_loop(), threading.Event()

        def report(task: str, done: int, total: int, unit: str) -> None:
            if cancelled.is_set():
                raise _LoadCancelledError
            loop.call_soon_threadsafe(progress, task, done, total, unit)

        executor = ThreadPoolExecutor(1, "pocketlm-load")
        loading = executor.submit(
            load,
            name_or_path,
            precision=precision,
            context_length=context_length,
            threads=threads,
            power=power,
            draft=draft,
            concurrency=concurrency,
            queue_limit=queue_limit,
            cache_bytes=cache_bytes,
            reproducible=reproducible,
            progress=report,
        )
        executor.shutdown(wait=False)
        try:
            return cls(await asyncio.wrap_future(loading))
        except asyncio.CancelledError:
            cancelled.set()
            loading.add_done_callback(_close_loaded)
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As `Model.close`."""
        await asyncio.to_thread(self.model.close)

    def stream(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> AsyncStream:
        """The answer to `prompt`, piece by piece; what the arguments mean: see `Model.stream`.

        The answer begins with the iteration, and that is where `Model.stream`'s errors are raised.
        """
        return AsyncStream(lambda: self.model.stream(prompt, system=system, raw=raw, **settings))

    async def streams(
        self,
        prompt: Prompt,
        n: int,
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> list[AsyncStream]:
        """`n` answers to one prompt, which begin at once; see `Model.streams`."""
        begun = await asyncio.to_thread(self.model.streams, prompt, n, system=system, raw=raw, **settings)
        return [AsyncStream.of(stream) for stream in begun]

    async def generate(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Completion:
        """The whole answer to `prompt`; what the arguments mean and what is raised: see `Model.stream`."""
        return await self.stream(prompt, system=system, raw=raw, **settings).finish()

    def chat(self, *, system: str | None = None) -> AsyncChat:
        """A conversation that remembers."""
        return AsyncChat(self.model.chat(system=system))

    async def embed(
        self, texts: Sequence[str | Sequence[int]], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> Embeddings:
        """As `Model.embed`. Cancelling ends it after the text that is under way."""
        jobs = await asyncio.to_thread(self.model._embed, texts, pooling)
        pooled = [await asyncio.wrap_future(job) for job in jobs]
        return collect(pooled, self.model.manifest.dimensions.hidden, normalize=normalize)

    async def save_prefix(
        self, path: str | Path, prompt: Prompt, *, system: str | None = None, raw: bool = False
    ) -> int:
        """As `Model.save_prefix`."""
        return await asyncio.to_thread(self.model.save_prefix, path, prompt, system=system, raw=raw)

    async def load_prefix(self, path: str | Path) -> int:
        """As `Model.load_prefix`."""
        return await asyncio.to_thread(self.model.load_prefix, path)


class AsyncChat:
    """A conversation: each turn computes only what is new. Not for several tasks at once."""

    def __init__(self, chat: Chat) -> None:
        """`AsyncModel.chat` makes one."""
        self._chat = chat

    @property
    def messages(self) -> list[Message]:
        """What was said so far, the system message first if there is one."""
        return self._chat.messages

    @property
    def system(self) -> str | None:
        """The system message, or None. Setting it holds from the next answer on."""
        return self._chat.system

    @system.setter
    def system(self, text: str | None) -> None:
        self._chat.system = text

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._chat.reset()

    def fork(self) -> AsyncChat:
        """A conversation of its own that begins as this one has gone so far. Nothing is computed again."""
        return AsyncChat(self._chat.fork())

    async def send(self, text: str, **settings: Unpack[Settings]) -> Completion:
        """The whole answer to the user's next message."""
        return await self.stream(text, **settings).finish()

    def stream(self, text: str, **settings: Unpack[Settings]) -> AsyncStream:
        """The answer to the user's next message, piece by piece; see `Chat.stream`.

        The turn begins with the iteration, and that is where errors are raised.
        """
        return AsyncStream(lambda: self._chat.stream(text, **settings))


class AsyncStream:
    """An answer: iterate for its pieces once, or await `finish`; `completion` tells what there is so far.

    Cancelling the task that reads it ends it. As a context manager it ends with the block.
    """

    def __init__(self, begin: Callable[[], Stream]) -> None:
        """`AsyncModel.stream` and `AsyncChat.stream` make one; `begin` is called in a thread."""
        self._begin = begin
        self._stream: Stream | None = None
        self._ended = False
        self._arrived = asyncio.Event()

    @classmethod
    def of(cls, stream: Stream) -> Self:
        """An answer that has begun already. To be called on the event loop."""
        it = cls(lambda: stream)
        it._attach(stream)
        return it

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        try:
            piece = None if self._ended else await self._next(self._stream or await self._begun())
        except asyncio.CancelledError:
            await self.close()
            raise
        if piece is None:
            self._ended = True
            raise StopAsyncIteration
        return piece

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def finish(self) -> Completion:
        """Reads the answer to its end."""
        async for _ in self:
            pass
        return self.completion

    async def close(self) -> None:
        """Ends the answer here. What was read of it so far stays in `completion`."""
        self._ended = True
        if self._stream is not None:
            self._stream.close()

    @property
    def completion(self) -> Completion:
        """The answer so far, as `Stream.completion`. Raises PocketlmError before it has begun."""
        if self._stream is None:
            raise PocketlmError("The answer has not begun. Iterate over it, or await its finish().")
        return self._stream.completion

    async def _begun(self) -> Stream:
        # In a thread: a long prompt takes a while to become tokens, a grammar to be compiled.
        beginning = asyncio.get_running_loop().run_in_executor(None, self._begin)
        beginning.add_done_callback(self._take)
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            self._ended = True
            await asyncio.wait([beginning])
            raise

    def _take(self, beginning: asyncio.Future[Stream]) -> None:
        if beginning.cancelled() or beginning.exception() is not None:
            return
        self._attach(beginning.result())

    def _attach(self, stream: Stream) -> None:
        self._stream = stream
        loop, arrived = asyncio.get_running_loop(), self._arrived

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(arrived.set)

        stream._channel.on_item = wake
        if self._ended:  # closed or cancelled meanwhile
            stream.close()

    async def _next(self, stream: Stream) -> Piece | None:
        """The next piece, None at the end."""
        while not stream._channel.ready:
            await self._arrived.wait()
            self._arrived.clear()
        return next(stream, None)


class _LoadCancelledError(Exception):
    """Ends a load whose task was cancelled."""


def _close_loaded(loading: Future[Model]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()
