"""A second, smaller model of the same tokenizer that drafts for a larger one (arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pocketlm.bundle import Bundle
from pocketlm.errors import InvalidSettingError
from pocketlm.prefill import PREFILL_CHUNK
from pocketlm.session import Session

_LEAST_CHANCE = 0.05  # of a whole draft, below which drafting on makes no difference


class DraftModel:
    """A loaded draft model. Safe for several threads, each request with a `sequence` of its own."""

    def __init__(self, bundle: Bundle, target: Bundle, *, threads: int, spin_us: int | None = None) -> None:
        """Loads `bundle` to draft for `target`. `threads` and `spin_us`: see `Session`.

        Raises InvalidSettingError if their tokens differ, and what `Session` raises.
        """
        _check_same_tokens(bundle, target)
        self.name = bundle.manifest.name
        manifest = bundle.manifest
        self.cost = manifest.bytes / target.manifest.bytes
        """Of a drafted token, as a share of the large model's pass: a step mostly reads all weights once."""
        # Tables of embeddings are padded differently; what is beyond either one's end is no token.
        self._vocabulary = min(each.manifest.dimensions.vocabulary for each in (bundle, target))
        self._session = Session(
            bundle.graph_path, manifest.dimensions, manifest.graph, threads=threads, spin_us=spin_us
        )

    def sequence(self, capacity: int) -> DraftSequence:
        """A drafter for one request of at most `capacity` tokens."""
        return DraftSequence(self._session, self.cost, self._vocabulary, capacity)


class DraftSequence:
    """What a draft model has read of one request: a `Drafter` for `Speculator`.

    Drafts are greedy. A request that outgrows the draft model's own context gets no more of them.
    """

    def __init__(self, session: Session, cost: float, vocabulary: int, capacity: int) -> None:
        self.cost = cost
        self._vocabulary = vocabulary
        self._session = session
        self._cache = session.new_cache(min(capacity, session.dimensions.context_length))

    def draft(self, ids: Sequence[int], limit: int) -> list[tuple[int, float]]:
        """At most `limit` tokens that may follow `ids`, each with its softmax probability.

        `ids` are those of the last call and what was added since; anything else works too, but is read anew.
        """
        cache = self._cache
        limit = min(limit, cache.capacity - len(ids) + 1)
        if limit < 1 or not ids:
            return []
        self._rewind(ids)
        if max(ids[len(cache) :]) >= self._vocabulary:
            return []
        logits = self._read(ids)
        drafted: list[tuple[int, float]] = []
        whole_chance = 1.0
        while True:
            token_id, chance = _likeliest(logits[: self._vocabulary])
            drafted.append((token_id, chance))
            whole_chance *= chance
            if len(drafted) == limit or whole_chance < _LEAST_CHANCE:
                return drafted
            logits = self._session.forward([token_id], cache)[0]

    def _rewind(self, ids: Sequence[int]) -> None:
        """Keeps what the cache shares with `ids`, but for the last token, whose logits are to be computed."""
        held = self._cache.ids
        most = min(len(held), len(ids) - 1)
        self._cache.truncate(next((i for i in range(most) if held[i] != ids[i]), most))

    def _read(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Catches up with `ids`; returns the logits (vocabulary) behind the last one."""
        logits = np.empty((1, 0), np.float32)
        for begin in range(len(self._cache), len(ids), PREFILL_CHUNK):
            logits = self._session.forward(ids[begin : begin + PREFILL_CHUNK], self._cache)
        last: NDArray[np.float32] = logits[0]
        return last


def _likeliest(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The token of the largest logit and its softmax probability."""
    token_id = int(logits.argmax())
    return token_id, 1 / float(np.exp(logits - logits[token_id]).sum())


def _check_same_tokens(bundle: Bundle, target: Bundle) -> None:
    names = bundle.manifest.name, target.manifest.name
    mine, theirs = (_vocabulary(each.tokenizer_json) for each in (bundle, target))
    if mine == theirs:
        return
    differing = len(dict(mine.items() ^ theirs.items()))
    raise InvalidSettingError(
        f"{names[0]} cannot draft for {names[1]}: {differing:,} of their tokens differ. A draft model needs "
        "the same tokenizer; take a smaller model of the same family."
    )


def _vocabulary(tokenizer_json: str) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab()
    return vocabulary
