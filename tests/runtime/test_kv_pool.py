"""Which cache a prompt gets, and what becomes of those that are not under way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.kv_cache import KVCache
from pocketlm.kv_pool import KVPool
from pocketlm.manifest import Dimensions

DIMENSIONS = Dimensions(2, 8, 16, 4, 2, 4, 32, 64)
TOKEN_BYTES = 4 * 2 * 2 * 2 * 4


def pool_of(*sequences: Sequence[int], tokens: int = 1000) -> tuple[KVPool, list[KVCache]]:
    """A pool to which these sequences were given back, in this order; `tokens` is its budget."""
    pool = KVPool(DIMENSIONS, 64, tokens * TOKEN_BYTES)
    caches = [pool.take([]) for _ in sequences]
    for cache, ids in zip(caches, sequences, strict=True):
        compute(cache, ids)
        pool.give_back(cache)
    return pool, caches


def compute(cache: KVCache, ids: Sequence[int]) -> None:
    """As a prompt's pass: each token's values tell which it is."""
    cache.buffer[..., len(cache) : len(cache) + len(ids), :] = np.array(ids)[:, None]
    cache.append(ids)
    cache.settled = len(cache)


def held(cache: KVCache) -> list[int]:
    """What is really there; it must be alike in every layer, part, head and dimension."""
    values = cache.buffer[..., : len(cache), :]
    first = values[:1, :1, :1, :1, :, :1]
    assert (values == first).all()
    ids: list[int] = first.ravel().astype(int).tolist()
    return ids


class TestTake:
    def test_a_cache_under_way_belongs_to_one(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3])
        assert pool.take([1, 2, 3, 4]) is cache
        other = pool.take([1, 2, 3, 4])
        assert other is not cache
        # What they share need not be computed again.
        assert held(other) == other.ids == [1, 2, 3]
        assert other.settled == 3

    def test_it_holds_nothing_but_the_beginning(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3, 4])
        assert pool.take([1, 2, 9]) is cache
        assert (cache.ids, cache.settled) == ([1, 2], 2)

    def test_the_longest_common_prefix_wins(self) -> None:
        pool, (_, longest, _) = pool_of([1, 2], [1, 2, 3, 4], [1, 2, 3])
        assert pool.take([1, 2, 3, 4, 5]) is longest

    def test_what_would_be_lost_is_stored(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3, 4, 5])
        assert pool.take([1, 2, 9]) is cache
        assert cache.ids == [1, 2]
        again = pool.take([1, 2, 3, 4, 5, 6])
        assert held(again) == again.ids == [1, 2, 3, 4, 5]

    def test_an_answer_that_nobody_can_reuse_is_no_loss(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3])
        assert pool.take([1, 2, 3, 4]) is cache
        for token_id in range(4, 20):
            cache.append([token_id])
        pool.give_back(cache)
        assert pool.take([1, 2, 3, 9]) is cache
        assert cache.ids == [1, 2, 3]
        assert len(pool.store) == 0

    def test_a_new_sequence_takes_the_place_of_the_one_not_used_longest(self) -> None:
        pool, (_, second) = pool_of([1, 1], [2, 2])
        first = pool.take([1, 1, 1])
        pool.give_back(first)
        assert pool.take([3, 3]) is second
        assert (second.ids, second.settled) == ([], 0)
        restored = pool.take([2, 2, 2])
        assert held(restored) == [2, 2]

    def test_an_empty_place_comes_first(self) -> None:
        pool, (one, other) = pool_of([1, 1], [])
        assert pool.take([3, 3]) is other
        assert pool.take([1, 1, 1]) is one

    def test_there_is_always_one_more(self) -> None:
        pool, _ = pool_of([1, 2, 3])
        caches = []
        for number in range(9):
            caches.append(pool.take([number]))
            compute(caches[-1], [number] * 5)
        assert len({cache.index for cache in caches}) == len(set(map(id, caches))) == 9
        assert [held(cache)[-5:] for cache in caches] == [[number] * 5 for number in range(9)]

    def test_prompt_and_store_of_equal_length(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3])
        pool.store.add(cache, 3)
        assert pool.take([1, 2, 3, 4]) is cache


class TestBudget:
    def test_bounds_idle_slots_but_for_the_last_one(self) -> None:
        pool, caches = pool_of([1] * 10, [2] * 10, [3] * 10, tokens=20)
        assert [len(cache) for cache in caches] == [0, 10, 10]
        pool, caches = pool_of([1] * 10, [2] * 10, tokens=0)
        assert [len(cache) for cache in caches] == [0, 10]
        assert pool.take([2] * 11).ids == [2] * 10

    def test_caches_under_way_do_not_count(self) -> None:
        pool, (one, _) = pool_of([1] * 10, [2] * 10, tokens=20)
        assert pool.take([1] * 11) is one
        compute(one, [1] * 30)
        assert pool.take([2] * 11).ids == [2] * 10


class TestGather:
    @pytest.mark.parametrize(
        ("under_way", "places"),
        [([0, 3], [0, 1]), ([0, 2, 4], [0, 1, 2]), ([1, 2], [1, 2]), ([4], [4]), ([1, 4, 5], [1, 2, 3])],
    )
    def test_moves_them_together(self, under_way: list[int], places: list[int]) -> None:
        sequences = [[n, n, n] for n in range(6)]
        pool, caches = pool_of(*sequences)
        taken = [pool.take([n, n, n, n]) for n in under_way]
        assert taken == [caches[n] for n in under_way]
        pool.gather(taken)
        assert sorted(cache.index for cache in taken) == places
        assert [held(cache) for cache in taken] == [sequences[n] for n in under_way]
        # Nothing else was lost.
        for number, ids in enumerate(sequences):
            if number not in under_way:
                assert held(pool.take([*ids, 9])) == ids

    def test_not_across_one_that_is_under_way(self) -> None:
        pool, caches = pool_of([0, 0], [1, 1], [2, 2])
        taken = [pool.take([n, n, n]) for n in range(3)]
        pool.gather([taken[0], taken[2]])
        assert [cache.index for cache in caches] == [0, 1, 2]
        assert [held(cache) for cache in caches] == [[0, 0], [1, 1], [2, 2]]


class TestStored:
    def test_from_a_slot_or_from_the_store(self) -> None:
        pool, (cache,) = pool_of([1, 2, 3, 4])
        assert pool.stored([1, 2, 3, 4]).ids == (1, 2, 3, 4)
        taken = pool.take([9])
        assert taken is cache
        for ids in ([1, 2, 3, 4], [1, 2, 3]):
            prefix = pool.stored(ids)
            assert prefix.ids == tuple(ids)
            assert prefix.keys_values[0, 0, 0, :, 0].tolist() == ids

    def test_what_is_not_there(self) -> None:
        pool, _ = pool_of([1, 2, 3])
        with pytest.raises(ValueError, match="4 tokens are to be stored, but 3 are settled"):
            pool.stored([1, 2, 3, 4])
        with pytest.raises(ValueError, match="3 tokens are to be stored, but 2 are settled"):
            pool.stored([1, 2, 9])


class TestClose:
    def test_frees_everything(self) -> None:
        pool, _ = pool_of([1, 2, 3], [4, 5, 6])
        pool.take([7])
        pool.close()
        assert len(pool.slots) == len(pool.store) == 0
        assert pool.slots.buffer.nbytes == 0
        pool.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_taken_holds_what_it_says(data: st.DataObject) -> None:
    """And nobody's cache changes while it is under way."""
    pool, _ = pool_of(tokens=data.draw(st.sampled_from([0, 12, 1000])))
    under_way: list[KVCache] = []
    expected: dict[KVCache, list[int]] = {}
    prompts = st.lists(st.integers(1, 2), min_size=1, max_size=10)
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["take", "give back", "gather"]))
        if action == "take" and len(under_way) < 6:
            prompt = data.draw(prompts)
            cache = pool.take(prompt)
            assert cache not in under_way
            assert cache.ids == prompt[: len(cache)]
            assert held(cache) == cache.ids
            compute(cache, prompt[len(cache) :])
            under_way.append(cache)
            expected[cache] = prompt
        elif action == "give back" and under_way:
            pool.give_back(under_way.pop(data.draw(st.integers(0, len(under_way) - 1))))
        elif action == "gather" and under_way:
            pool.gather(under_way)
        for cache in under_way:
            assert held(cache) == cache.ids == expected[cache]
        assert [cache.index for cache in pool.slots.caches] == list(range(len(pool.slots)))
