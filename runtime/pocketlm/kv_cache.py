"""The keys and values of sequences, in buffers that are allocated once and written in place."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pocketlm.manifest import Dimensions

_PAGE = mmap.PAGESIZE


class KVCache:
    """Room for `capacity` tokens of one sequence: a slot of `KVSlots`, or an allocation of its own.

    `ids` are the tokens whose keys and values are in. The first `settled` of them were computed several at
    a time, as a prompt is. The others were computed alone, each in a step of generation: ONNX Runtime's
    attention multiplies a single row by other means than several, with another last bit, and behind it the
    rounding of activations makes that a visible difference. Several rows come out alike however they are
    split. So only settled tokens are reused for another sequence, and an answer does not depend on what was
    cached.

    Layers with a sliding window do not keep the first `released` tokens, which no token to come can see.
    """

    def __init__(self, dimensions: Dimensions, capacity: int, slots: KVSlots | None = None) -> None:
        self.dimensions = dimensions
        self.capacity = capacity
        self.ids: list[int] = []
        self.settled = 0
        self.released = 0
        self.shortest = 0
        """The fewest tokens, apart from none, that the sequence can be cut to: a token behind fewer would see
        what is released."""
        # Slots made here do not know the cache, so that it is freed as soon as it is dropped.
        self.slots = KVSlots(dimensions, capacity, 0) if slots is None else slots
        self.index = 0

    @property
    def buffer(self) -> NDArray[np.float32]:
        """(layers, key or value, batch 1, kv_heads, capacity, head_dim)"""
        return self.slots.buffer[:, :, self.index : self.index + 1]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def bytes(self) -> int:
        """What the tokens in the cache take."""
        return self.bytes_of(len(self.ids))

    def bytes_of(self, length: int) -> int:
        """What the first `length` tokens take."""
        of = self.dimensions
        held = sum(length - min(self.first(layer), length) for layer in range(of.layers))
        return 4 * 2 * of.kv_heads * of.head_dim * held

    def first(self, layer: int) -> int:
        """The first token whose keys and values the layer has."""
        return self.released if layer in self.slots.windowed else 0

    def append(self, ids: Sequence[int]) -> None:
        """Takes note of tokens that one forward pass has put in."""
        self._release_unseen()  # by what was there before: a draft may still be taken back
        if len(ids) > 1 and self.settled == len(self.ids):
            self.settled += len(ids)
        self.ids.extend(ids)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Their place is overwritten by what comes next.

        Raises ValueError for fewer than `shortest`, but for none.
        """
        self._check(length)
        del self.ids[length:]
        self.settled = min(self.settled, length)
        if not self.ids:
            self.released = self.shortest = 0

    def copy_from(self, other: KVCache, length: int) -> None:
        """Becomes the first `length` tokens of `other`, a cache of the same model.

        Raises ValueError for fewer than its `shortest`, but for none.
        """
        other._check(length)
        other.slots._copy(other.buffer, self.buffer, length, other.released)
        self.ids = other.ids[:length]
        self.settled = min(other.settled, length)
        self.released, self.shortest = (other.released, other.shortest) if length else (0, 0)

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` are in the cache and settled, with all that the next token sees."""
        limit = min(self.settled, len(ids))
        if self.ids[:limit] != ids[:limit]:  # the usual next turn is compared at once
            limit = next((i for i in range(limit) if self.ids[i] != ids[i]), limit)
        return limit if limit >= self.shortest else 0

    def release(self) -> None:
        """Gives the memory that the cache's tokens do not need back to the operating system."""
        self.slots._discard(range(self.dimensions.layers), self.index, len(self.ids), self.capacity)
        self.slots._discard(self.slots.windowed, self.index, 0, self.released)

    def _release_unseen(self) -> None:
        # A window more than needed stays, so that a conversation can go back a little, and as giving pages
        # back takes a call for each head, there is one for each window and not for each token.
        window = self.slots.window
        if window and self.settled - 2 * window >= self.released + window:
            self.released = self.settled - 2 * window
            self.shortest = self.released + window - 1
            self.slots._discard(self.slots.windowed, self.index, 0, self.released)

    def _check(self, length: int) -> None:
        if 0 < length < self.shortest:
            raise ValueError(
                f"The first {length:,} tokens are not all there: layers with a window have released "
                f"{self.released:,}, so from {self.shortest:,} on, or none, are expected."
            )


class KVSlots:
    """Caches that lie side by side, so that one forward pass can step several sequences.

    The operating system provides a page of the buffer when it is first written, so capacity that is not
    used costs address space and no memory; nor does what layers with a sliding window gave back. Attention
    reads that as zeros and gives it no weight.
    """

    def __init__(
        self,
        dimensions: Dimensions,
        capacity: int,
        count: int,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        """`windows` are those of the layers (see `KVCacheFormat`); without them everything is kept."""
        self._dimensions = dimensions
        self.capacity = capacity
        # Where memory cannot be given back, there is nothing to gain.
        sizes = dict(enumerate(windows or ())) if hasattr(mmap, "MADV_DONTNEED") else {}
        self.windowed = frozenset(layer for layer, size in sizes.items() if size is not None)
        """The layers that have a window."""
        self.window = max((size for size in sizes.values() if size is not None), default=0)
        """The largest one, in tokens; 0: there is none."""
        self.version = 0
        """Grows when the buffer is another one."""
        self.caches: list[KVCache] = []
        self._allocate(max(count, 1))
        self.grow(count)

    def __len__(self) -> int:
        return len(self.caches)

    def grow(self, count: int) -> None:
        """Makes room for `count` sequences; those that are there stay where they are."""
        if count > self.buffer.shape[2]:
            before = self.buffer
            self._allocate(count)
            for cache in self.caches:
                slot = (slice(None), slice(None), cache.index)
                self._copy(before[slot], self.buffer[slot], len(cache), cache.released)
        while len(self.caches) < count:
            cache = KVCache(self._dimensions, self.capacity, self)
            cache.index = len(self.caches)
            self.caches.append(cache)

    def move(self, source: KVCache, target: KVCache) -> None:
        """Exchanges the places of two caches of these slots; what `target` held is lost."""
        target.truncate(0)
        self._copy(source.buffer, target.buffer, len(source), source.released)
        source.index, target.index = target.index, source.index
        self.caches[source.index], self.caches[target.index] = source, target
        source.release()
        target.release()

    def close(self) -> None:
        """Lets go of the memory, whoever still has a cache."""
        self.caches.clear()
        self._allocate(0)

    def _allocate(self, count: int) -> None:
        of = self._dimensions
        shape = (of.layers, 2, count, of.kv_heads, self.capacity, of.head_dim)
        # A huge page holds a head's keys for thousands of tokens, and its first token would claim it whole.
        self._memory = private_memory(max(4 * math.prod(shape), 1), huge_pages=False)
        self.buffer: NDArray[np.float32] = np.frombuffer(self._memory, np.float32, math.prod(shape)).reshape(
            shape
        )
        """(layers, key or value, slots, kv_heads, capacity, head_dim)"""
        self.version += 1

    def _copy(
        self, source: NDArray[np.float32], target: NDArray[np.float32], length: int, released: int
    ) -> None:
        """The first `length` tokens, in arrays (layers, …, capacity, head_dim), without what is released:
        copied zeros would take memory."""
        for layer in range(len(source)):
            held = (layer, ..., slice(released if layer in self.windowed else 0, length), slice(None))
            target[held] = source[held]

    def _discard(self, layers: Iterable[int], index: int, first: int, last: int) -> None:
        """Gives back the pages of a slot on which there is nothing but the tokens `first` … `last` − 1."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        strides = self.buffer.strides
        for layer, part, head in product(layers, range(2), range(self._dimensions.kv_heads)):
            begin = layer * strides[0] + part * strides[1] + index * strides[2] + head * strides[3]
            first_page = -(-(begin + first * strides[4]) // _PAGE) * _PAGE
            end = (begin + last * strides[4]) // _PAGE * _PAGE
            if first_page < end:
                self._memory.madvise(mmap.MADV_DONTNEED, first_page, end - first_page)


def private_memory(size: int, *, huge_pages: bool) -> mmap.mmap:
    """`size` bytes of zeros, which the operating system provides page by page as they are written."""
    # Not shared with forked children, where the system makes that difference; and without a reservation,
    # which it may refuse for more than its memory although most of it is never written.
    no_reserve = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, from Python 3.13 on
    memory = (
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | no_reserve)
        if hasattr(mmap, "MAP_PRIVATE")
        else mmap.mmap(-1, size)
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return memory
