"""The facade: `load` a model, `Model` answers, `Chat` remembers."""

from __future__ import annotations

import operator
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from pocketlm import saved_prefix
from pocketlm.bundle import Bundle, open_bundle
from pocketlm.chat import Chat
from pocketlm.constraint import ConstraintFactory
from pocketlm.draft_model import DraftModel
from pocketlm.embed import Embedder, Embeddings, Pooled, Pooling, check_pooling, collect, read_texts
from pocketlm.errors import ContextOverflowError, InvalidSettingError, PocketlmError, PromptError
from pocketlm.generate import Answer, Channel, Completion, Stream
from pocketlm.hub import find_bundle
from pocketlm.kv_cache import KVCache
from pocketlm.kv_pool import KVPool
from pocketlm.manifest import Manifest
from pocketlm.overflow import fit
from pocketlm.power import Power, PowerMode
from pocketlm.power import power as choose_power
from pocketlm.prefill import PREFILL_CHUNK, passes
from pocketlm.progress import Progress, silent
from pocketlm.row_costs import ASSUMED
from pocketlm.sampling import Sampler
from pocketlm.scheduler import Request, Scheduler
from pocketlm.session import Session, return_freed_memory
from pocketlm.settings import AnswerSettings, Settings
from pocketlm.speculate import Speculator
from pocketlm.stops import StopMatcher
from pocketlm.tokenizer import Message, Tokenizer
from pocketlm.tools import ToolCallParser, tool_format
from pocketlm.tuning import find_tuning

DEFAULT_CONTEXT_LENGTH = 8192
"""Tokens, unless `load` is told otherwise or the model was trained for fewer."""

DEFAULT_CACHE_BYTES = 256 << 20

Prompt = str | Sequence[Message] | Sequence[int]


def load(
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
) -> Model:
    """The model of that name, fetched and exported first if it is not in the cache.

    `name_or_path` is a name of the catalogue, `hf:ORG/REPO[@REVISION]`, a .gguf file, a checkpoint folder or
    a bundle folder. `context_length` is in tokens, at most what the model was trained for. `threads` defaults
    to POCKETLM_THREADS, else to what `power` makes of the physical cores. `draft` is a smaller model with the
    same tokenizer, whose drafts this one verifies.

    `concurrency` is how many answers are computed at once at most, `queue_limit` how many more may wait for
    their turn. `cache_bytes` of memory keep the keys and values of conversations that are not under way.
    `reproducible` makes the same seed give the same text with and without speculation and whatever else is
    under way, at the price of speed (docs/determinism.md has both in numbers).

    Raises what `pocketlm.hub.pull` raises, BundleError for a damaged bundle and InvalidSettingError.
    """
    folder = find_bundle(name_or_path, precision=precision, verify=False, progress=progress)
    # Hashing and loading take as long as each other, so they run side by side; a bundle that turns out to
    # be altered is dropped again before anything is computed with it.
    with ThreadPoolExecutor(1) as executor:
        verified = executor.submit(open_bundle, folder)
        model = Model(
            open_bundle(folder, verify=False),
            context_length=context_length,
            threads=threads,
            power=power,
            draft=None if draft is None else open_bundle(find_bundle(draft, progress=progress)),
            concurrency=concurrency,
            queue_limit=queue_limit,
            cache_bytes=cache_bytes,
            reproducible=reproducible,
        )
        verified.result()
    return model


class Model:
    """A loaded model. Safe for several threads; answers that are asked for at once are computed together."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        context_length: int | None = None,
        threads: int | None = None,
        power: PowerMode = "balanced",
        draft: Bundle | None = None,
        concurrency: int = 8,
        queue_limit: int = 64,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        reproducible: bool = False,
    ) -> None:
        started = time.perf_counter()
        for name, value, least in (("concurrency", concurrency, 1), ("queue_limit", queue_limit, 0)):
            if not isinstance(value, int) or value < least:
                raise InvalidSettingError(f"{name} is {value!r}; a whole number from {least} on is expected.")
        self.manifest: Manifest = bundle.manifest
        self.name = bundle.manifest.name
        self.context_length = _context_length(bundle.manifest, context_length)
        self.tokenizer = Tokenizer(bundle.tokenizer_json, bundle.chat_template, self.manifest.tokens)
        dimensions, graph = self.manifest.dimensions, self.manifest.graph
        pool = KVPool(dimensions, self.context_length, cache_bytes, self.manifest.kv_cache.windows)
        tuning = find_tuning(self.manifest)
        self.power: Power = choose_power(power, threads=threads, tuning=tuning)
        threads, spin_us = self.power.threads, self.power.spin_us
        session = Session(bundle.graph_path, dimensions, graph, threads=threads, spin_us=spin_us)
        costs = (tuning and tuning.costs_with(threads)) or ASSUMED
        self._costs = costs.in_pairs() if reproducible else costs
        self._ngrams = bundle.ngrams
        self._tool_format = tool_format(bundle.chat_template)
        self._draft = None if draft is None else DraftModel(draft, bundle, threads=threads, spin_us=spin_us)
        self._session: Session | None = session
        self._scheduler = Scheduler(
            session,
            pool,
            chunk=PREFILL_CHUNK if tuning is None else tuning.prefill_chunk,
            concurrency=concurrency,
            queue_limit=queue_limit,
            reproducible=reproducible,
        )
        self._embedder = Embedder(self._scheduler)
        # For a model that is dropped without being closed; the engine's thread does not know it.
        self._finalizer = weakref.finalize(self, Scheduler.close, self._scheduler)
        self.load_s = time.perf_counter() - started
        """Seconds that it took to load the bundle."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def under_way(self) -> tuple[int, int]:
        """How many answers are being computed, and how many wait for their turn."""
        return self._scheduler.load

    @property
    def busy_s(self) -> float:
        """Seconds that the engine has computed since it was loaded; it never falls, and stays after `close`.
        Any thread may read it. Each answer's part is its `Timings.compute_s`."""
        return self._scheduler.busy_s

    def close(self) -> None:
        """Cancels what is under way and gives the model's memory back."""
        self._finalizer()
        self._session = self._draft = None
        return_freed_memory()

    def generate(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Completion:
        """The whole answer to `prompt`; what the arguments mean and what is raised: see `stream`."""
        return self.stream(prompt, system=system, raw=raw, **settings).finish()

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

        Raises ContextOverflowError, PromptError, InvalidSettingError and QueueFullError, all before anything
        is computed.
        """
        return self._answer(self._read(prompt, system=system, raw=raw), settings)

    def streams(
        self,
        prompt: Prompt,
        n: int,
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> list[Stream]:
        """`n` answers to one prompt, which is computed once. The first has the `seed`, if there is one, each
        other the number after the one before. Raises as `stream`."""
        if n < 1:
            raise InvalidSettingError(f"n is {n!r}; a whole number from 1 on is expected.")
        messages = self._read(prompt, system=system, raw=raw)
        plans = []
        for index in range(n):
            seed = settings.get("seed")
            plan = AnswerSettings.of(settings if seed is None else {**settings, "seed": seed + index})
            plans.append(self._plan(messages, plan))
        for request, _ in plans[1:]:
            request.after = plans[0][0]
        self._scheduler.submit(*(request for request, _ in plans))
        return [Stream(request.channel, dropped_messages=dropped, owner=self) for request, dropped in plans]

    def chat(self, *, system: str | None = None) -> Chat:
        """A conversation that remembers."""
        return Chat(self, system)

    def encode(self, prompt: Prompt, *, system: str | None = None, raw: bool = False) -> list[int]:
        """The token ids of a prompt as `stream` takes it."""
        return self._encode(self._read(prompt, system=system, raw=raw))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits (tokens, vocabulary) behind each of `ids`, for measuring and research."""
        ids = self._check_ids(ids)
        if len(ids) > self.context_length:
            raise ContextOverflowError(len(ids), self.context_length)
        session, cache = self._open_session(), KVCache(self.manifest.dimensions, len(ids))
        logits = np.empty((len(ids), self.manifest.dimensions.vocabulary), np.float32)
        for start, end in passes(0, len(ids), PREFILL_CHUNK):
            logits[start:end] = session.forward(ids[start:end], cache, range(end - start))
        return logits

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> Embeddings:
        """Each text, or list of token ids, as a vector: the mean of what the model's head reads behind each
        token, or that of the last one. With `normalize` vectors have length one.

        A text is taken as it is, without the chat template. Its vector depends on nothing else. Raises
        PromptError for an empty one, ContextOverflowError for one that is too long (nothing is cut),
        InvalidSettingError and, for a bundle that was exported without hidden states, NoHiddenStatesError.
        """
        pooled = [each.result() for each in self._embed(texts, pooling)]
        return collect(pooled, self.manifest.dimensions.hidden, normalize=normalize)

    def save_prefix(
        self, path: str | Path, prompt: Prompt, *, system: str | None = None, raw: bool = False
    ) -> int:
        """Computes the beginning of prompts to come, such as a long system message, and saves its keys and
        values to a file. Returns how many tokens they are.

        A list of messages is saved without the beginning of the answer to it.

        Raises as `stream`, and StorageError.
        """
        self._open_session()
        ids = self._encode(self._read(prompt, system=system, raw=raw), continues=True)
        # What the cache lends stops before the last two tokens of a prompt.
        padded = [*ids, ids[-1], ids[-1]]
        self._answer(padded, {"max_tokens": 1}).finish()
        try:
            prefix = self._scheduler.call(lambda pool: pool.stored(ids)).result()
        except ValueError as error:  # other requests have taken its place meanwhile
            raise PocketlmError(
                f"The prefix of {len(ids):,} tokens was pushed out of the cache by other requests before it "
                "was saved. Try again when fewer are under way, or load the model with larger cache_bytes."
            ) from error
        saved_prefix.save(Path(path), prefix, saved_prefix.fingerprint(self.manifest))
        return len(ids)

    def load_prefix(self, path: str | Path) -> int:
        """Reads what `save_prefix` of the same bundle has written, for prompts that begin with it. It counts
        as part of the `cache_bytes` that the model was loaded with. Returns how many tokens it has.

        Raises SavedPrefixError for another bundle's file or a damaged one, and InvalidSettingError if the
        cache is too small for it.
        """
        self._open_session()
        fingerprint = saved_prefix.fingerprint(self.manifest)
        prefix = saved_prefix.load(Path(path), fingerprint, self.manifest.dimensions)
        if not self._scheduler.call(lambda pool: pool.store.put(prefix)).result():
            raise InvalidSettingError(
                f"The prefix takes {prefix.bytes:,} bytes, more than the cache holds. "
                "Load the model with larger cache_bytes."
            )
        return len(prefix.ids)

    def _embed(self, texts: Sequence[str | Sequence[int]], pooling: Pooling) -> Iterator[Future[Pooled]]:
        """Checks the texts at once, and begins each when it is its turn."""
        session = self._open_session()
        check_pooling(pooling)
        sequences = read_texts(texts, lambda text: self.encode(text, raw=True), self.context_length)
        return (self._embedder.begin(session, ids, pooling) for ids in sequences)

    def _answer(
        self,
        prompt: list[int] | list[Message],
        settings: Settings,
        *,
        settle: bool = False,
        on_end: Callable[[Stream], None] | None = None,
    ) -> Stream:
        request, dropped = self._plan(prompt, AnswerSettings.of(settings), settle=settle)
        stream = Stream(request.channel, on_end, dropped, owner=self)
        self._scheduler.submit(request)
        return stream

    def _plan(
        self, prompt: list[int] | list[Message], settings: AnswerSettings, *, settle: bool = False
    ) -> tuple[Request, int]:
        """The request, and how many messages of the conversation were left out."""
        self._open_session()
        ids, dropped = self._fit(prompt, settings)
        room = self.context_length - len(ids)
        if room < 1:
            raise ContextOverflowError(len(ids), self.context_length)
        eos = self.manifest.tokens.eos
        sampler = Sampler(
            settings.sampling,
            self.manifest.dimensions.vocabulary,
            ids,
            top_logprobs=settings.top_logprobs,
            min_tokens=settings.min_tokens,
            eos=eos,
        )
        tools = self._tool_format if settings.tool_choice.mode != "none" else None
        marker_id = None if tools is None else tools.marker_id(self.tokenizer)
        grammar = settings.grammar
        if tools is not None:
            grammar = tools.grammar(
                settings.tools,
                settings.tool_choice,
                parallel=settings.parallel_tool_calls,
                marker_id=marker_id,
            )
        answer = Answer(
            self.tokenizer.stream(skip_special=marker_id is None, continues=True),
            StopMatcher(settings.stop),
            eos=() if settings.ignore_eos else eos,
            limit=room if settings.max_tokens is None else min(room, settings.max_tokens),
            calls=None if tools is None else ToolCallParser(tools),
        )
        channel = Channel(len(ids))
        request = Request(
            ids,
            sampler,
            answer,
            channel,
            constraint=None if grammar is None else self._constraints.constraint(grammar),
            speculator=self._speculator(ids) if settings.speculate and self.power.speculate else None,
            cache_prompt=settings.cache_prompt,
            settle=settle,
            deadline=None if settings.timeout_s is None else channel.asked_at + settings.timeout_s,
        )
        return request, dropped

    def _speculator(self, ids: list[int]) -> Speculator:
        drafter = None if self._draft is None else self._draft.sequence(self.context_length)
        return Speculator(ids, self._costs, table=self._ngrams, drafter=drafter)

    @cached_property
    def _constraints(self) -> ConstraintFactory:
        manifest = self.manifest
        return ConstraintFactory(self.tokenizer, manifest.dimensions.vocabulary, manifest.tokens.eos)

    def _fit(self, prompt: list[int] | list[Message], settings: AnswerSettings) -> tuple[list[int], int]:
        messages = _messages(prompt)
        if messages is None:
            if settings.tools:
                raise PromptError("Tools need the chat template; give the prompt as messages.")
            return self._encode(prompt), 0
        if settings.tools and self._tool_format is None and self.tokenizer.has_tools:
            raise PromptError(
                f"{self.name} writes tool calls in a form that pocketlm does not know. Use another model, or "
                "describe the tools in a message and constrain the answer."
            )
        tools = [tool.as_dict() for tool in settings.tools]
        if settings.tool_choice.mode == "none" and not self.tokenizer.has_tools:
            tools = []  # nothing is asked of them

        def encode(some: Sequence[Message]) -> list[int]:
            return self.tokenizer.encode_chat(some, tools=tools)

        if settings.overflow == "error":
            return self._check_ids(encode(messages)), 0
        # Room for the answer: as long as it may get, or a quarter of the context.
        wanted = self.context_length // 4 if settings.max_tokens is None else settings.max_tokens
        limit = max(1, self.context_length - min(wanted, self.context_length // 2))
        try:
            kept, dropped = fit(messages, lambda some: len(encode(some)), limit)
        except ContextOverflowError as error:  # a long last message: the answer then gets what room it leaves
            if error.prompt_tokens >= self.context_length:
                raise ContextOverflowError(error.prompt_tokens, self.context_length) from None
            kept, dropped = fit(messages, lambda some: len(encode(some)), error.prompt_tokens)
        return encode(kept), dropped

    def _read(self, prompt: Prompt, *, system: str | None, raw: bool) -> list[int] | list[Message]:
        """The prompt as messages, where it goes through the chat template, or as token ids."""
        if isinstance(prompt, str):
            if raw or not self.tokenizer.has_chat_template:
                if system is not None:
                    raise PromptError(
                        "A system message needs the chat template; here the text is continued raw."
                    )
                return self._check_ids(self.tokenizer.encode(prompt))
            prompt = [Message(role="user", content=prompt)]
        items: list[Any] = list(prompt)
        if all(isinstance(item, int | np.integer) for item in items):
            if system is not None:
                raise PromptError(
                    "A system message needs the chat template; token ids are taken as they are."
                )
            return self._check_ids(items)
        return items if system is None else [Message(role="system", content=system), *items]

    def _encode(self, prompt: list[int] | list[Message], *, continues: bool = False) -> list[int]:
        messages = _messages(prompt)
        if messages is None:
            return [token for token in prompt if isinstance(token, int)]
        ids = self.tokenizer.encode_chat(messages, add_generation_prompt=not continues)
        return self._check_ids(ids)

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        vocabulary = self.manifest.dimensions.vocabulary
        checked = [operator.index(token_id) for token_id in ids]
        for token_id in checked:
            if not 0 <= token_id < vocabulary:
                raise PromptError(f"The token id {token_id} is outside the vocabulary of {vocabulary:,}.")
        if not checked:
            raise PromptError("The prompt is empty. Give the model at least one token to go on from.")
        return checked

    def _open_session(self) -> Session:
        if self._session is None:
            raise PocketlmError(f"The model {self.name} has been closed. Load it again.")
        return self._session


def _messages(prompt: list[int] | list[Message]) -> list[Message] | None:
    """None for token ids."""
    return None if all(isinstance(item, int) for item in prompt) else cast(list[Message], prompt)


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
