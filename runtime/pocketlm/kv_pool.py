"""Which cache a sequence gets, so that most of its beginning is there already.

A sequence under way has a slot. When it has ended, its slot stays as it is for the next turn of the same
conversation, until another sequence needs it: then what it holds moves to the store.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pocketlm.kv_cache import KVCache, KVSlots
from pocketlm.manifest import Dimensions
from pocketlm.prefix_store import PrefixStore, StoredPrefix


class KVPool:
    """For one thread, the engine's."""

    def __init__(
        self,
        dimensions: Dimensions,
        capacity: int,
        budget_bytes: int,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        """`capacity` is in tokens for each sequence; `windows`: see `KVCacheFormat`.

        `budget_bytes` bounds what the store keeps, and what idle slots keep except the one used last.
        """
        self.store = PrefixStore(budget_bytes)
        self._budget_bytes = budget_bytes
        self.slots = KVSlots(dimensions, capacity, 1, windows)
        self._idle = list(self.slots.caches)  # the last one was used last

    def take(self, ids: Sequence[int]) -> KVCache:
        """A cache that holds as much of the beginning of `ids` as there is, and nothing else."""
        best = max(self.slots.caches, key=lambda cache: cache.reusable(ids))
        shared = best.reusable(ids)
        stored = self.store.best(ids, beyond=shared)
        if stored is not None:
            cache = self._free()
            self.store.restore(stored[0], cache, stored[1])
        elif shared and best in self._idle:
            cache = best
            if 2 * shared < best.settled:  # more is lost than kept
                self.store.add(best, best.settled)
            self._shorten(cache, shared)
        else:
            cache = self._free()
            if shared:
                cache.copy_from(best, shared)
        self._idle.remove(cache)
        return cache

    def give_back(self, cache: KVCache) -> None:
        self._idle.append(cache)
        kept = 0
        for idle in reversed(self._idle):
            kept += idle.bytes
            if kept > self._budget_bytes and idle is not cache:
                self._shorten(idle, 0)

    def gather(self, caches: Collection[KVCache]) -> None:
        """Moves `caches` together as far as idle slots lie between them."""
        while True:
            first, last = (pick(caches, key=lambda cache: cache.index) for pick in (min, max))
            between = self.slots.caches[first.index : last.index]
            hole = next((cache for cache in between if cache in self._idle), None)
            if hole is None:
                return
            self.store.add(hole, hole.settled)
            self.slots.move(last, hole)

    def stored(self, ids: Sequence[int]) -> StoredPrefix:
        """A copy of what is kept of `ids`; ValueError if not all of it is."""
        cache = self.take(ids)
        try:
            return StoredPrefix.of(cache, len(ids))
        finally:
            self.give_back(cache)

    def close(self) -> None:
        """Frees the memory."""
        self._idle.clear()
        self.slots.close()
        self.store.clear()

    def _free(self) -> KVCache:
        """An idle cache, emptied."""
        if not self._idle:
            before = len(self.slots)
            self.slots.grow(2 * before)
            self._idle[:0] = self.slots.caches[before:]
        cache = next((idle for idle in self._idle if not len(idle)), self._idle[0])
        self.store.add(cache, cache.settled)
        self._shorten(cache, 0)
        return cache

    @staticmethod
    def _shorten(cache: KVCache, length: int) -> None:
        cache.truncate(length)
        cache.release()
