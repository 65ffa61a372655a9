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
    used costs address space and no memory.

    `ids` are the tokens whose keys and values are in. The first `settled` of them were computed several at
    a time, as a prompt is. The others were computed alone, each in a step of generation: ONNX Runtime's
    attention multiplies a single row by other means than several, with another last bit, and behind it the
    rounding of activations makes that a visible difference. Several rows come out alike however they are
    split. So only settled tokens are reused for another sequence, and an answer does not depend on what was
    cached.
    """

    def __init__(self, dimensions: Dimensions, capacity: int) -> None:
        self.capacity = capacity
        self._dimensions = dimensions
        self.ids: list[int] = []
        self.settled = 0
        shape = (dimensions.layers, 2, 1, dimensions.kv_heads, capacity, dimensions.head_dim)
        self.buffer = np.frombuffer(_lazy_memory(4 * math.prod(shape)), np.float32).reshape(shape)
        """(layers, key or value, batch 1, kv_heads, capacity, head_dim)"""

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        """Takes note of tokens that one forward pass has put in."""
        if len(ids) > 1 and self.settled == len(self.ids):
            self.settled += len(ids)
        self.ids.extend(ids)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Their place is overwritten by what comes next."""
        del self.ids[length:]
        self.settled = min(self.settled, length)

    def fork(self, length: int) -> KVCache:
        """A cache of its own with the first `length` tokens of this one."""
        copy = KVCache(self._dimensions, self.capacity)
        copy.ids = self.ids[:length]
        copy.settled = min(self.settled, length)
        copy.buffer[..., :length, :] = self.buffer[..., :length, :]
        return copy

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` are in the cache and settled."""
        limit = min(self.settled, len(ids))
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

    def __init__(self, new: Callable[[], KVCache], *, keep: int = 2) -> None:
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
            best = max(self._idle, key=lambda cache: cache.reusable(ids), default=None)
            if best is None:
                return self._new()
            shared = best.reusable(ids)
            # A sequence that would lose more than half of what serves its own next turn is rather kept.
            if 2 * shared < best.settled:
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
