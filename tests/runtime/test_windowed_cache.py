"""Layers with a sliding window give back what no token to come can see, and nobody notices but the memory."""

from __future__ import annotations

import dataclasses
import json
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pocketlm
from helpers.tiny import Array, random_ids, tiny_bundle
from helpers.tiny_bundle import tiny_manifest
from helpers.tiny_gemma3 import gemma3_checkpoint
from pocketlm import saved_prefix
from pocketlm.errors import ManifestError
from pocketlm.kv_cache import KVCache, KVSlots
from pocketlm.kv_pool import KVPool
from pocketlm.manifest import Dimensions, parse_manifest, read_manifest
from pocketlm.prefix_store import PrefixStore, StoredPrefix
from pocketlm.saved_prefix import SavedPrefixError
from pocketlm.session import Session

WINDOW = 8
WINDOWS = (WINDOW, None, 4)
WINDOWED = (0, 2)
DIMENSIONS = Dimensions(
    layers=3,
    hidden=8,
    intermediate=16,
    heads=4,
    kv_heads=2,
    head_dim=256,  # four tokens fill a page
    vocabulary=32,
    context_length=512,
)
CAPACITY = 256
FINGERPRINT = "tiny int8 0123456789abcdef"

needs_madvise = pytest.mark.skipif(
    not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no memory back"
)


def slots_of(count: int = 1, windows: Sequence[int | None] | None = WINDOWS) -> KVSlots:
    return KVSlots(DIMENSIONS, CAPACITY, count, windows)


def append(cache: KVCache, ids: Sequence[int]) -> None:
    """As a forward pass does: each token's values tell which token and which position it is."""
    before = len(cache)
    cache.append(ids)
    for place, token_id in enumerate(ids, before):
        cache.buffer[..., place, :] = value(place, token_id)


def value(place: int, token_id: int) -> int:
    return 1 + 100 * place + token_id


def filled(length: int, *, chunk: int = WINDOW, slots: KVSlots | None = None, index: int = 0) -> KVCache:
    cache = (slots or slots_of()).caches[index]
    ids = [place % 32 for place in range(length)]
    for begin in range(0, length, chunk):
        append(cache, ids[begin : begin + chunk])
    return cache


def check_content(cache: KVCache) -> None:
    """What a token to come sees is there, in each layer."""
    for layer in range(DIMENSIONS.layers):
        for place in range(cache.first(layer), len(cache)):
            assert (cache.buffer[layer, ..., place, :] == value(place, cache.ids[place])).all()


@needs_madvise
class TestRelease:
    def test_what_no_token_can_see(self) -> None:
        cache = filled(3 * WINDOW)
        assert (cache.released, cache.shortest) == (0, 0)
        append(cache, [1] * WINDOW)  # it goes by what was there before
        assert (cache.released, cache.shortest) == (WINDOW, 2 * WINDOW - 1)
        assert [cache.first(layer) for layer in range(3)] == [WINDOW, 0, WINDOW]
        check_content(cache)

    def test_its_memory_reads_as_zeros(self) -> None:
        cache = filled(10 * WINDOW)
        pages = cache.released // 4 * 4
        assert pages > 0
        windowed = cache.buffer[list(WINDOWED), ..., :pages, :]
        assert windowed[..., 4:, :].sum() == 0  # the first page may be shared with another head
        assert cache.buffer[1, ..., :pages, :].all()

    def test_in_steps_of_a_window(self) -> None:
        cache = filled(0)
        steps = set()
        for _ in range(100):
            append(cache, [1, 2])
            steps.add(cache.released)
        assert sorted(steps) == [0, *range(WINDOW, cache.released + 1, WINDOW)]

    def test_an_answer_that_is_not_settled_keeps_its_prompt(self) -> None:
        cache = filled(3 * WINDOW)
        for _ in range(20 * WINDOW):
            append(cache, [1])
        assert cache.settled == 3 * WINDOW
        assert cache.released == WINDOW
        cache.truncate(cache.settled)
        check_content(cache)

    def test_rejected_drafts_release_nothing(self) -> None:
        cache = filled(3 * WINDOW)
        append(cache, [1] * 10 * WINDOW)
        assert cache.released == WINDOW
        cache.truncate(3 * WINDOW)
        check_content(cache)

    def test_not_without_windows(self) -> None:
        for windows in (None, (None, None, None), ()):
            cache = filled(20 * WINDOW, slots=slots_of(windows=windows))
            assert (cache.released, cache.shortest) == (0, 0)
            assert cache.bytes == 20 * WINDOW * 4 * 2 * 3 * 2 * 256

    def test_bytes(self) -> None:
        cache = filled(5 * WINDOW)
        token = 4 * 2 * 2 * 256
        assert cache.bytes == token * (3 * 5 * WINDOW - 2 * 2 * WINDOW)
        assert cache.bytes_of(WINDOW) == token * WINDOW  # those layers have none of them

    def test_neighbours_keep_theirs(self) -> None:
        slots = slots_of(3)
        caches = [filled(20, slots=slots, index=index) for index in range(3)]
        for _ in range(10):
            append(caches[1], [1] * WINDOW)
        caches[1].truncate(0)
        caches[1].release()
        check_content(caches[0])
        check_content(caches[2])


def test_a_system_that_takes_no_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    slots = slots_of(2)
    cache = filled(20 * WINDOW, slots=slots)
    assert (cache.released, cache.reusable([0, 1, 2, 9])) == (0, 3)
    cache.release()
    slots.move(cache, slots.caches[1])
    check_content(cache)


@needs_madvise
class TestCutting:
    def test_to_what_is_whole(self) -> None:
        cache = filled(6 * WINDOW)
        shortest = cache.shortest
        assert 0 < shortest < 6 * WINDOW
        with pytest.raises(ValueError, match=rf"first {shortest - 1} tokens .* from {shortest} on, or none"):
            cache.truncate(shortest - 1)
        with pytest.raises(ValueError, match="are not all there"):
            slots_of().caches[0].copy_from(cache, 1)
        cache.truncate(shortest)
        check_content(cache)
        cache.truncate(0)
        assert (cache.released, cache.shortest) == (0, 0)

    def test_reusable(self) -> None:
        cache = filled(6 * WINDOW)
        assert cache.reusable([*cache.ids, 1]) == 6 * WINDOW
        assert cache.reusable([*cache.ids[: cache.shortest], 33]) == cache.shortest
        assert cache.reusable([*cache.ids[: cache.shortest - 1], 33]) == 0
        assert cache.reusable(cache.ids[: cache.shortest - 1]) == 0

    def test_the_pool_computes_a_shorter_one_anew(self) -> None:
        pool = KVPool(DIMENSIONS, CAPACITY, 1 << 30, WINDOWS)
        cache = pool.take([])
        ids = filled(6 * WINDOW, slots=pool.slots, index=cache.index).ids[:]
        pool.give_back(cache)
        assert len(pool.take([*ids[:WINDOW], 33])) == 0
        again = pool.take([*ids, 1, 2])  # it was stored, as its slot was needed
        assert (again.ids, again.released) == (ids, 3 * WINDOW)
        check_content(again)


LENGTHS = st.integers(0, CAPACITY)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(2, 40)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("truncate"), st.floats(0, 1)),
        st.tuples(st.sampled_from(["settle", "copy", "grow", "move", "store", "release"]), st.just(0)),
    ),
    min_size=5,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 100), steps=STEPS)
def test_a_sequence_is_the_same_whatever_happens_to_it(length: int, steps: list[tuple[str, float]]) -> None:
    """Beside a plain list of ids: what a token to come sees is always there."""
    slots = slots_of(2)
    cache = filled(length, slots=slots)
    ids = cache.ids[:]
    for step, number in steps:
        other = next(each for each in slots.caches if each is not cache)
        if step == "append":
            new = random_ids(int(number), vocabulary=32, seed=len(ids))[: CAPACITY - len(ids)]
            append(cache, new)
            ids += new
        elif step == "truncate":
            length = round(number * len(ids))
            if length < cache.shortest:
                length = 0
            cache.truncate(length)
            del ids[length:]
        elif step == "settle":
            cache.truncate(cache.settled)
            del ids[cache.settled :]
        elif step == "copy":
            other.copy_from(cache, len(ids))
            cache.truncate(0)
            cache.release()
            cache = other
        elif step == "grow":
            slots.grow(min(len(slots) + 1, 4))
        elif step == "move":
            slots.move(cache, other)
        elif step == "store" and cache.settled:
            del ids[cache.settled :]
            prefix = StoredPrefix.of(cache, cache.settled)
            assert prefix.bytes == cache.bytes_of(cache.settled)
            cache.truncate(0)
            cache.release()
            PrefixStore.restore(prefix, cache, len(ids))
        else:
            cache.release()
        assert cache.ids == ids
        assert 0 <= cache.released <= max(0, cache.settled - WINDOW + 1)
        assert cache.reusable(ids) == cache.settled
        check_content(cache)


@needs_madvise
class TestStoring:
    def test_only_what_is_whole(self) -> None:
        cache, store = filled(6 * WINDOW), PrefixStore(1 << 30)
        short = cache.shortest - 1
        with pytest.raises(ValueError, match=f"{short} tokens are to be stored, but {cache.released} are"):
            StoredPrefix.of(cache, short)
        assert not store.add(cache, short)
        assert store.add(cache, 6 * WINDOW)
        assert store.bytes == cache.bytes
        assert store.best(cache.ids[:short]) is None
        found = store.best(cache.ids[: short + 1])
        assert found is not None
        assert found[1] == short + 1
        with pytest.raises(ValueError, match=f"released what fewer than {short + 1} would need"):
            store.restore(found[0], slots_of().caches[0], short)

    def test_a_beginning_stays_where_the_longer_one_lacks_it(self) -> None:
        store = PrefixStore(1 << 30)
        cache = filled(2 * WINDOW)
        beginning = cache.ids[:]
        assert store.add(cache, 2 * WINDOW)
        for _ in range(4):
            append(cache, [1] * WINDOW)
        assert store.add(cache, len(cache))
        assert len(store) == 2
        found = store.best([*beginning, 9])
        assert found is not None
        assert found[1] == 2 * WINDOW

    def test_a_longer_one_that_lacks_it_does_not_hold_it(self) -> None:
        store = PrefixStore(1 << 30)
        assert store.add(filled(6 * WINDOW), 6 * WINDOW)
        assert store.add(filled(2 * WINDOW), 2 * WINDOW)
        assert len(store) == 2

    def test_a_cache_that_lacks_the_beginning_gets_it(self) -> None:
        whole = filled(6 * WINDOW, slots=slots_of(windows=None))
        cache = filled(6 * WINDOW)
        PrefixStore.restore(StoredPrefix.of(whole, 2 * WINDOW), cache, 2 * WINDOW)
        assert (len(cache), cache.released) == (2 * WINDOW, 0)
        check_content(cache)

    def test_on_disk(self, tmp_path: Path) -> None:
        prefix = StoredPrefix.of(filled(6 * WINDOW), 6 * WINDOW)
        saved_prefix.save(tmp_path / "p", prefix, FINGERPRINT)
        loaded = saved_prefix.load(tmp_path / "p", FINGERPRINT, DIMENSIONS)
        assert (loaded.ids, loaded.first, loaded.shortest) == (prefix.ids, prefix.first, prefix.shortest)
        np.testing.assert_array_equal(loaded.keys_values, prefix.keys_values)
        # Also into a cache that knows no windows: those of another system.
        for windows in (WINDOWS, None):
            cache = slots_of(windows=windows).caches[0]
            PrefixStore.restore(loaded, cache, 6 * WINDOW)
            assert cache.shortest == prefix.shortest
            np.testing.assert_array_equal(cache.buffer[:, :, 0, :, : 6 * WINDOW], prefix.keys_values)

    @pytest.mark.parametrize(
        ("first", "shortest"),
        [
            ([16, 0], 24),
            ([16, 0, "16"], 24),
            ([16, 0, -1], 24),
            ([True, 0, 16], 24),
            ([16, 0, 16], 16),
            ([16, 0, 16], 49),
            ([16, 0, 16], "24"),
            ([], 3),
            (16, 24),
        ],
    )
    def test_an_altered_file(self, tmp_path: Path, first: object, shortest: object) -> None:
        path = tmp_path / "p"
        saved_prefix.save(path, StoredPrefix.of(filled(6 * WINDOW), 6 * WINDOW), FINGERPRINT)
        line, _, rest = path.read_bytes().partition(b"\n")
        facts = {**json.loads(line), "first": first, "shortest": shortest}
        path.write_bytes(json.dumps(facts, separators=(",", ":")).encode() + b"\n" + rest)
        with pytest.raises(SavedPrefixError, match="is altered: what it lacks"):
            saved_prefix.load(path, FINGERPRINT, DIMENSIONS)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("gemma3"), checkpoint=gemma3_checkpoint())


@pytest.fixture(scope="module")
def session(gemma: Path) -> Session:
    manifest = read_manifest(gemma)
    return Session(gemma / "model.onnx", manifest.dimensions, manifest.graph, threads=1)


def test_the_exporter_tells_the_windows(gemma: Path, int8_bundle: Path) -> None:
    assert read_manifest(gemma).kv_cache.windows == (24, None, 24)
    assert read_manifest(int8_bundle).kv_cache.windows is None


@needs_madvise
class TestLogits:
    def test_bit_by_bit(self, session: Session) -> None:
        both = [run(session, cache) for cache in self.caches(session)]
        np.testing.assert_array_equal(*both)

    def test_behind_the_shortest_cut(self, session: Session) -> None:
        logits = []
        length = 0
        for cache in self.caches(session):
            run(session, cache)
            length = length or cache.shortest
            assert length
            cache.truncate(length)
            logits.append(session.forward(random_ids(5, seed=3), cache, range(5)).copy())
        np.testing.assert_array_equal(*logits)

    def test_one_token_further_and_it_would_show(self, session: Session) -> None:
        """The test above proves nothing unless what is released next counts."""
        logits = []
        for change in (0, 1):
            cache = self.caches(session)[0]
            run(session, cache)
            cache.truncate(cache.shortest)
            cache.buffer[0, ..., cache.released, :] += change
            logits.append(session.forward([1, 2], cache, range(2)).copy())
        assert (logits[0][0] != logits[1][0]).any()

    def test_in_a_batch(self, session: Session) -> None:
        both = []
        for windows in ((24, None, 24), None):
            slots = KVSlots(session.dimensions, 400, 3, windows)
            for cache, length in zip(slots.caches, (300, 5, 170), strict=True):
                run(session, cache, length)
            steps = [session.forward_each(dict.fromkeys(slots.caches, 7)).copy() for _ in range(20)]
            both.append(np.concatenate(steps))
        np.testing.assert_array_equal(*both)

    @staticmethod
    def caches(session: Session) -> list[KVCache]:
        """With the windows and without."""
        return [KVSlots(session.dimensions, 400, 1, each).caches[0] for each in ((24, None, 24), None)]


def run(session: Session, cache: KVCache, length: int = 300) -> Array:
    """The logits of all tokens: prompt, single ones, prompt."""
    ids = random_ids(length)
    passes = [session.forward(ids[: length // 2], cache, range(length // 2)).copy()]
    passes += [session.forward([each], cache).copy() for each in ids[length // 2 : length // 2 + 9]]
    cache.truncate(cache.settled)
    for begin in range(length // 2, length, 30):
        chunk = ids[begin : begin + 30]
        passes.append(session.forward(chunk, cache, range(len(chunk))).copy())
    assert (cache.released > 0) == (cache.slots.window > 0 and length > 3 * 24 + 30)
    return np.concatenate(passes)


def test_a_model_answers_alike(gemma: Path, tmp_path: Path) -> None:
    """Turns, several answers, another conversation between, a saved prefix; with the windows known or not."""
    manifest = json.loads((gemma / "manifest.json").read_text(encoding="utf-8"))
    del manifest["kv_cache"]["windows"]  # as exported before it was written
    plain = tmp_path / "plain"
    plain.mkdir()
    for each in gemma.iterdir():
        (plain / each.name).write_bytes(each.read_bytes())
    (plain / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert answers(gemma, tmp_path / "a") == answers(plain, tmp_path / "b")


def answers(bundle: Path, saved: Path) -> list[tuple[int, ...]]:
    ids = random_ids(200)
    with pocketlm.load(bundle, threads=1) as model:
        given = [model.generate(ids, max_tokens=20, ignore_eos=True)]
        given.append(model.generate(random_ids(150, seed=2), max_tokens=20, ignore_eos=True))
        given.append(model.generate([*ids, 3, 4, 5], max_tokens=20, ignore_eos=True))
        given.append(model.generate([*ids[:30], 3, 4, 5], max_tokens=20, ignore_eos=True))
        streams = model.streams(ids, 3, max_tokens=5, temperature=1.0, seed=1, ignore_eos=True)
        given += [stream.finish() for stream in streams]
        assert model.save_prefix(saved, ids) == len(ids)
    with pocketlm.load(bundle, threads=1) as model:
        model.load_prefix(saved)
        given.append(model.generate([*ids, 6, 7], max_tokens=5, ignore_eos=True))
        assert given[-1].usage.cached_tokens == len(ids)
    return [each.token_ids for each in given]


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="reads Linux's own figure")
class TestMemory:
    LARGE = dataclasses.replace(DIMENSIONS, layers=8, kv_heads=2, head_dim=256)
    CAPACITY = 4096

    def test_it_goes_back_to_the_system(self) -> None:
        window, length = 64, 4000
        full = self.filled(KVSlots(self.LARGE, self.CAPACITY, 1), length)
        cache = self.filled(KVSlots(self.LARGE, self.CAPACITY, 1, [window] * 7 + [None]), length)
        head = 4 * 256 * length
        assert resident(full) >= 8 * 4 * head
        # One layer has all, and each head of the others three windows, a chunk and a page at each end.
        most = 4 * head + 7 * 4 * (4 * 256 * (3 * window + 50) + 2 * mmap.PAGESIZE)
        assert 4 * head <= resident(cache) <= most
        assert cache.buffer.sum() > 0  # reads all of it
        assert resident(cache) <= most

    def test_growing_and_moving_copy_no_zeros(self) -> None:
        slots = KVSlots(self.LARGE, self.CAPACITY, 2, [64] * 8)
        cache = self.filled(slots, 2000)
        self.filled(slots, 1900, index=1)
        both = resident(cache)
        slots.move(cache, slots.caches[1])  # over what was there
        alone = resident(cache)
        assert alone < 0.6 * both
        slots.grow(3)
        # Other pages are cut at the ends.
        assert resident(cache) <= alone + 8 * 4 * 2 * mmap.PAGESIZE

    def test_a_stored_prefix_has_no_zeros(self) -> None:
        cache = self.filled(KVSlots(self.LARGE, self.CAPACITY, 1, [64] * 8), 2000)
        prefix = StoredPrefix.of(cache, 2000)
        assert resident_at(prefix.keys_values) <= prefix.bytes + 8 * 4 * 2 * mmap.PAGESIZE

    @classmethod
    def filled(cls, slots: KVSlots, length: int, index: int = 0) -> KVCache:
        cache = slots.caches[index]
        for begin in range(0, length, 50):
            cache.append([1] * 50)
            cache.buffer[..., begin : begin + 50, :] = 1
        return cache


def resident(cache: KVCache) -> int:
    return resident_at(cache.slots.buffer)


def resident_at(array: Array) -> int:
    """Bytes of the array that have memory of their own, by pagemap(5): a page that was only read is the
    system's page of zeros, which is nobody's own."""
    first, inside = divmod(array.__array_interface__["data"][0], mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * first)
        pages = np.frombuffer(file.read(8 * -(-(inside + array.nbytes) // mmap.PAGESIZE)), np.uint64)
    present_and_exclusive = np.uint64(1 << 63 | 1 << 56)
    return mmap.PAGESIZE * int(((pages & present_and_exclusive) == present_and_exclusive).sum())


class TestManifest:
    @staticmethod
    def with_windows(windows: object) -> str:
        data = dataclasses.asdict(tiny_manifest())
        data["kv_cache"]["windows"] = windows
        return json.dumps(data)

    def test_windows_by_layer(self) -> None:
        assert parse_manifest(self.with_windows([512])).kv_cache.windows == (512,)
        assert parse_manifest(self.with_windows([None])).kv_cache.windows == (None,)
        assert parse_manifest(self.with_windows(None)).kv_cache.windows is None

    def test_a_manifest_from_before(self) -> None:
        data = dataclasses.asdict(tiny_manifest())
        del data["kv_cache"]["windows"]
        assert parse_manifest(json.dumps(data)) == tiny_manifest()

    @pytest.mark.parametrize(
        ("windows", "message"),
        [
            ([512, None], r"kv_cache\.windows has 2 layers, dimensions has 1"),
            ([], r"kv_cache\.windows has 0 layers"),
            ([0], r"kv_cache\.windows has 0; a number of tokens"),
            ([1.5], r"kv_cache\.windows\[0\] is the number 1\.5, expected int"),
            (512, r"kv_cache\.windows is the number 512, expected a list"),
        ],
    )
    def test_what_is_no_window(self, windows: object, message: str) -> None:
        with pytest.raises(ManifestError, match=message):
            parse_manifest(self.with_windows(windows))

    def test_a_field_without_a_default_is_required(self) -> None:
        data = dataclasses.asdict(tiny_manifest())
        del data["kv_cache"]["type"]
        with pytest.raises(ManifestError, match=r"the field kv_cache\.type is missing"):
            parse_manifest(json.dumps(data))
