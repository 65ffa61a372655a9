"""Prefixes without a slot: what is found, what is kept under a budget, and that it comes back bit by bit."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny import random_ids
from pocketlm.errors import ContextOverflowError, InvalidSettingError
from pocketlm.kv_cache import KVCache
from pocketlm.manifest import Dimensions, read_manifest
from pocketlm.prefix_store import PrefixStore, StoredPrefix, own_array
from pocketlm.session import Session

DIMENSIONS = Dimensions(
    layers=2,
    hidden=8,
    intermediate=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocabulary=32,
    context_length=64,
)
TOKEN_BYTES = 4 * 2 * 2 * 2 * 4


def cache_of(
    ids: Sequence[int], *, settled: int | None = None, dimensions: Dimensions = DIMENSIONS
) -> KVCache:
    """Each token's values tell which token and which position it is."""
    cache = KVCache(dimensions, 64)
    cache.ids[:] = ids
    cache.settled = len(ids) if settled is None else settled
    cache.buffer[..., : len(ids), :] = expected(ids, dimensions)[:, :, None]
    return cache


def expected(ids: Sequence[int], dimensions: Dimensions = DIMENSIONS) -> np.ndarray:
    shape = (dimensions.layers, 2, dimensions.kv_heads, len(ids), dimensions.head_dim)
    places = np.arange(np.prod(shape[:3])).reshape(*shape[:3], 1, 1)
    tokens = np.array([100 * token_id + place for place, token_id in enumerate(ids)]).reshape(-1, 1)
    return np.broadcast_to(places * 10_000 + tokens, shape).astype(np.float32)


def store_of(*sequences: Sequence[int], tokens: int = 100) -> PrefixStore:
    store = PrefixStore(tokens * TOKEN_BYTES)
    for ids in sequences:
        assert store.add(cache_of(ids), len(ids))
    return store


def found(store: PrefixStore, ids: Sequence[int], beyond: int = 0) -> tuple[tuple[int, ...], int] | None:
    best = store.best(ids, beyond)
    return best and (best[0].ids, best[1])


class TestBest:
    def test_shares_most(self) -> None:
        store = store_of([1, 2, 3, 4], [1, 2, 9], [7])
        assert found(store, [1, 2, 9, 9]) == ((1, 2, 9), 3)
        assert found(store, [1, 2, 3]) == ((1, 2, 3, 4), 3)
        assert found(store, [7, 7]) == ((7,), 1)

    def test_none_without_a_common_beginning(self) -> None:
        assert found(store_of([1, 2]), [2, 1]) is None
        assert found(store_of([1, 2]), []) is None
        assert found(store_of(), [1]) is None

    def test_only_what_is_longer_than_beyond(self) -> None:
        store = store_of([1, 2, 3])
        assert found(store, [1, 2, 3, 4], beyond=2) == ((1, 2, 3), 3)
        assert found(store, [1, 2, 3, 4], beyond=3) is None

    def test_the_last_used_among_equals(self) -> None:
        store = store_of([1, 2], [1, 3])
        assert found(store, [1, 4]) == ((1, 3), 1)
        assert found(store, [1, 2]) == ((1, 2), 2)
        assert found(store, [1, 4]) == ((1, 2), 1)


class TestAdd:
    def test_is_a_read_only_copy(self) -> None:
        cache = cache_of([1, 2, 3])
        store = PrefixStore(1 << 20)
        assert store.add(cache, 2)
        cache.buffer[...] = -1
        best = store.best([1, 2, 3])
        assert best is not None
        assert best[0].ids == (1, 2)
        np.testing.assert_array_equal(best[0].keys_values, expected([1, 2]))
        with pytest.raises(ValueError, match="read-only"):
            best[0].keys_values[...] = 0
        assert best[0].bytes == store.bytes == 2 * TOKEN_BYTES

    def test_only_settled_tokens(self) -> None:
        store = PrefixStore(1 << 20)
        assert store.add(cache_of([1, 2, 3, 4], settled=2), 4)
        assert found(store, [1, 2, 3, 4]) == ((1, 2), 2)

    @pytest.mark.parametrize(("settled", "length"), [(0, 2), (2, 0)])
    def test_nothing_of_nothing(self, settled: int, length: int) -> None:
        store = PrefixStore(1 << 20)
        assert not store.add(cache_of([1, 2], settled=settled), length)
        assert len(store) == 0

    def test_what_is_held_is_not_copied_but_used(self) -> None:
        store = store_of([1, 2, 3], [4], tokens=4)
        assert store.add(cache_of([1, 2]), 2)
        assert store.bytes == 4 * TOKEN_BYTES
        assert store.add(cache_of([5]), 1)  # in the place of [4], which was used before
        assert found(store, [4]) is None
        assert found(store, [1, 2, 3]) == ((1, 2, 3), 3)

    def test_takes_the_place_of_its_own_beginnings(self) -> None:
        store = store_of([1], [1, 9], [1, 2], [1, 2, 3])
        assert len(store) == 2
        assert found(store, [1, 9]) == ((1, 9), 2)

    def test_what_alone_exceeds_the_budget_drops_nothing(self) -> None:
        store = store_of([1], [2], tokens=2)
        assert not store.add(cache_of([1, 2, 3]), 3)
        assert found(store, [1]) == ((1,), 1)
        assert found(store, [2]) == ((2,), 1)

    def test_without_a_budget(self) -> None:
        assert not PrefixStore(0).add(cache_of([1]), 1)
        with pytest.raises(InvalidSettingError, match=r"-1 bytes; a number from 0 on"):
            PrefixStore(-1)

    def test_a_prefix_itself(self) -> None:
        prefix = StoredPrefix.of(cache_of([1, 2]), 2)
        store = PrefixStore(2 * TOKEN_BYTES)
        assert store.put(prefix)
        best = store.best([1, 2, 3])
        assert best is not None
        assert best[0] is prefix
        assert not PrefixStore(1).put(prefix)

    def test_clear(self) -> None:
        store = store_of([1], [2])
        store.clear()
        assert (len(store), store.bytes, found(store, [1])) == (0, 0, None)


IDS = st.lists(st.integers(0, 1), min_size=1, max_size=5)


class Model:
    """The same rules over lists of ids."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: list[list[int]] = []  # the last one was used last

    def add(self, ids: list[int]) -> None:
        holders = [entry for entry in self.entries if entry[: len(ids)] == ids]
        if holders:
            self.use(holders[0])
        elif len(ids) <= self.budget:
            self.entries = [entry for entry in self.entries if ids[: len(entry)] != entry]
            while sum(map(len, self.entries)) + len(ids) > self.budget:
                self.entries.pop(0)
            self.entries.append(ids)

    def best(self, ids: list[int], beyond: int) -> tuple[list[int], int] | None:
        shared = [
            (max(n for n in range(len(ids) + 1) if entry[:n] == ids[:n] and n <= len(entry)), index)
            for index, entry in enumerate(self.entries)
        ]
        length, index = max(shared, default=(0, 0))
        if length <= beyond:
            return None
        entry = self.entries[index]
        self.use(entry)
        return entry, length

    def use(self, entry: list[int]) -> None:
        self.entries.remove(entry)
        self.entries.append(entry)


@settings(max_examples=100, deadline=None)
@given(
    budget=st.integers(0, 20),
    steps=st.lists(st.one_of(IDS, st.tuples(IDS, st.integers(0, 1))), min_size=8, max_size=25),
)
def test_it_is_a_least_recently_used_cache(
    budget: int, steps: list[list[int] | tuple[list[int], int]]
) -> None:
    model, store = Model(budget), PrefixStore(budget * TOKEN_BYTES)
    for step in steps:
        if isinstance(step, list):
            model.add(step)
            assert store.add(cache_of(step), len(step)) == any(
                entry[: len(step)] == step for entry in model.entries
            )
        else:
            ids, beyond = step
            wanted = model.best(ids, beyond)
            assert found(store, ids, beyond) == (wanted and (tuple(wanted[0]), wanted[1]))
        assert store.bytes == sum(map(len, model.entries)) * TOKEN_BYTES <= budget * TOKEN_BYTES
        assert len(store) == len(model.entries)


class TestRestore:
    @settings(max_examples=60, deadline=None)
    @given(ids=IDS, before=st.lists(st.integers(0, 2), max_size=6), data=st.data())
    def test_whatever_the_cache_held(self, ids: list[int], before: list[int], data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(ids)))
        cache = cache_of(before, settled=data.draw(st.integers(0, len(before))))
        cache.buffer[..., cache.settled :, :] = -1
        own = cache.ids
        PrefixStore.restore(StoredPrefix.of(cache_of(ids), len(ids)), cache, length)
        assert cache.ids is own
        assert (cache.ids, cache.settled) == (ids[:length], length)
        np.testing.assert_array_equal(cache.buffer[:, :, 0, :, :length], expected(ids[:length]))

    def test_what_is_settled_is_not_copied_again(self) -> None:
        cache = cache_of([1, 2])
        cache.buffer[...] = -1
        PrefixStore.restore(StoredPrefix.of(cache_of([1, 2, 3]), 3), cache, 3)
        assert (cache.buffer[..., :2, :] == -1).all()
        np.testing.assert_array_equal(cache.buffer[:, :, 0, :, 2:3], expected([1, 2, 3])[..., 2:, :])

    def test_too_long_for_the_cache(self) -> None:
        prefix = StoredPrefix.of(cache_of([1, 2, 3]), 3)
        with pytest.raises(ContextOverflowError) as caught:
            PrefixStore.restore(prefix, KVCache(DIMENSIONS, 2), 3)
        assert (caught.value.prompt_tokens, caught.value.context_length) == (3, 2)

    def test_more_than_there_is(self) -> None:
        with pytest.raises(ValueError, match="3 tokens are to be restored, but the prefix has 2"):
            PrefixStore.restore(StoredPrefix.of(cache_of([1, 2]), 2), cache_of([]), 3)

    def test_what_follows_is_computed_as_ever(self, int8_bundle: Path) -> None:
        manifest = read_manifest(int8_bundle)
        session = Session(int8_bundle / "model.onnx", manifest.dimensions, manifest.graph, threads=1)
        ids = random_ids(60)
        whole = session.new_cache(64)
        session.forward(ids[:40], whole)
        store = PrefixStore(1 << 30)
        assert store.add(whole, 40)
        wanted = session.forward(ids[40:], whole, range(20)).copy()

        again = session.new_cache(64)
        best = store.best(ids)
        assert best is not None
        prefix, length = best
        assert length == 40
        store.restore(prefix, again, length)
        np.testing.assert_array_equal(session.forward(ids[40:], again, range(20)), wanted)


class TestStoredPrefix:
    @pytest.mark.parametrize("length", [-1, 0, 3])
    def test_only_settled_tokens(self, length: int) -> None:
        with pytest.raises(ValueError, match=rf"{length} tokens are to be stored, but 2 are settled"):
            StoredPrefix.of(cache_of([1, 2, 3], settled=2), length)

    @pytest.mark.parametrize(
        ("ids", "shape"), [((), (2, 2, 2, 0, 4)), ((1,), (2, 2, 2, 2, 4)), ((1, 2), (2, 2))]
    )
    def test_ids_and_values_belong_together(self, ids: tuple[int, ...], shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=rf"{len(ids)} token ids came with"):
            StoredPrefix(ids, np.zeros(shape, np.float32))


class TestMemory:
    def test_a_dropped_entry_is_freed_at_once(self) -> None:
        store = store_of([1, 2], [3], tokens=3)
        best = store.best([1, 2])
        assert best is not None
        values = weakref.ref(best[0].keys_values)
        del best
        store.add(cache_of([3, 4, 5]), 3)
        assert values() is None

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figure")
    def test_own_arrays_go_back_to_the_system(self) -> None:
        for _ in range(2):  # glibc would keep such blocks from the second time on
            arrays = [own_array((1 << 21,)) for _ in range(4)]
            for array in arrays:
                array[...] = 1
            del array
            full = resident_bytes()
            del arrays[:3]  # the last one stays: nothing is given back just because it lay at the heap's end
            assert full - resident_bytes() > 0.9 * 3 * (8 << 20)

    def test_own_array(self) -> None:
        array = own_array((2, 3))
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
        assert not array.any()
        array[...] = 1  # writable


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
