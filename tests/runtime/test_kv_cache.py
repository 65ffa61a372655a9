"""The keys and values of sequences, alone and side by side."""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pocketlm.kv_cache import KVCache, KVSlots
from pocketlm.manifest import Dimensions

DIMENSIONS = Dimensions(
    layers=2,
    hidden=8,
    intermediate=16,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocabulary=32,
    context_length=64,
)
# A page holds 64 tokens of one head.
WIDE = Dimensions(
    layers=2,
    hidden=32,
    intermediate=32,
    heads=2,
    kv_heads=2,
    head_dim=16,
    vocabulary=32,
    context_length=1024,
)


def cache_of(ids: Sequence[int]) -> KVCache:
    """As behind a prompt of these tokens."""
    cache = KVCache(DIMENSIONS, 64)
    cache.append(ids)
    cache.settled = len(ids)
    return cache


def fill(cache: KVCache, ids: Sequence[int]) -> None:
    """Each token's values tell which it is, and where."""
    begin = len(cache)
    for place, token_id in enumerate(ids, begin):
        cache.buffer[..., place, :] = 1000 * token_id + place
    cache.append(ids)
    cache.settled = len(cache)


def holds(cache: KVCache, ids: Sequence[int]) -> bool:
    expected = [1000 * token_id + place for place, token_id in enumerate(ids)]
    values = cache.buffer[..., : len(ids), :]
    return cache.ids == list(ids) and bool((values == np.array(expected)[:, None]).all())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TestCache:
    def test_begins_empty_and_zero(self) -> None:
        cache = KVCache(DIMENSIONS, 10)
        assert len(cache) == cache.bytes == 0
        layers, parts, batch, heads, room, width = cache.buffer.shape
        assert (layers, parts, batch, heads, width) == (2, 2, 1, 1, 4)
        assert room >= cache.capacity == 10
        assert cache.buffer.dtype == np.float32
        assert not cache.buffer.any()
        cache.buffer[...] = 1  # writable

    @pytest.mark.parametrize(
        ("ids", "shared"), [([], 0), ([1], 1), ([1, 2, 3], 3), ([1, 2, 3, 4], 3), ([1, 9, 3], 1), ([9], 0)]
    )
    @pytest.mark.parametrize("kind", [list, tuple])
    def test_reusable(self, ids: list[int], shared: int, kind: type[Sequence[int]]) -> None:
        assert cache_of([1, 2, 3]).reusable(kind(ids)) == shared  # type: ignore[call-arg]

    def test_only_what_was_computed_several_at_a_time_is_reusable(self) -> None:
        cache = KVCache(DIMENSIONS, 64)
        cache.append([1, 2, 3])
        cache.append([4, 5])
        assert cache.settled == 5
        cache.append([6])
        cache.append([7, 8])  # they have seen the one before
        assert (cache.settled, cache.ids) == (5, [1, 2, 3, 4, 5, 6, 7, 8])
        assert cache.reusable([1, 2, 3, 4, 5, 6, 7, 8]) == 5
        other = KVCache(DIMENSIONS, 64)
        other.copy_from(cache, 7)
        assert (len(other), other.settled) == (7, 5)
        cache.truncate(6)
        assert cache.settled == 5
        cache.truncate(4)
        assert cache.settled == 4
        cache.append([5, 6])
        assert cache.settled == 6

    def test_a_first_token_alone_is_not_settled(self) -> None:
        cache = KVCache(DIMENSIONS, 64)
        cache.append([1])
        assert cache.reusable([1, 2]) == 0

    def test_truncate(self) -> None:
        cache = cache_of([1, 2, 3])
        cache.truncate(5)
        assert cache.ids == [1, 2, 3]
        cache.truncate(1)
        assert cache.ids == [1]
        cache.truncate(0)
        assert len(cache) == 0

    def test_bytes_are_those_of_its_tokens(self) -> None:
        cache = cache_of([1, 2, 3])
        assert cache.bytes == cache.bytes_of(3) == cache.buffer[..., :3, :].nbytes
        assert cache.bytes_of(0) == 0

    def test_a_copy_goes_its_own_way(self) -> None:
        cache, copy = KVCache(DIMENSIONS, 64), KVCache(DIMENSIONS, 64)
        fill(cache, [1, 2, 3])
        fill(copy, [4, 5, 6, 7])
        copy.copy_from(cache, 2)
        assert holds(copy, [1, 2])
        assert (copy.settled, cache.ids) == (2, [1, 2, 3])
        copy.buffer[...] = 0
        assert holds(cache, [1, 2, 3])

    def test_a_cache_that_is_dropped_is_freed_at_once(self) -> None:
        cache = KVCache(DIMENSIONS, 64)
        buffer = weakref.ref(cache.slots.buffer)
        del cache
        assert buffer() is None

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
    def test_memory_is_committed_when_it_is_written(self) -> None:
        large = Dimensions(32, 4096, 8192, 32, 8, 128, 1000, 131_072)
        before = resident_bytes()
        cache = KVCache(large, 65_536)
        assert cache.buffer.nbytes >= 16 << 30
        assert resident_bytes() - before < 16 << 20
        # A few tokens touch a page or so for each layer, part and head: 512 of them.
        cache.buffer[..., :4, :] = 1
        assert 512 * 4096 <= resident_bytes() - before < 16 << 20


class TestSlots:
    def test_are_neighbours_in_one_buffer(self) -> None:
        slots = KVSlots(DIMENSIONS, 64, 3)
        assert slots.buffer.shape == (2, 2, 3, 1, 64, 4)
        assert [cache.index for cache in slots.caches] == [0, 1, 2]
        for cache in slots.caches:
            assert cache.buffer.shape == (2, 2, 1, 1, 64, 4)
            fill(cache, [cache.index + 1] * 64)
        for cache in slots.caches:
            assert holds(cache, [cache.index + 1] * 64)

    def test_grow_in_place(self) -> None:
        slots = KVSlots(DIMENSIONS, 64, 2)
        before, version = list(slots.caches), slots.version
        for cache in before:
            fill(cache, [cache.index + 1] * (5 + cache.index))
        old = weakref.ref(slots.buffer)
        slots.grow(5)
        assert slots.caches[:2] == before
        assert len(slots) == 5
        assert slots.version > version
        assert old() is None
        for cache in before:
            assert holds(cache, [cache.index + 1] * (5 + cache.index))
        assert not any(slots.caches[index].buffer.any() for index in (2, 3, 4))

    def test_growing_to_fewer_changes_nothing(self) -> None:
        slots = KVSlots(DIMENSIONS, 64, 4)
        version = slots.version
        slots.grow(2)
        assert (len(slots), slots.version) == (4, version)

    def test_move(self) -> None:
        slots = KVSlots(DIMENSIONS, 64, 3)
        first, second, third = slots.caches
        for cache, ids in ((first, [1] * 5), (second, [2] * 9), (third, [3] * 4)):
            fill(cache, ids)
        slots.move(third, first)
        assert slots.caches == [third, second, first]
        assert [cache.index for cache in slots.caches] == [0, 1, 2]
        assert holds(third, [3] * 4)
        assert third.settled == 4
        assert holds(second, [2] * 9)
        assert (first.ids, first.settled) == ([], 0)
        fill(first, [4] * 6)
        assert holds(first, [4] * 6)
        assert holds(third, [3] * 4)

    def test_close_lets_go_of_the_memory_whoever_has_a_cache(self) -> None:
        slots = KVSlots(DIMENSIONS, 64, 2)
        cache = slots.caches[0]
        fill(cache, [1, 2, 3])
        buffer, version = weakref.ref(slots.buffer), slots.version
        slots.close()
        assert buffer() is None
        assert slots.version > version
        assert cache.buffer.nbytes == 0
        slots.close()

    @pytest.mark.skipif(
        sys.platform != "linux" or not hasattr(mmap, "MADV_DONTNEED"), reason="/proc is Linux's"
    )
    def test_released_memory_goes_back(self) -> None:
        slots = KVSlots(Dimensions(8, 512, 512, 8, 8, 128, 32, 8192), 8192, 2)
        one, other = slots.caches
        fill(other, [2])
        fill(one, [1])
        one.buffer[..., 1:512, :] = 1  # 128 MiB with the other layers, parts and heads: 8 × 2 × 8 × 256 KiB
        before = resident_bytes()
        one.release()
        assert before - resident_bytes() > 24 << 20
        assert holds(one, [1])
        assert holds(other, [2])

    @pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000, 1024])
    def test_release_spares_what_is_in_use(self, length: int) -> None:
        slots = KVSlots(WIDE, 1024, 3)
        for cache in slots.caches:
            cache.buffer[...] = 1 + cache.index
        middle = slots.caches[1]
        middle.append([5] * length)
        middle.release()
        assert (slots.caches[0].buffer == 1).all()
        assert (slots.caches[2].buffer == 3).all()
        assert (middle.buffer[..., :length, :] == 2).all()
        assert np.isin(middle.buffer[..., length:, :], (0, 2)).all()
