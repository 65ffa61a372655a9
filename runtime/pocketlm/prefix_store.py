"""Keys and values of sequences that have no slot any more, the least recently used ones dropped first."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import ContextOverflowError, InvalidSettingError
from pocketlm.kv_cache import KVCache, private_memory

THREADS = min(4, os.cpu_count() or 1)
"""That copy and hash keys and values: a few are enough for all of the memory's bandwidth."""


@dataclass(frozen=True, eq=False)
class StoredPrefix:
    """The beginning of a sequence, at least one token, computed as a prompt is (see `KVCache.settled`)."""

    ids: tuple[int, ...]
    keys_values: NDArray[np.float32] = field(repr=False)
    """(layers, key or value, kv_heads, tokens, head_dim), read-only"""
    first: tuple[int, ...] = ()
    """By layer, the first token whose keys and values are there (see `KVCache.released`); (): all are."""
    shortest: int = 0
    """The fewest tokens that can be made of it (see `KVCache.shortest`)."""

    def __post_init__(self) -> None:
        if not self.ids or self.keys_values.ndim != 5 or self.keys_values.shape[3] != len(self.ids):
            raise ValueError(
                f"{len(self.ids)} token ids came with keys and values of shape {self.keys_values.shape}; "
                "at least one and (layers, 2, kv_heads, tokens, head_dim) are expected."
            )
        self.keys_values.flags.writeable = False

    @classmethod
    def of(cls, cache: KVCache, length: int) -> Self:
        """A copy of the first `length` tokens of the cache.

        Raises ValueError if they are none, not settled or not all there.
        """
        if not 0 < length <= cache.settled:
            raise ValueError(f"{length} tokens are to be stored, but {cache.settled} are settled.")
        if length < cache.shortest:
            raise ValueError(f"{length} tokens are to be stored, but {cache.released} are released.")
        beginning = cache.buffer[:, :, 0, :, :length]
        first = tuple(map(cache.first, range(len(beginning)))) if cache.released else ()
        # A huge page would also be there where nothing is copied to.
        keys_values = own_array(beginning.shape, huge_pages=not first)
        _copy(beginning, keys_values, first)
        return cls(tuple(cache.ids[:length]), keys_values, first, cache.shortest)

    @cached_property
    def bytes(self) -> int:
        """What the keys and values take."""
        token = self.keys_values[:1, :, :, :1].nbytes
        return self.keys_values.nbytes - token * sum(self.first)

    @cached_property
    def _numbers(self) -> NDArray[np.int32]:
        return np.array(self.ids, np.int32)


class PrefixStore:
    """Prefixes of one model under a budget of memory. For one thread.

    Each entry has a copy of its own, also of what it shares with others. An entry that is itself the
    beginning of another one is not kept.
    """

    def __init__(self, budget_bytes: int) -> None:
        """With a budget of 0 nothing is kept. Raises InvalidSettingError for less."""
        if budget_bytes < 0:
            raise InvalidSettingError(
                f"The budget is {budget_bytes:,} bytes; a number from 0 on is expected."
            )
        self._budget_bytes = budget_bytes
        self._entries: list[StoredPrefix] = []  # the last one was used last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """What all entries take, never more than the budget."""
        return sum(entry.bytes for entry in self._entries)

    def best(self, ids: Sequence[int], beyond: int = 0) -> tuple[StoredPrefix, int] | None:
        """The entry that shares the longest prefix with `ids`, and how many tokens that is.

        None if no entry shares more than `beyond` tokens, with all that the next one sees; among equals it is
        the one used last. It counts as used.
        """
        numbers = np.asarray(ids, np.int32)
        longest, found = beyond, None
        for entry in reversed(self._entries):
            shared = _shared(entry._numbers, numbers)
            if shared > longest and shared >= entry.shortest:
                longest, found = shared, entry
        if found is None:
            return None
        self._use(found)
        return found, longest

    def add(self, cache: KVCache, length: int) -> bool:
        """Keeps a copy of the first `length` tokens of the cache, or of as many of them as are settled.

        Nothing is copied if an entry holds them already (it then counts as used), if they alone exceed the
        budget, or if they are not all there. Returns whether the store now holds them.
        """
        length = min(length, cache.settled)
        if length < max(cache.shortest, 1):
            return False
        return self._keep(
            cache.ids[:length],
            cache.bytes_of(length),
            cache.shortest,
            lambda: StoredPrefix.of(cache, length),
        )

    def put(self, prefix: StoredPrefix) -> bool:
        """Keeps `prefix` itself, for example one that was loaded from disk; otherwise as `add`."""
        return self._keep(prefix.ids, prefix.bytes, prefix.shortest, lambda: prefix)

    @staticmethod
    def restore(prefix: StoredPrefix, cache: KVCache, length: int) -> None:
        """Makes the first `length` tokens of `prefix` the content of the cache, in place.

        What of them the cache holds and has settled is not copied again.

        Raises ContextOverflowError if the cache has no room for them, ValueError if the prefix does not have
        them all.
        """
        if length > len(prefix.ids):
            raise ValueError(f"{length} tokens are to be restored, but the prefix has {len(prefix.ids)}.")
        if 0 < length < prefix.shortest:
            raise ValueError(
                f"{length} tokens are to be restored, but the prefix has released what fewer "
                f"than {prefix.shortest} would need."
            )
        if length > cache.capacity:
            raise ContextOverflowError(length, cache.capacity)
        kept = min(cache.settled, length)
        if cache.released or tuple(cache.ids[:kept]) != prefix.ids[:kept]:
            kept = 0
        first = [
            min(max(each, kept), length) - kept if layer in cache.slots.windowed else 0
            for layer, each in enumerate(prefix.first)
        ]
        _copy(prefix.keys_values[:, :, :, kept:length], cache.buffer[:, :, 0, :, kept:length], first)
        cache.ids[:] = prefix.ids[:length]
        cache.settled = length
        cache.released = max(prefix.first, default=0) if length else 0
        cache.shortest = prefix.shortest if length else 0

    def clear(self) -> None:
        """Drops every entry."""
        self._entries.clear()

    def _keep(self, ids: Sequence[int], size: int, shortest: int, make: Callable[[], StoredPrefix]) -> bool:
        numbers = np.asarray(ids, np.int32)
        holders = (
            entry for entry in self._entries if _shared(entry._numbers, numbers) == len(ids) >= entry.shortest
        )
        if holder := next(holders, None):
            self._use(holder)
            return True
        if size > self._budget_bytes:
            return False
        # Room is made before the copy, so that both together stay within the budget at every moment.
        self._entries = [
            entry
            for entry in self._entries
            if _shared(entry._numbers, numbers) < len(entry.ids) or len(entry.ids) < shortest
        ]
        while self.bytes + size > self._budget_bytes:
            del self._entries[0]
        self._entries.append(make())
        return True

    def _use(self, entry: StoredPrefix) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)


def own_array(shape: Sequence[int], *, huge_pages: bool = True) -> NDArray[np.float32]:
    """Zeros in memory of their own: it goes back to the operating system with the last reference.

    The C library may keep what is freed: glibc from its second large block on, up to 32 MB each.
    """
    # Where all of it is about to be written, a huge page is one page fault where there would be 512.
    memory = private_memory(4 * math.prod(shape), huge_pages=huge_pages)
    return np.frombuffer(memory, np.float32).reshape(shape)


def _copy(source: NDArray[np.float32], target: NDArray[np.float32], first: Sequence[int] = ()) -> None:
    """By layers, side by side: where nothing was written before, page faults take longer than copying.

    Of layer N, tokens from `first[N]` on.
    """

    def copy(layer: int) -> None:
        held = (..., slice(first[layer] if first else 0, None), slice(None))
        target[layer][held] = source[layer][held]

    with ThreadPoolExecutor(THREADS) as executor:
        list(executor.map(copy, range(len(source))))


def _shared(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    count = min(len(first), len(second))
    different = first[:count] != second[:count]
    return int(different.argmax()) if different.any() else count
