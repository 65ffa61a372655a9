"""Embeddings: the hidden states of each text, pooled, whatever else the engine does."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

import pocketlm
from helpers.scripted_session import wait_for
from helpers.tiny import VOCABULARY, Array, letters, only, random_ids
from helpers.tiny_bundle import tiny_manifest
from pocketlm.aio import AsyncModel
from pocketlm.bundle import open_bundle
from pocketlm.embed import Pooled, collect
from pocketlm.engine import Model
from pocketlm.errors import (
    ContextOverflowError,
    InvalidSettingError,
    ManifestError,
    PocketlmError,
    PromptError,
)
from pocketlm.kv_cache import KVCache
from pocketlm.manifest import GraphIO, parse_manifest
from pocketlm.session import NoHiddenStatesError, Session

TEXTS = ["The theatre is out there.", "so", "ou" * 70, "the the " * 120]
LENGTHS = [1, 2, 128, 129, 130, 300, 512]


@pytest.fixture(scope="module")
def shared(int8_bundle: Path) -> Iterator[Model]:
    with pocketlm.load(int8_bundle, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def session(int8_bundle: Path) -> Session:
    bundle = open_bundle(int8_bundle)
    return Session(bundle.graph_path, bundle.manifest.dimensions, bundle.manifest.graph, threads=1)


def states(session: Session, ids: Sequence[int], sizes: Sequence[int] = ()) -> Array:
    """The hidden states (tokens, hidden), in passes of `sizes` tokens and one for what is left."""
    cache, passes, begin = session.new_cache(len(ids)), [], 0
    for size in [*sizes, len(ids) - sum(sizes)]:
        chunk = ids[begin : begin + size]
        passes.append(session.hidden(chunk, cache, range(len(chunk))).copy())
        begin += size
    return np.concatenate(passes)


class TestHiddenStates:
    def test_do_not_depend_on_the_passes(self, session: Session) -> None:
        ids = random_ids(150)
        whole = states(session, ids)
        assert whole.shape == (150, 64)
        assert whole.dtype == np.float32
        for sizes in ([2], [100, 40], [148]):
            assert_allclose(states(session, ids, sizes), whole, atol=1e-5)

    def test_only_the_rows_that_are_asked_for(self, session: Session) -> None:
        ids = random_ids(20)
        whole = states(session, ids)
        assert_allclose(session.hidden(ids, session.new_cache(20)), whole[-1:], atol=1e-5)
        assert_allclose(session.hidden(ids, session.new_cache(20), [7, 0]), whole[[7, 0]], atol=1e-5)

    def test_leave_the_cache_as_logits_do(self, session: Session) -> None:
        ids = random_ids(40)
        cache, other = session.new_cache(40), session.new_cache(40)
        session.forward(ids[:20], cache)
        session.hidden(ids[20:30], cache)
        session.forward(ids[:30], other)
        assert cache.ids == other.ids
        assert (session.forward(ids[30:], cache) == session.forward(ids[30:], other)).all()

    def test_overflow(self, session: Session) -> None:
        with pytest.raises(ContextOverflowError, match=r"11 tokens.* holds 10"):
            session.hidden([1] * 11, session.new_cache(10))

    def test_a_bundle_from_before(self, int8_bundle: Path) -> None:
        bundle = open_bundle(int8_bundle)
        names = dataclasses.replace(bundle.manifest.graph, hidden=None, hidden_rows=None)
        before = Session(bundle.graph_path, bundle.manifest.dimensions, names, threads=1)
        with pytest.raises(NoHiddenStatesError, match=r"no embeddings.*pocketlm pull MODEL --force"):
            before.hidden([1, 2], before.new_cache(2))
        old = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graph=names))
        with Model(old, threads=1) as model, pytest.raises(NoHiddenStatesError):
            model.embed(["the"])


class TestTheManifest:
    def test_from_before(self) -> None:
        data = dataclasses.asdict(tiny_manifest())
        del data["graph"]["hidden"], data["graph"]["hidden_rows"]
        assert parse_manifest(json.dumps(data)) == tiny_manifest()

    @pytest.mark.parametrize("name", ["hidden", "hidden_rows"])
    def test_with_one_of_two(self, name: str) -> None:
        half = tiny_manifest(graph=GraphIO(**{name: name}))
        with pytest.raises(ManifestError, match="both or neither"):
            parse_manifest(half.to_json())


class TestVectors:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_are_the_pooled_states(self, shared: Model, session: Session, length: int) -> None:
        ids = random_ids(length, seed=length)
        expected = states(session, ids)
        mean = shared.embed([ids], normalize=False)
        assert_allclose(mean.vectors[0], expected.mean(axis=0), atol=1e-5)
        last = shared.embed([ids], pooling="last", normalize=False)
        assert_allclose(last.vectors[0], expected[-1], atol=1e-5)
        assert mean.prompt_tokens == last.prompt_tokens == length
        assert mean.compute_s > 0

    def test_have_length_one_by_default(self, shared: Model) -> None:
        plain, unit = shared.embed(TEXTS, normalize=False).vectors, shared.embed(TEXTS).vectors
        assert unit.shape == (4, 64)
        assert unit.dtype == np.float32
        assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
        assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
        assert (np.ptp(unit, axis=0) > 0.01).any()  # they are not all one vector

    def test_a_vector_of_zeros_stays_one(self) -> None:
        zeros = Pooled(np.zeros(3), 2, 0.5)
        embeddings = collect(
            [zeros, dataclasses.replace(zeros, vector=np.array([3.0, 0, 4]))], 3, normalize=True
        )
        assert_allclose(embeddings.vectors, [[0, 0, 0], [0.6, 0, 0.8]])
        assert (embeddings.prompt_tokens, embeddings.compute_s) == (4, 1.0)

    def test_a_text_is_its_tokens(self, shared: Model) -> None:
        ids = [shared.encode(text, raw=True) for text in TEXTS]
        by_text, by_ids = shared.embed(TEXTS), shared.embed([ids[0], np.array(ids[1]), *ids[2:]])
        assert (by_text.vectors == by_ids.vectors).all()
        assert by_text.prompt_tokens == sum(map(len, ids))

    def test_no_texts(self, shared: Model) -> None:
        embeddings = shared.embed([])
        assert embeddings.vectors.shape == (0, 64)
        assert embeddings.prompt_tokens == 0

    def test_depend_on_nothing_else(self, int8_bundle: Path, shared: Model) -> None:
        """Not on other texts, their order, threads or the answers that are under way; to the last bit."""
        alone = np.concatenate([shared.embed([text]).vectors for text in TEXTS])
        assert (shared.embed(TEXTS[::-1]).vectors[::-1] == alone).all()
        with pocketlm.load(int8_bundle, threads=2) as model:
            streams = [
                model.stream(random_ids(9, seed=seed), max_tokens=60, logit_bias=only(letters()))
                for seed in (1, 2)
            ]
            assert (model.embed(TEXTS).vectors == alone).all()
            answers = [stream.finish().token_ids for stream in streams]
            for seed, answer in zip((1, 2), answers, strict=True):
                again = shared.generate(random_ids(9, seed=seed), max_tokens=60, logit_bias=only(letters()))
                assert again.token_ids == answer


class TestTheEngine:
    def test_computes_alone_and_a_chunk_at_a_time(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: list[tuple[str, int]] = []
        hidden = Session.hidden

        def watched(self: Session, ids: Sequence[int], *arguments: Any) -> Array:
            passes.append((threading.current_thread().name, len(ids)))
            return hidden(self, ids, *arguments)

        monkeypatch.setattr(Session, "hidden", watched)
        model.embed([random_ids(300), random_ids(129)])
        assert passes == [("pocketlm-engine", count) for count in (128, 128, 44, 127, 2)]

    def test_one_text_is_in_memory_at_a_time(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        alive: set[int] = set()
        most = 0
        hidden = Session.hidden

        def watched(self: Session, ids: Sequence[int], cache: KVCache, *arguments: Any) -> Array:
            nonlocal most
            alive.add(id(cache))
            most = max(most, len(alive))
            states = hidden(self, ids, cache, *arguments)
            if len(cache) == cache.capacity:
                alive.remove(id(cache))
            return states

        monkeypatch.setattr(Session, "hidden", watched)
        threads = [
            threading.Thread(target=model.embed, args=[[random_ids(260, seed=seed)] * 3]) for seed in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            wait_for(thread)
        assert (most, alive) == (1, set())

    def test_an_error_is_the_callers(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> Array:
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(Session, "hidden", broken)
            with pytest.raises(MemoryError, match="no room"):
                model.embed(["the"])
        assert model.embed(["the"]).prompt_tokens == 1

    def test_a_model_that_is_closed_meanwhile(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden = Session.hidden
        entered, goes_on = threading.Event(), threading.Event()

        def slow(self: Session, *arguments: Any) -> Array:
            entered.set()
            assert goes_on.wait(20)
            return hidden(self, *arguments)

        monkeypatch.setattr(Session, "hidden", slow)
        job = next(iter(model._embed([random_ids(300)], "mean")))
        assert entered.wait(20)
        closing = threading.Thread(target=model.close)
        closing.start()
        while not model._scheduler._closed:
            time.sleep(0.001)
        goes_on.set()
        wait_for(closing)
        with pytest.raises(PocketlmError, match="has been closed"):
            job.result()
        with pytest.raises(PocketlmError, match="has been closed"):
            model.embed(["the"])


class TestRefused:
    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["the", ""], "Text 2 of 2 is empty"),
            ([[]], "Text 1 of 1 is empty"),
            ("the theatre", "Put a single one in a list"),
            ([1, 2, 3], "Put a single one in a list"),
            (["the", "\ud800"], "lone surrogate"),
            ([[1, VOCABULARY]], "outside the vocabulary"),
            ([[-1]], "outside the vocabulary"),
        ],
    )
    def test_texts(self, shared: Model, texts: Any, message: str) -> None:
        with pytest.raises(PromptError, match=message):
            shared.embed(texts)

    def test_one_that_is_too_long_before_any_is_computed(
        self, shared: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Session, "hidden", None)
        with pytest.raises(ContextOverflowError, match=r"513 tokens.* holds 512"):
            shared.embed(["the", random_ids(513)])

    def test_another_pooling(self, shared: Model) -> None:
        with pytest.raises(InvalidSettingError, match=r"pooling is 'max'; expected 'mean' or 'last'"):
            shared.embed(["the"], pooling="max")  # type: ignore[arg-type]


class TestAsync:
    def test_gives_the_same(self, int8_bundle: Path, shared: Model) -> None:
        async def main() -> None:
            async with await AsyncModel.load(int8_bundle, threads=1) as model:
                found = await asyncio.gather(*(model.embed(TEXTS, pooling="last") for _ in range(5)))
                expected = shared.embed(TEXTS, pooling="last")
                for each in found:
                    assert (each.vectors == expected.vectors).all()
                    assert each.prompt_tokens == expected.prompt_tokens
                plain = await model.embed(TEXTS[:1], normalize=False)
                assert (plain.vectors == shared.embed(TEXTS[:1], normalize=False).vectors).all()
                with pytest.raises(PromptError, match="is empty"):
                    await model.embed([""])

        asyncio.run(main())

    def test_cancelling_ends_it_after_a_text(
        self, int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hidden, begun = Session.hidden, threading.Semaphore(0)
        passes = 0

        def watched(self: Session, *arguments: Any) -> Array:
            nonlocal passes
            passes += 1
            begun.release()
            return hidden(self, *arguments)

        monkeypatch.setattr(Session, "hidden", watched)

        async def main() -> None:
            async with await AsyncModel.load(int8_bundle, threads=1) as model:
                task = asyncio.create_task(model.embed([random_ids(20)] * 2_000))
                assert await asyncio.to_thread(begun.acquire, timeout=20)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await model.embed(["the"])
                done = passes
                await asyncio.sleep(0.05)
                assert passes == done < 2_000

        asyncio.run(main())
