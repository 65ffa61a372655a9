"""The facade: `load` a model, `Model` answers, `Chat` remembers."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.errors import ContextOverflowError, InvalidSettingError, PocketlmError, PromptError
from pocketlm.generate import Completion, Stream, passes
from pocketlm.hub import find_bundle
from pocketlm.kv_cache import CachePool, KVCache
from pocketlm.manifest import Manifest
from pocketlm.progress import Progress, silent
from pocketlm.sampling import Sampler, Sampling
from pocketlm.session import Session
from pocketlm.stops import StopMatcher
from pocketlm.threads import thread_count
from pocketlm.tokenizer import Message, Tokenizer

DEFAULT_CONTEXT_LENGTH = 8192
"""Tokens, unless `load` is told otherwise or the model was trained for fewer."""

Prompt = str | Sequence[Message] | Sequence[int]


class Settings(TypedDict, total=False):
    """How an answer is generated. `Sampling` tells what most of them mean; its defaults hold here too."""

    max_tokens: int | None  # None: until the context is full
    stop: str | Sequence[str] | None  # the answer ends before any of these
    ignore_eos: bool  # go on behind the model's own end of text
    cache_prompt: bool  # False: compute the whole prompt, whatever of it is cached; for measuring
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None


def load(
    name_or_path: str | Path,
    *,
    precision: str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Model:
    """The model of that name, fetched and exported first if it is not in the cache.

    `name_or_path` is a name of the catalogue, `hf:ORG/REPO[@REVISION]`, a .gguf file, a checkpoint folder or
    a bundle folder. `context_length` is in tokens, at most what the model was trained for. `threads` defaults
    to POCKETLM_THREADS, else to the physical cores.

    Raises what `pocketlm.hub.pull` raises, BundleError for a damaged bundle and InvalidSettingError.
    """
    folder = find_bundle(name_or_path, precision=precision, verify=False, progress=progress)
    # Hashing and loading take as long as each other, so they run side by side; a bundle that turns out to
    # be altered is dropped again before anything is computed with it.
    with ThreadPoolExecutor(1) as executor:
        verified = executor.submit(open_bundle, folder)
        model = Model(open_bundle(folder, verify=False), context_length=context_length, threads=threads)
        verified.result()
    return model


class Model:
    """A loaded model. Safe for several threads, each answer in its own cache."""

    def __init__(
        self, bundle: Bundle, *, context_length: int | None = None, threads: int | None = None
    ) -> None:
        started = time.perf_counter()
        self.manifest: Manifest = bundle.manifest
        self.name = bundle.manifest.name
        self.context_length = _context_length(bundle.manifest, context_length)
        self.tokenizer = Tokenizer(bundle.tokenizer_json, bundle.chat_template, self.manifest.tokens)
        self._session: Session | None = Session(
            bundle.graph_path, self.manifest.dimensions, self.manifest.graph, threads=thread_count(threads)
        )
        self._caches = CachePool(self._new_cache)
        self.load_s = time.perf_counter() - started
        """Seconds that it took to load the bundle."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model's memory back. Answers under way must have ended."""
        self._session = None
        self._caches = CachePool(self._new_cache)

    def generate(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Completion:
        """The whole answer to `prompt`; what the arguments mean and what is raised: see `stream`."""
        return finish(self.stream(prompt, system=system, raw=raw, **settings))

    def stream(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Stream:
        """The answer to `prompt`, piece by piece.

        A text is put to the model as a user's message through its chat template, behind the message `system`
        if there is one; with `raw`, or where the model has no template, it is continued as it is. A list of
        messages goes through the template, a list of token ids is taken as it is.

        Raises ContextOverflowError, PromptError and InvalidSettingError, all before anything is computed.
        """
        return self._stream(self.encode(prompt, system=system, raw=raw), settings)

    def chat(self, *, system: str | None = None) -> Chat:
        """A conversation that remembers."""
        return Chat(self, system)

    def encode(self, prompt: Prompt, *, system: str | None = None, raw: bool = False) -> list[int]:
        """The token ids of a prompt as `stream` takes it."""
        if isinstance(prompt, str):
            if raw or not self.tokenizer.has_chat_template:
                if system is not None:
                    raise PromptError(
                        "A system message needs the chat template; here the text is continued raw."
                    )
                return self.tokenizer.encode(prompt)
            prompt = [Message(role="user", content=prompt)]
        items: list[Any] = list(prompt)
        if all(isinstance(item, int | np.integer) for item in items):
            if system is not None:
                raise PromptError(
                    "A system message needs the chat template; token ids are taken as they are."
                )
            return self._check_ids(items)
        if system is not None:
            items.insert(0, Message(role="system", content=system))
        return self.tokenizer.encode_chat(items)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits (tokens, vocabulary) behind each of `ids`, for measuring and research."""
        ids = self._check_ids(ids)
        if len(ids) > self.context_length:
            raise ContextOverflowError(len(ids), self.context_length)
        session, cache = self._open_session(), KVCache(self.manifest.dimensions, len(ids))
        logits = np.empty((len(ids), self.manifest.dimensions.vocabulary), np.float32)
        for start, end in passes(0, len(ids)):
            logits[start:end] = session.forward(ids[start:end], cache, range(end - start))
        return logits

    def _stream(
        self,
        ids: list[int],
        settings: Settings,
        *,
        settle: bool = False,
        on_end: Callable[[Stream], None] | None = None,
    ) -> Stream:
        sampling = dict(settings)
        max_tokens, stop = sampling.pop("max_tokens", None), sampling.pop("stop", None)
        ignore_eos, cache_prompt = sampling.pop("ignore_eos", False), sampling.pop("cache_prompt", True)
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise InvalidSettingError(f"max_tokens is {max_tokens!r}; a whole number from 1 on is expected.")
        session, room = self._open_session(), self.context_length - len(ids)
        if room < 1:
            raise ContextOverflowError(len(ids), self.context_length)
        if not ids:
            raise PromptError("The prompt is empty. Give the model at least one token to go on from.")

        def ended(stream: Stream) -> None:
            self._caches.give_back(stream.cache)
            if on_end is not None:
                on_end(stream)

        vocabulary = self.manifest.dimensions.vocabulary
        sampler = Sampler(Sampling(**sampling), vocabulary, ids)  # type: ignore[arg-type]  # checked there
        stops = StopMatcher(() if stop is None else stop)  # type: ignore[arg-type]  # likewise
        return Stream(
            session,
            self._caches.take(ids if cache_prompt else ()),
            ids,
            sampler,
            self.tokenizer.stream(continues=True),
            stops,
            eos=() if ignore_eos else self.manifest.tokens.eos,
            limit=room if max_tokens is None else min(room, max_tokens),
            settle=settle,
            on_end=ended,
        )

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        vocabulary = self.manifest.dimensions.vocabulary
        checked = [operator.index(token_id) for token_id in ids]
        for token_id in checked:
            if not 0 <= token_id < vocabulary:
                raise PromptError(f"The token id {token_id} is outside the vocabulary of {vocabulary:,}.")
        if not checked:
            raise PromptError("The prompt is empty. Give the model at least one token to go on from.")
        return checked

    def _new_cache(self) -> KVCache:
        return KVCache(self.manifest.dimensions, self.context_length)

    def _open_session(self) -> Session:
        if self._session is None:
            raise PocketlmError(f"The model {self.name} has been closed. Load it again.")
        return self._session


class Chat:
    """A conversation: each turn computes only what is new. Not for several threads at once."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._under_way: Stream | None = None
        self.messages: list[Message] = []
        """What was said so far, the system message first if there is one."""
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message, or None. Setting it holds from the next answer on."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, Message(role="system", content=text))

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._end_answer()
        self.messages[:] = self.messages[: self.system is not None]

    def send(self, text: str, **settings: Unpack[Settings]) -> Completion:
        """The whole answer to the user's next message."""
        return finish(self.stream(text, **settings))

    def stream(self, text: str, **settings: Unpack[Settings]) -> Stream:
        """The answer to the user's next message, piece by piece.

        An answer that is stopped early counts as said, as far as it came; where nothing came, the message is
        taken back too. An answer still under way from before is stopped first. Raises as `Model.stream`; the
        conversation is then as it was.
        """
        self._end_answer()
        messages = [*self.messages, Message(role="user", content=text)]
        stream = self._model._stream(
            self._model.encode(messages), settings, settle=True, on_end=self._answered
        )
        self._under_way = stream
        self.messages.append(messages[-1])
        return stream

    def _end_answer(self) -> None:
        if self._under_way is not None:
            self._under_way.close()

    def _answered(self, stream: Stream) -> None:
        if stream is not self._under_way:
            return
        self._under_way = None
        completion = stream.completion
        if completion.token_ids:
            self.messages.append(Message(role="assistant", content=completion.text))
        else:
            del self.messages[-1]


def finish(stream: Stream) -> Completion:
    """Runs an answer to its end."""
    with stream:
        for _ in stream:
            pass
    return stream.completion


def _context_length(manifest: Manifest, wanted: int | None) -> int:
    trained = manifest.dimensions.context_length
    if wanted is None:
        return min(trained, DEFAULT_CONTEXT_LENGTH)
    if not 1 < wanted <= trained:
        raise InvalidSettingError(
            f"context_length is {wanted:,}; {manifest.name} was trained for {trained:,} tokens, so a number "
            "from 2 to that is expected."
        )
    return wanted
