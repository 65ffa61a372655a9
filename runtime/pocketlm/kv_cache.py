"""The keys and values of one sequence, in buffers that are allocated once and written in place."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock

import numpy as np

from pocketlm.manifest import Dimensions


class KVCache:
    """Room for `capacity` tokens of one sequence.

    The operating system provides a page of the buffer when it is first written, so capacity that is not
    used costs address space and no memory. `ids` are the tokens whose keys and values are in.
    """

    def __init__(self, dimensions: Dimensions, capacity: int) -> None:
        self.capacity = capacity
        self._dimensions = dimensions
        self.ids: list[int] = []
        shape = (dimensions.layers, 2, 1, dimensions.kv_heads, capacity + 1, dimensions.head_dim)
        self.buffer = np.frombuffer(_lazy_memory(4 * math.prod(shape)), np.float32).reshape(shape)
        """(layers, key or value, batch 1, kv_heads, capacity + 1, head_dim): the graph needs one more."""

    def __len__(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Their place is overwritten by what comes next."""
        del self.ids[length:]

    def fork(self, length: int) -> KVCache:
        """A cache of its own with the first `length` tokens of this one."""
        copy = KVCache(self._dimensions, self.capacity)
        copy.ids = self.ids[:length]
        copy.buffer[..., :length, :] = self.buffer[..., :length, :]
        return copy

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` are in the cache already."""
        limit = min(len(self.ids), len(ids))
        return next((i for i in range(limit) if self.ids[i] != ids[i]), limit)


def _lazy_memory(size: int) -> mmap.mmap:
    """`size` bytes of zeros."""
    # Not shared with forked children, where the system makes that difference.
    memory = (
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) if hasattr(mmap, "MAP_PRIVATE") else mmap.mmap(-1, size)
    )
    # A huge page holds a head's keys for thousands of tokens, and its first token would claim it whole.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class CachePool:
    """The caches of a model's recent sequences, handed out so that most of a new prompt is there already.

    A sequence under way has its cache to itself. Safe for several threads.
    """

    def __init__(self, new: Callable[[], KVCache], *, keep: int = 4) -> None:
        """`keep` is how many idle caches are remembered."""
        self._new = new
        self._keep = keep
        self._idle: list[KVCache] = []  # the last one was used last
        self._returned: SimpleQueue[KVCache] = SimpleQueue()
        self._lock = Lock()

    def take(self, ids: Sequence[int]) -> KVCache:
        """A cache that holds as much of the beginning of `ids` as any of them."""
        with self._lock:
            self._collect()
            best = max(self._idle, key=lambda cache: cache.common_prefix(ids), default=None)
            if best is None:
                return self._new()
            shared = best.common_prefix(ids)
            # A sequence that would lose more than half of itself is rather kept for its own next turn.
            if 2 * shared < len(best):
                return best.fork(shared)
            self._idle.remove(best)
            return best

    def give_back(self, cache: KVCache) -> None:
        # Garbage collection ends forgotten sequences at any moment, in the middle of `take` too: waiting for
        # the lock here could be waiting for oneself.
        self._returned.put(cache)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while not self._returned.empty():
            self._idle.append(self._returned.get())
        del self._idle[: -self._keep]
