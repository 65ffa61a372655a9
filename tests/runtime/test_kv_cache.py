"""Caches of sequences, and which one a new prompt gets."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pocketlm.kv_cache import CachePool, KVCache
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


def cache_of(ids: Sequence[int]) -> KVCache:
    """As behind a prompt of these tokens."""
    cache = KVCache(DIMENSIONS, 64)
    cache.append(ids)
    cache.settled = len(ids)
    return cache


def pool_of(*sequences: Sequence[int], keep: int = 4) -> tuple[CachePool, list[KVCache]]:
    """A pool to which these sequences' caches were given back, in this order."""
    pool = CachePool(lambda: KVCache(DIMENSIONS, 64), keep=keep)
    caches = [cache_of(ids) for ids in sequences]
    for cache in caches:
        pool.give_back(cache)
    return pool, caches


class TestCache:
    def test_begins_empty_and_zero(self) -> None:
        cache = KVCache(DIMENSIONS, 10)
        assert len(cache) == 0
        layers, parts, batch, heads, room, width = cache.buffer.shape
        assert (layers, parts, batch, heads, width) == (2, 2, 1, 1, 4)
        assert room >= cache.capacity == 10
        assert cache.buffer.dtype == np.float32
        assert not cache.buffer.any()
        cache.buffer[...] = 1  # writable

    @pytest.mark.parametrize(
        ("ids", "shared"), [([], 0), ([1], 1), ([1, 2, 3], 3), ([1, 2, 3, 4], 3), ([1, 9, 3], 1), ([9], 0)]
    )
    def test_reusable(self, ids: list[int], shared: int) -> None:
        assert cache_of([1, 2, 3]).reusable(ids) == shared

    def test_only_what_was_computed_several_at_a_time_is_reusable(self) -> None:
        cache = KVCache(DIMENSIONS, 64)
        cache.append([1, 2, 3])
        cache.append([4, 5])
        assert cache.settled == 5
        cache.append([6])
        cache.append([7, 8])  # they have seen the one before
        assert (cache.settled, cache.ids) == (5, [1, 2, 3, 4, 5, 6, 7, 8])
        assert cache.reusable([1, 2, 3, 4, 5, 6, 7, 8]) == 5
        assert cache.fork(7).settled == 5
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

    def test_fork(self) -> None:
        cache = cache_of([1, 2, 3])
        cache.buffer[...] = np.random.default_rng(0).standard_normal(cache.buffer.shape)
        fork = cache.fork(2)
        assert (fork.ids, cache.ids) == ([1, 2], [1, 2, 3])
        assert (fork.buffer[..., :2, :] == cache.buffer[..., :2, :]).all()
        before = cache.buffer.copy()
        fork.buffer[...] = 0
        assert (cache.buffer == before).all()

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
    def test_memory_is_committed_when_it_is_written(self) -> None:
        def resident() -> int:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")

        large = Dimensions(32, 4096, 8192, 32, 8, 128, 1000, 131_072)
        before = resident()
        cache = KVCache(large, 65_536)
        assert cache.buffer.nbytes >= 16 << 30
        assert resident() - before < 16 << 20
        # A few tokens touch a page or so for each layer, part and head: 512 of them.
        cache.buffer[..., :4, :] = 1
        assert 512 * 4096 <= resident() - before < 16 << 20


class TestPool:
    def test_makes_a_new_cache_when_none_is_idle(self) -> None:
        pool, _ = pool_of()
        first, second = pool.take([1, 2]), pool.take([1, 2])
        assert first is not second
        assert len(first) == len(second) == 0

    def test_a_cache_under_way_belongs_to_one(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3])
        assert pool.take([1, 2, 3, 4]) is cache
        assert pool.take([1, 2, 3, 4]) is not cache

    def test_gives_the_longest_common_prefix(self) -> None:
        pool, (_, longest, _) = pool_of([1, 2], [1, 2, 3, 4], [1, 2, 3])
        assert pool.take([1, 2, 3, 4, 5]) is longest

    def test_a_sequence_that_would_lose_most_of_itself_is_kept(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3, 4, 5])
        taken = pool.take([1, 2, 9])
        assert taken is not cache
        # What they share need not be computed again.
        assert taken.ids == [1, 2]
        assert cache.ids == [1, 2, 3, 4, 5]
        assert pool.take([1, 2, 3, 4, 5, 6]) is cache

    def test_a_sequence_that_would_lose_half_of_itself_is_given(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3, 4])
        assert pool.take([1, 2, 9]) is cache

    def test_an_answer_that_nobody_can_reuse_is_no_loss(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3])
        assert pool.take([1, 2, 3, 4]) is cache
        for token_id in range(4, 20):
            cache.append([token_id])
        pool.give_back(cache)
        assert pool.take([1, 2, 3, 9]) is cache

    def test_forgets_the_oldest(self) -> None:
        pool, caches = pool_of([1], [2], [3], keep=2)
        assert pool.take([1, 1]) not in caches
        assert pool.take([3, 1]) is caches[2]
        assert pool.take([2, 1]) is caches[1]

    def test_a_cache_may_come_back_while_another_is_taken(self) -> None:
        """As when garbage collection finds a forgotten stream just then."""
        pool, _ = pool_of()

        class Collecting(KVCache):
            def reusable(self, ids: Sequence[int]) -> int:
                if returned:
                    pool.give_back(returned.pop())
                return super().reusable(ids)

        late = cache_of([7, 8, 9])
        returned = [late]
        pool.give_back(Collecting(DIMENSIONS, 64))
        taken: list[KVCache] = []
        worker = threading.Thread(target=lambda: taken.append(pool.take([7, 8, 9])), daemon=True)
        worker.start()
        worker.join(timeout=30)
        assert taken, "take waits for itself"
        assert pool.take([7, 8, 9]) is late

    def test_many_threads(self) -> None:
        pool, _ = pool_of(keep=3)
        under_way: set[int] = set()
        shared: list[KVCache] = []
        lock = threading.Lock()

        def work(number: int) -> None:
            for turn in range(200):
                cache = pool.take([number, turn])
                with lock:
                    if id(cache) in under_way:
                        shared.append(cache)
                    under_way.add(id(cache))
                cache.ids[:] = [number, turn]
                with lock:
                    under_way.remove(id(cache))
                pool.give_back(cache)

        workers = [threading.Thread(target=work, args=[number]) for number in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not shared
