"""Embeddings of texts: the decoder's hidden states, pooled to one vector a text.

The states are those behind the last norm, Hugging Face's `last_hidden_state`, and a bundle of any precision
gives them in the checkpoint's own coordinates: vectors of the int8, the int4 and the fp32 bundle of one model
can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import ContextOverflowError, InvalidSettingError, PromptError
from pocketlm.kv_pool import KVPool
from pocketlm.prefill import PREFILL_CHUNK, passes
from pocketlm.scheduler import Scheduler
from pocketlm.session import Session

Pooling = Literal["mean", "last"]
Text = str | Sequence[int]


@dataclass(frozen=True)
class Embeddings:
    """Texts as vectors."""

    vectors: NDArray[np.float32]
    """(texts, hidden)"""
    prompt_tokens: int  # of all texts together
    compute_s: float  # the engine's work for them


@dataclass(frozen=True)
class Pooled:
    """One text's states, pooled."""

    vector: NDArray[np.float64]  # (hidden)
    tokens: int
    compute_s: float


class Embedder:
    """Embeds on the engine's thread, between the steps of the answers that are under way.

    One text at a time and of that one chunk a step, whoever asks: an answer waits for no more than a chunk
    between two tokens, and no more than one text's keys and values are in memory. Requests take turns, text
    by text.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._turns = ThreadPoolExecutor(1, "pocketlm-embed")  # it only waits for the engine

    def begin(self, session: Session, ids: Sequence[int], pooling: Pooling) -> Future[Pooled]:
        """Queues one text. The future raises what `Session.hidden` raises, and PocketlmError if the model is
        closed meanwhile."""
        return self._turns.submit(self._embed, session, ids, pooling)

    def _embed(self, session: Session, ids: Sequence[int], pooling: Pooling) -> Pooled:
        cache = session.new_cache(len(ids))

        def compute(start: int, end: int, _: KVPool) -> tuple[NDArray[np.float64], float]:
            begun = time.perf_counter()
            rows = range(end - start) if pooling == "mean" else [end - start - 1]
            states = session.hidden(ids[start:end], cache, rows).sum(axis=0, dtype=np.float64)
            return states, time.perf_counter() - begun

        total, compute_s = np.zeros(session.dimensions.hidden), 0.0
        # Always the same passes, whatever `pocketlm tune` found, so that a text's vector is always the same.
        for start, end in passes(0, len(ids), PREFILL_CHUNK):
            states, seconds = self._scheduler.call(partial(compute, start, end)).result()
            total = total + states if pooling == "mean" else states
            compute_s += seconds
        return Pooled(total / len(ids) if pooling == "mean" else total, len(ids), compute_s)


def read_texts(
    texts: Sequence[Text], encode: Callable[[Text], list[int]], context_length: int
) -> list[list[int]]:
    """The token ids of each text. Raises PromptError and ContextOverflowError."""
    if isinstance(texts, str) or any(isinstance(text, int | np.integer) for text in texts):
        raise PromptError(
            "A list of texts, or of lists of token ids, is expected. Put a single one in a list."
        )
    sequences = []
    for number, text in enumerate(texts, 1):
        if not len(text):
            raise PromptError(
                f"Text {number} of {len(texts)} is empty, so it has no embedding. Leave it out."
            )
        ids = encode(text)
        if len(ids) > context_length:
            raise ContextOverflowError(len(ids), context_length)
        sequences.append(ids)
    return sequences


def check_pooling(pooling: Pooling) -> None:
    """Raises InvalidSettingError for a way of pooling that there is not."""
    if pooling not in get_args(Pooling):
        raise InvalidSettingError(f"pooling is {pooling!r}; expected 'mean' or 'last'.")


def collect(pooled: Iterable[Pooled], width: int, *, normalize: bool) -> Embeddings:
    """The vectors of `width` channels as float32; with `normalize` each has length one, if it is not zero."""
    results = list(pooled)
    vectors = np.array([each.vector for each in results], np.float64).reshape(-1, width)
    if normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(lengths > 0, lengths, 1)
    return Embeddings(
        vectors.astype(np.float32),
        prompt_tokens=sum(each.tokens for each in results),
        compute_s=sum(each.compute_s for each in results),
    )
