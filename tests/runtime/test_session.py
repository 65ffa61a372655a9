"""Forward passes: what they return does not depend on how a sequence is split into them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import VOCABULARY, random_ids, run
from pocketlm.errors import BundleError, ContextOverflowError
from pocketlm.kv_cache import KVSlots
from pocketlm.manifest import read_manifest
from pocketlm.session import Session, open_graph

IDS = random_ids(150)
SPLITS = [[1], [2], [3], [149, 1], [1, 149], [64, 5, 1]]
SPLITS_OF_SEVERAL = [[2], [3], [148, 2], [2, 148], [64, 5, 3]]


def open_session(bundle: Path, *, threads: int = 1) -> Session:
    manifest = read_manifest(bundle)
    return Session(bundle / "model.onnx", manifest.dimensions, manifest.graph, threads=threads)


@pytest.fixture(scope="module")
def int8(int8_bundle: Path) -> Session:
    return open_session(int8_bundle)


@pytest.fixture(scope="module")
def fp32(fp32_bundle: Path) -> Session:
    return open_session(fp32_bundle)


@pytest.mark.parametrize("sizes", SPLITS)
def test_fp32_is_the_same_however_it_is_split(fp32: Session, sizes: list[int]) -> None:
    np.testing.assert_allclose(run(fp32, IDS, sizes), run(fp32, IDS), atol=1e-4)


@pytest.mark.parametrize("sizes", SPLITS_OF_SEVERAL)
@pytest.mark.parametrize("threads", [1, 2])
def test_int8_is_the_same_to_the_last_bit(
    int8: Session, int8_bundle: Path, sizes: list[int], threads: int
) -> None:
    session = int8 if threads == 1 else open_session(int8_bundle, threads=threads)
    assert session.threads == threads
    assert (run(session, IDS, sizes) == run(int8, IDS)).all()


def test_int8_one_by_one_is_the_same_again(int8: Session, int8_bundle: Path) -> None:
    """A token alone is computed by other means than several, but always by the same."""
    alone = run(int8, IDS, [100, *[1] * 50])
    assert (run(open_session(int8_bundle, threads=2), IDS, [50, 50, *[1] * 50]) == alone).all()
    together = run(int8, IDS)
    assert np.abs(alone - together).mean() < 0.05 * together.std()


def test_int8_is_near_fp32(int8: Session, fp32: Session) -> None:
    exact, rounded = run(fp32, IDS), run(int8, IDS)
    assert 0 < np.abs(rounded - exact).mean() < 0.05 * exact.std()


def test_only_the_rows_that_are_asked_for(fp32: Session) -> None:
    every = run(fp32, IDS[:9])
    cache = fp32.new_cache(9)
    np.testing.assert_allclose(fp32.forward(IDS[:5], cache, [3, 0, 3]), every[[3, 0, 3]], atol=1e-4)
    last = fp32.forward(IDS[5:9], cache)
    assert last.shape == (1, VOCABULARY)
    assert last.dtype == np.float32
    np.testing.assert_allclose(last[0], every[8], atol=1e-4)
    assert cache.ids == IDS[:9]


def test_a_truncated_cache_goes_on_from_there(int8: Session) -> None:
    cache = int8.new_cache(60)
    int8.forward(IDS[:40], cache)
    int8.forward(IDS[100:120], cache)
    cache.truncate(25)
    assert (int8.forward(IDS[25:60], cache, range(35)) == run(int8, IDS[:60])[25:]).all()


def test_a_fork_goes_its_own_way(int8: Session) -> None:
    cache = int8.new_cache(60)
    int8.forward(IDS[:40], cache)
    fork = int8.new_cache(60)
    fork.copy_from(cache, 30)
    other = [*IDS[:30], *IDS[100:120]]
    assert (int8.forward(other[30:], fork)[0] == run(int8, other)[-1]).all()
    assert (int8.forward(IDS[40:60], cache)[0] == run(int8, IDS[:60])[-1]).all()


def test_capacity_can_be_used_to_the_last_token(int8: Session) -> None:
    expected = run(int8, IDS)
    for sizes in ([50], [47, 3], [48, 2]):
        cache = int8.new_cache(50)
        begin = 0
        for size in sizes:
            logits = int8.forward(IDS[begin : begin + size], cache)
            begin += size
        assert (logits[0] == expected[49]).all()


def test_the_whole_trained_context_can_be_used(int8: Session) -> None:
    length = int8.dimensions.context_length
    ids = random_ids(length, seed=2)
    assert (run(int8, ids, [length - 2, 2])[-1] == run(int8, ids, [128])[-1]).all()


def test_overflow_says_both_numbers_and_computes_nothing(int8: Session) -> None:
    cache = int8.new_cache(1000)
    int8.forward(IDS[:40], cache)
    with pytest.raises(ContextOverflowError, match=r"1,001 tokens.* holds 1,000") as caught:
        int8.forward([5] * 961, cache)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (1001, 1000)
    assert cache.ids == IDS[:40]
    assert (int8.forward(IDS[40:50], cache)[0] == run(int8, IDS[:50])[-1]).all()


def slots_of(session: Session, prompts: Sequence[Sequence[int]], capacity: int = 200) -> KVSlots:
    slots = KVSlots(session.dimensions, capacity, len(prompts))
    for cache, prompt in zip(slots.caches, prompts, strict=True):
        if prompt:
            session.forward(prompt, cache)
    return slots


PROMPTS = [random_ids(count, seed=count) for count in (40, 3, 77, 12)]


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [1, 2], [0, 3], [3, 1, 0], [2]], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_int8_together_is_bit_by_bit_what_each_is_alone(
    int8: Session, int8_bundle: Path, places: list[int], threads: int
) -> None:
    session = int8 if threads == 1 else open_session(int8_bundle, threads=threads)
    slots = slots_of(session, PROMPTS)
    alone = [session.new_cache(200) for _ in PROMPTS]
    for cache, prompt in zip(alone, PROMPTS, strict=True):
        session.forward(prompt, cache)
    newest = dict.fromkeys(places, 7)
    for _ in range(12):
        logits = session.forward_each({slots.caches[place]: newest[place] for place in places})
        assert logits.shape == (len(places), VOCABULARY)
        for row, place in zip(logits, places, strict=True):
            expected = session.forward([newest[place]], alone[place])[0]
            assert (row == expected).all()
            newest[place] = int(expected.argmax())
    for place, cache in enumerate(slots.caches):
        assert cache.ids == alone[place].ids
        held = (..., slice(len(cache)), slice(None))
        assert (cache.buffer[held] == alone[place].buffer[held]).all()


def test_fp32_together_is_what_each_is_alone(fp32: Session) -> None:
    slots = slots_of(fp32, PROMPTS)
    logits = fp32.forward_each(dict.fromkeys(slots.caches, 9))
    for row, prompt in zip(logits, PROMPTS, strict=True):
        np.testing.assert_allclose(row, run(fp32, [*prompt, 9])[-1], atol=1e-4)


def test_together_after_growing_and_moving(int8: Session) -> None:
    slots = slots_of(int8, PROMPTS)
    first, second, third, fourth = slots.caches
    expected = {
        c: int8.forward([*p, 9], int8.new_cache(200)) for c, p in zip(slots.caches, PROMPTS, strict=True)
    }
    for cache, prompt in zip(slots.caches, PROMPTS, strict=True):
        cache.truncate(len(prompt) - 1)  # the last one again, so that two rows are computed
    int8.forward_each({first: 1, fourth: 1})
    for cache in (first, fourth):
        cache.truncate(len(cache) - 1)
    slots.grow(7)
    slots.move(fourth, second)
    for cache, prompt in ((first, PROMPTS[0]), (third, PROMPTS[2]), (fourth, PROMPTS[3])):
        assert (int8.forward([prompt[-1], 9], cache) == expected[cache]).all()


def test_a_full_slot_between_others_takes_part(int8: Session) -> None:
    ids = [random_ids(9), random_ids(10, seed=3), random_ids(8)]
    slots = slots_of(int8, ids, capacity=10)
    one, full, other = slots.caches
    logits = int8.forward_each({one: 4, other: 5}).copy()
    assert (len(one), len(full), len(other)) == (10, 9, 9)
    assert full.ids == ids[1][:9]
    for row, prompt, token_id in ((logits[0], ids[0], 4), (logits[1], ids[2], 5)):
        cache = int8.new_cache(10)
        int8.forward(prompt, cache)
        assert (row == int8.forward([token_id], cache)[0]).all()
    with pytest.raises(ContextOverflowError, match=r"11 tokens.* holds 10"):
        int8.forward_each({one: 4, other: 5})
    assert (len(one), len(other)) == (10, 9)


def test_bindings_of_slots_that_are_gone_are_freed(int8: Session) -> None:
    slots = slots_of(int8, PROMPTS)
    int8.forward_each(dict.fromkeys(slots.caches, 9))
    before = weakref.ref(slots.buffer)
    slots.grow(6)
    int8.forward([5], slots.caches[0])
    assert before() is None
    now = weakref.ref(slots.buffer)
    del slots
    gc.collect()  # slots and caches know each other
    assert now() is None


def test_threads_with_a_cache_each(int8: Session) -> None:
    sequences = [random_ids(80, seed=seed) for seed in range(4)]
    expected = [run(int8, ids) for ids in sequences]
    found: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        found[number] = run(int8, sequences[number], [1])

    workers = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all((found[number] == expected[number]).all() for number in range(4))


def drop_weights(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.onnx.data", 5000)


def cut_graph(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])


def replace_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"no graph at all")


def drop_graph(folder: Path) -> None:
    (folder / "model.onnx").unlink()


@pytest.mark.parametrize("damage", [drop_weights, cut_weights, cut_graph, replace_graph, drop_graph])
def test_a_damaged_graph(damage: Callable[[Path], None], int8_bundle: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes((int8_bundle / name).read_bytes())
    open_graph(tmp_path / "model.onnx", 1)
    damage(tmp_path)
    with pytest.raises(BundleError, match=r"cannot load .*model\.onnx.*pull the model again") as caught:
        open_graph(tmp_path / "model.onnx", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("before", [None, "0"])
def test_telemetry_is_off_before_onnxruntime_is_loaded(before: str | None) -> None:
    script = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import pocketlm.session\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    if before is not None:
        environment["ORT_DISABLE_TELEMETRY"] = before
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.split() == ["1"]
