"""Many answers at once, on a session that says what it is told to and can be stopped before any pass."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from helpers.powercap import Clock
from helpers.scripted_session import (
    PATIENCE_S,
    Gate,
    Pass,
    ScriptedEngine,
    ScriptedSession,
    check_content,
    read,
    says,
    wait_for,
)
from helpers.tiny import END_OF_TEXT, VOCABULARY
from pocketlm.compute_time import ComputeTime
from pocketlm.errors import PocketlmError
from pocketlm.generate import READ_AHEAD, Stream
from pocketlm.kv_cache import KVCache
from pocketlm.kv_pool import KVPool
from pocketlm.prefill import passes
from pocketlm.sampling import Sampled, Sampler, Sampling
from pocketlm.scheduler import QueueFullError, Request

A, B, C = ([10, 1, 2], [20, 1, 2], [30, 1, 2])
"""Prompts, told from each other by their first token."""


def after(prompt: Sequence[int], count: int) -> list[int]:
    return [(prompt[-1] + 1 + n) % 100 for n in range(count)]


@contextlib.contextmanager
def stepped(**options: Any) -> Iterator[tuple[ScriptedEngine, Gate]]:
    gate = Gate()
    with ScriptedEngine(ScriptedSession(on_pass=gate), **options) as engine:
        yield engine, gate


class TestPasses:
    @pytest.mark.parametrize(
        ("cached", "chunk", "sizes"),
        [
            (0, 128, [10]),
            (0, 4, [4, 4, 2]),
            (0, 5, [5, 5]),
            (9, 4, [1]),
            (3, 4, [4, 3]),
            (0, 9, [8, 2]),  # no token goes alone
            (0, 3, [3, 3, 2, 2]),
            (0, 1, [1] * 10),
        ],
    )
    def test_only_what_lacks(self, cached: int, chunk: int, sizes: list[int]) -> None:
        pairs = list(passes(cached, 10, chunk))
        assert [end - start for start, end in pairs] == sizes
        assert [start for start, _ in pairs] == [cached + sum(sizes[:n]) for n in range(len(sizes))]


class TestOne:
    def test_an_answer(self) -> None:
        with ScriptedEngine() as engine:
            assert engine.ids(A, limit=5) == [3, 4, 5, 6, 7]
            assert [dict(each.tokens) for each in engine.session.passes] == [{10: 3}, *[{10: 1}] * 4]

    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_nothing_is_computed_behind_the_last_token(self, limit: int) -> None:
        session = ScriptedSession(says([4, 5, 6, 7], behind=3))
        with ScriptedEngine(session) as engine:
            assert engine.ids(A, limit=limit) == [4, 5, 6][:limit]
            engine.idle()
            assert len(session.passes) == limit

    def test_an_end_of_text_is_the_last(self) -> None:
        session = ScriptedSession(says([4, END_OF_TEXT, 6], behind=3))
        with ScriptedEngine(session) as engine:
            completion = engine.stream(A).finish()
            assert (completion.token_ids, completion.finish_reason) == ((4, END_OF_TEXT), "stop")
            engine.idle()
            assert len(session.passes) == 2

    def test_a_full_context_can_be_used_to_its_last_token(self) -> None:
        with ScriptedEngine(capacity=12) as engine:
            assert engine.ids(A, limit=9) == after(A, 9)

    @pytest.mark.parametrize(
        ("before", "prompt", "cached"),
        [
            ([], [1, 2], 0),
            ([1, 2, 3], [1, 2, 9, 9], 2),
            ([1, 2, 3], [1, 2, 3, 4, 5], 3),
            ([1, 2, 3], [1, 2, 3, 4], 2),  # no token is to be computed alone
            ([1, 2, 3], [1, 2, 3], 1),  # and the last one's logits have to be
            ([1, 2, 3], [1, 2], 0),
            ([1, 2, 3], [1], 0),
            ([9, 9], [1, 2], 0),
        ],
    )
    def test_what_is_cached_is_not_computed_again(
        self, before: list[int], prompt: list[int], cached: int
    ) -> None:
        with ScriptedEngine() as engine:
            if before:
                engine.ids(before, limit=1)
            completion = engine.stream(prompt, limit=1).finish()
            assert completion.usage.cached_tokens == cached
            assert completion.usage.prompt_tokens == len(prompt)
            assert engine.session.passes[-1].tokens == {prompt[0]: len(prompt) - cached}
            again = engine.stream(prompt, limit=1, cache_prompt=False).finish()
            assert again.usage.cached_tokens == 0
            assert again.token_ids == completion.token_ids


class TestTogether:
    def test_a_long_prompt_holds_answers_up_by_one_chunk_at_most(self) -> None:
        with stepped(chunk=16) as (engine, gate):
            short = engine.stream(A, limit=30)
            gate.step()
            gate.arrived()
            long = engine.stream(range(50, 150), limit=3)
            gate.go()
            kinds = [gate.step() for _ in range(13)]
            chunks = [each for each in kinds if 50 in each.names and each.tokens[50] > 1]
            assert [each.tokens[50] for each in chunks] == [16] * 6 + [4]
            # Between any two chunks the answer under way gets its token.
            assert [each.names for each in kinds] == [{50}, {10}] * 6 + [{50}]
            gate.open()
            assert read(short) == after(A, 30)
            assert read(long) == after([149], 3)

    def test_prompts_take_turns(self) -> None:
        with stepped(chunk=16) as (engine, gate):
            first = engine.stream(range(50, 90), limit=1)
            gate.arrived()
            others = [engine.stream(range(start, start + 40), limit=1) for start in (100, 150)]
            gate.go()
            assert [min(gate.step().names) for _ in range(8)] == [50, 100, 150, 50, 100, 150, 100, 150]
            for stream in (first, *others):
                assert len(read(stream)) == 1

    def test_they_join_and_leave_at_any_step(self) -> None:
        with stepped() as (engine, gate):
            first = engine.stream(A, limit=4)
            gate.step()
            gate.step()
            gate.arrived()
            second = engine.stream(B, limit=4)
            gate.go()
            assert gate.step().tokens == {20: 3}
            third = engine.stream(C, limit=2)
            together = gate.step()
            assert (together.names, together.together) == ({10, 20}, True)
            assert gate.step().tokens == {30: 3}
            # The first answer has had its four tokens.
            assert gate.step().names == {20, 30}
            assert gate.step().names == {20}
            assert [read(each) for each in (first, second, third)] == [
                after(A, 4),
                after(B, 4),
                after(C, 2),
            ]

    def test_slots_grow_while_others_are_under_way(self) -> None:
        with stepped(concurrency=8) as (engine, gate):
            streams = []
            for number in range(8):
                streams.append(engine.stream([number, 50 + number], limit=40))
                while gate.arrived().tokens != {number: 2}:
                    gate.go()
                gate.go()
            gate.open()
            for number, stream in enumerate(streams):
                assert read(stream) == after([50 + number], 40)
            engine.idle()
            assert len(engine.pool.slots) == 8
            assert max(len(each.tokens) for each in engine.session.passes) == 8

    def test_those_that_are_left_move_together(self) -> None:
        with stepped() as (engine, gate):
            limits = {10: 20, 20: 3, 30: 3, 40: 20}
            streams = {}
            for name, limit in limits.items():
                streams[name] = engine.stream([name, 1, 2], limit=limit)
            gate.open()
            for name, limit in limits.items():
                assert read(streams[name]) == after([2], limit)
            last = [each for each in engine.session.passes if each.names == {10, 40}]
            assert last
            assert {each.slots for each in last} == {2}
            # What was in the places that they took is not lost.
            known = engine.stream([20, 1, 2, 3, 4, 5], limit=1).finish()
            assert known.usage.cached_tokens == 3

    def test_no_more_at_once_than_concurrency(self) -> None:
        with stepped(concurrency=2) as (engine, gate):
            streams = [engine.stream(prompt, limit=3) for prompt in (A, B, C)]
            gate.arrived()
            gate.open()
            for stream, prompt in zip(streams, (A, B, C), strict=True):
                assert read(stream) == after(prompt, 3)
            assert max(len(each.tokens) for each in engine.session.passes) == 2

    @pytest.mark.parametrize("limit", [1, 2, 10])
    def test_with_one_at_once_the_next_follows(self, limit: int) -> None:
        with ScriptedEngine(concurrency=1) as engine:
            streams = [engine.stream(prompt, limit=limit) for prompt in (A, B, C)]
            for stream, prompt in zip(streams, (A, B, C), strict=True):
                assert read(stream) == after(prompt, limit)

    def test_threads_give_what_each_gives_alone(self) -> None:
        with ScriptedEngine(concurrency=3) as engine:
            found: list[tuple[int, list[int]]] = []

            def work(name: int) -> None:
                found.extend((name, engine.ids([name, name], limit=7)) for _ in range(10))

            workers = [threading.Thread(target=work, args=[name], daemon=True) for name in range(6)]
            for worker in workers:
                worker.start()
            for worker in workers:
                wait_for(worker)
            assert len(found) == 60
            assert all(ids == after([name], 7) for name, ids in found)
            assert len(engine.pool.slots) <= 4


class TestQueue:
    def test_is_bounded_and_takes_all_or_nothing(self) -> None:
        with stepped(concurrency=1, queue_limit=2) as (engine, gate):
            first = engine.stream(A, limit=2)
            gate.arrived()
            second = engine.stream(B, limit=2)
            with pytest.raises(QueueFullError, match=r"1 requests wait.*larger queue_limit") as caught:
                engine.scheduler.submit(engine.request(C), engine.request(C))
            assert caught.value.waiting == 1
            third = engine.stream(C, limit=2)
            with pytest.raises(QueueFullError):
                engine.stream(A)
            assert engine.scheduler.load == (1, 2)
            gate.open()
            assert [read(each) for each in (first, second, third)] == [after(each, 2) for each in (A, B, C)]
            engine.idle()
            assert engine.scheduler.load == (0, 0)

    def test_what_can_begin_at_once_does_not_wait(self) -> None:
        with stepped(concurrency=2, queue_limit=0) as (engine, gate):
            streams = [engine.stream(prompt, limit=1) for prompt in (A, B)]
            with pytest.raises(QueueFullError, match=r"\d requests wait"):
                engine.stream(C)
            gate.open()
            assert [read(each) for each in streams] == [[3], [3]]

    def test_a_cancelled_request_leaves_it(self) -> None:
        with stepped(concurrency=1, queue_limit=1) as (engine, gate):
            first = engine.stream(A, limit=4)
            gate.arrived()
            engine.stream(B).close()
            gate.go()
            gate.step()
            gate.arrived()  # a new step has begun
            third = engine.stream(C, limit=1)
            gate.open()
            assert (read(first), read(third)) == (after(A, 4), [3])
            assert all(20 not in each.names for each in engine.session.passes)


class TestEnds:
    def test_closed_from_another_thread_it_is_gone_by_the_next_step(self) -> None:
        with stepped() as (engine, gate):
            one, other = engine.stream(A, limit=50), engine.stream(B, limit=50)
            while gate.arrived().names != {10, 20}:
                gate.go()
            closer = threading.Thread(target=one.close)
            closer.start()
            wait_for(closer)
            gate.go()
            assert gate.step().names == {20}
            gate.open()
            assert read(other) == after(B, 50)
            assert one.completion.finish_reason == "cancelled"

    def test_closed_while_a_reader_waits(self) -> None:
        with stepped() as (engine, gate):
            stream = engine.stream(A)
            found: list[list[int]] = []
            reader = threading.Thread(target=lambda: found.append(read(stream)), daemon=True)
            reader.start()
            gate.arrived()
            stream.close()
            wait_for(reader)
            assert found == [[]]

    @pytest.mark.parametrize("close", [False, True])
    def test_closed_during_the_prompt(self, close: bool) -> None:
        with stepped(chunk=16) as (engine, gate):
            stream = engine.stream(range(100), limit=5)
            gate.step()
            gate.arrived()
            if close:
                stream.close()
            else:
                del stream
            gate.go()
            other = engine.stream(C, limit=1)
            assert gate.step().names == {30}
            assert read(other) == [3]

    def test_dropped_it_is_gone_without_a_collection(self) -> None:
        gc.disable()
        try:
            with stepped(concurrency=1) as (engine, gate):
                stream = engine.stream(A, limit=500)
                gate.step()
                next(stream)
                gate.arrived()
                del stream
                gate.open()
                assert engine.ids(B, limit=2) == [3, 4]
        finally:
            gc.enable()

    @pytest.mark.parametrize("where", ["waiting", "prefilling", "decoding", "paused"])
    def test_a_deadline(self, where: str) -> None:
        with stepped(concurrency=1, chunk=16) as (engine, gate):
            if where == "waiting":
                first = engine.stream(A, limit=READ_AHEAD + 50)
                gate.arrived()
            request = engine.request(range(40), limit=READ_AHEAD + 50)
            stream = Stream(request.channel)
            if where in ("waiting", "paused"):
                request.deadline = time.perf_counter() + (0.05 if where == "paused" else 0)
            engine.scheduler.submit(request)
            if where in ("prefilling", "decoding"):
                for _ in range(1 if where == "prefilling" else 4):
                    gate.step()
                gate.arrived()
                request.deadline = time.perf_counter()
            gate.open()
            if where == "paused":
                # Nobody reads it, so the engine waits for its reader and for nothing else.
                patience = time.perf_counter() + PATIENCE_S
                while not request.ended and time.perf_counter() < patience:
                    time.sleep(0.005)
            count = len(read(stream))
            assert stream.completion.finish_reason == "timeout"
            assert count == {"waiting": 0, "prefilling": 0, "decoding": 3}.get(where, count)
            if where == "waiting":
                first.close()

    def test_a_reader_who_pauses_holds_nobody_up(self) -> None:
        with ScriptedEngine() as engine:
            slow = engine.stream(A, limit=3 * READ_AHEAD)
            engine.ids(B, limit=2 * READ_AHEAD)
            engine.idle()
            alone = sum(each.names == {10} for each in engine.session.passes)
            together = sum({10} < each.names for each in engine.session.passes)
            assert alone + together == READ_AHEAD  # its prompt, and all but the last of so many tokens
            assert engine.scheduler.load == (1, 0)
            assert read(slow) == after(A, 3 * READ_AHEAD)

    def test_a_reader_who_pauses_takes_no_place(self) -> None:
        with ScriptedEngine(concurrency=1) as engine:
            slow = engine.stream(A, limit=3 * READ_AHEAD)
            assert read(engine.stream(B, limit=5)) == after(B, 5)
            assert read(slow) == after(A, 3 * READ_AHEAD)

    def test_the_whole_of_an_answer_that_was_read_late(self) -> None:
        with ScriptedEngine() as engine:
            stream = engine.stream(A, limit=5)
            engine.idle()
            assert read(stream) == after(A, 5)
            assert stream.completion.finish_reason == "length"


class TestErrors:
    def test_of_a_prompt_ends_that_request(self) -> None:
        def fail(each: Pass) -> None:
            if each.tokens.get(20, 0) > 1:
                raise RuntimeError("broken")

        with ScriptedEngine(ScriptedSession(on_pass=fail)) as engine:
            good, bad = engine.stream(A), engine.stream(B)
            with pytest.raises(RuntimeError, match="broken"):
                read(bad)
            assert bad.completion.finish_reason == "cancelled"
            assert read(good) == after(A, 10)
            assert engine.ids(C) == after(C, 10)

    def test_of_a_pass_ends_all_that_share_it_and_the_engine_goes_on(self) -> None:
        broken = [True]

        def fail(each: Pass) -> None:
            if each.together and broken:
                broken.clear()
                raise RuntimeError("broken")

        with stepped() as (engine, gate):
            streams = [engine.stream(A, limit=50), engine.stream(B, limit=50)]
            gate.step()
            gate.step()
            engine.session.on_pass = fail
            gate.open()
            for stream in streams:
                with pytest.raises(RuntimeError, match="broken"):
                    read(stream)
            assert engine.ids(A) == after(A, 10)

    @pytest.mark.parametrize("reproducible", [False, True])
    def test_of_one_sampler_ends_that_request(self, reproducible: bool) -> None:
        class Broken(Sampler):
            def sample(self, logits: Any) -> Sampled:
                if self._count == 2:
                    raise PocketlmError("the weights are damaged")
                return super().sample(logits)

        with ScriptedEngine(reproducible=reproducible) as engine:
            requests = [
                engine.request(A, limit=30),
                engine.request(B, sampler=Broken(Sampling(), VOCABULARY, ())),
                engine.request(C, limit=30),
            ]
            streams = [Stream(request.channel) for request in requests]
            engine.scheduler.submit(*requests)
            with pytest.raises(PocketlmError, match="damaged"):
                read(streams[1])
            assert len(streams[1].completion.token_ids) == 2
            assert (read(streams[0]), read(streams[2])) == (after(A, 30), after(C, 30))

    def test_of_a_pool_without_memory_ends_that_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with ScriptedEngine() as engine:
            take = KVPool.take

            def fail(pool: KVPool, ids: Sequence[int]) -> KVCache:
                if ids[:1] == [20]:
                    raise MemoryError("no room")
                return take(pool, ids)

            monkeypatch.setattr(KVPool, "take", fail)
            good, bad = engine.stream(A), engine.stream(B)
            with pytest.raises(MemoryError, match="no room"):
                read(bad)
            assert read(good) == after(A, 10)
            engine.idle()
            assert engine.scheduler.load == (0, 0)

    def test_of_a_step_ends_all_and_the_engine_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with stepped() as (engine, gate):
            streams = [engine.stream(A, limit=50), engine.stream(B, limit=50)]
            gate.step()
            with monkeypatch.context() as patch:
                patch.setattr(engine.scheduler, "_admit", lambda: 1 / 0)
                gate.open()
                for stream in streams:
                    with pytest.raises(ZeroDivisionError):
                        read(stream)
            assert engine.ids(C) == after(C, 10)


class TestClose:
    def test_ends_what_is_under_way_and_what_waits(self) -> None:
        with stepped(concurrency=1) as (engine, gate):
            running, waiting = engine.stream(A, limit=500), engine.stream(B)
            gate.arrived()
            closer = threading.Thread(target=engine.scheduler.close)
            closer.start()
            gate.open()
            wait_for(closer)
            assert read(waiting) == []
            read(running)
            for stream in (running, waiting):
                assert stream.completion.finish_reason == "cancelled"
            with pytest.raises(PocketlmError, match="has been closed"):
                engine.stream(C)
            with pytest.raises(PocketlmError, match="has been closed"):
                engine.scheduler.call(lambda pool: None)
            engine.scheduler.close()

    def test_before_anything_was_asked_for(self) -> None:
        engine = ScriptedEngine()
        engine.scheduler.close()
        engine.scheduler.close()
        assert engine.pool.slots.caches == []
        with pytest.raises(PocketlmError, match="has been closed"):
            engine.stream(A)

    def test_settles_the_calls_that_still_wait(self) -> None:
        with stepped() as (engine, gate):
            stream = engine.stream(A, limit=50)
            gate.arrived()
            found = engine.scheduler.call(lambda pool: 7)
            closer = threading.Thread(target=engine.scheduler.close)
            closer.start()
            gate.open()
            wait_for(closer)
            assert found.result(PATIENCE_S) == 7
            stream.close()

    def test_from_the_engines_own_thread(self) -> None:
        with ScriptedEngine() as engine:
            request = engine.request(A)
            request.channel.on_item = engine.scheduler.close
            stream = Stream(request.channel)
            engine.scheduler.submit(request)
            read(stream)
            assert stream.completion.finish_reason == "cancelled"

    def test_gives_the_session_back_although_a_stream_is_kept(self) -> None:
        engine = ScriptedEngine()
        stream = engine.stream(A)
        read(stream)
        session = weakref.ref(engine.session)
        buffer = weakref.ref(engine.pool.slots.buffer)
        engine.scheduler.close()
        del engine.session
        assert session() is None
        assert buffer() is None
        assert stream.completion.token_ids == tuple(after(A, 10))

    def test_lets_go_of_what_was_under_way(self) -> None:
        """A speculator holds a draft model."""
        engine = ScriptedEngine()
        speculator = Proposals(A, lambda ids: [])
        held = weakref.ref(speculator)
        request = engine.request(A, limit=3 * READ_AHEAD, speculator=speculator)
        stream = Stream(request.channel)
        engine.scheduler.submit(request)
        del request, speculator
        next(stream)
        engine.scheduler.close()
        assert held() is None
        assert stream.finish().finish_reason == "cancelled"


class TestCalls:
    def test_run_on_the_engines_thread(self) -> None:
        with ScriptedEngine() as engine:
            pool, name = engine.scheduler.call(lambda pool: (pool, threading.current_thread().name)).result(
                PATIENCE_S
            )
            assert pool is engine.pool
            assert name == "pocketlm-engine"

    def test_pass_errors_on(self) -> None:
        with ScriptedEngine() as engine:
            with pytest.raises(ZeroDivisionError):
                engine.scheduler.call(lambda pool: 1 // 0).result(PATIENCE_S)
            assert engine.ids(A) == after(A, 10)

    def test_that_are_cancelled_harm_nobody(self) -> None:
        with stepped() as (engine, gate):
            stream = engine.stream(A)
            gate.arrived()
            future: Future[None] = engine.scheduler.call(lambda pool: None)
            assert future.cancel()
            gate.open()
            assert read(stream) == after(A, 10)


class TestSeveralAnswers:
    def test_share_their_prompt(self) -> None:
        prompt = list(range(50, 90))
        with ScriptedEngine(chunk=16) as engine:
            first = engine.request(prompt, limit=6)
            requests = [first, *(engine.request(prompt, limit=6, after=first) for _ in range(3))]
            streams = [Stream(request.channel) for request in requests]
            engine.scheduler.submit(*requests)
            for stream in streams:
                assert read(stream) == after(prompt, 6)
            computed = [each.tokens[50] for each in engine.session.passes if each.tokens[50] > 1]
            assert computed == [16, 16, 8, 2, 2, 2]
            assert [stream.completion.usage.cached_tokens for stream in streams] == [0, 38, 38, 38]

    @pytest.mark.parametrize("how", ["short", "closed", "failed"])
    def test_go_on_without_the_first(self, how: str) -> None:
        def fail(each: Pass) -> None:
            if how == "failed" and len(engine.session.passes) == 1:
                raise RuntimeError("broken")

        with ScriptedEngine(ScriptedSession(on_pass=fail), concurrency=2) as engine:
            first = engine.request(A, limit=1)
            second = engine.request(A, limit=3, after=first)
            streams = [Stream(each.channel) for each in (first, second)]
            if how == "closed":
                streams[0].close()
            engine.scheduler.submit(first, second)
            assert read(streams[1]) == after(A, 3)


class TestSettling:
    """An answer that something will follow is computed again, as a prompt, when there is time."""

    def test_when_it_is_complete(self) -> None:
        with ScriptedEngine() as engine:
            ids = engine.ids(A, limit=5, settle=True)
            engine.idle()
            assert engine.session.passes[-1].tokens == {10: 5}
            again = engine.stream([*A, *ids, 50, 51], limit=1).finish()
            assert again.usage.cached_tokens == 8

    def test_in_chunks_and_never_before_an_answer_under_way(self) -> None:
        with stepped(chunk=8) as (engine, gate):
            # So that there are two slots.
            first, other = engine.stream(A, limit=21, settle=True), engine.stream(C, limit=1)
            for _ in range(22):
                gate.step()
            assert read(other) == [3]
            assert gate.arrived().tokens == {10: 8}
            other = engine.stream(B, limit=3)
            gate.go()
            assert [gate.step().tokens for _ in range(5)] == [{20: 3}, {20: 1}, {20: 1}, {10: 8}, {10: 5}]
            assert (read(first), read(other)) == (after(A, 21), after(B, 3))

    def test_not_when_nothing_follows(self) -> None:
        with ScriptedEngine() as engine:
            ids = engine.ids(A, limit=5)
            engine.idle()
            assert len(engine.session.passes) == 5
            assert engine.stream([*A, *ids], limit=1).finish().usage.cached_tokens == 3

    def test_the_next_turn_does_not_wait_for_it(self) -> None:
        with stepped(chunk=8) as (engine, gate):
            ids = []
            stream = engine.stream(A, limit=21, settle=True)
            for _ in range(21):
                gate.step()
            ids = read(stream)
            assert gate.arrived().tokens == {10: 8}
            turn = engine.stream([*A, *ids, 50], limit=1)
            gate.go()
            assert gate.step().tokens == {10: 8}
            gate.open()
            assert read(turn) == [51]
            assert turn.completion.usage.cached_tokens == 11

    def test_is_given_up_when_the_slot_is_taken(self) -> None:
        with stepped(chunk=8, budget_bytes=0) as (engine, gate):
            stream = engine.stream(A, limit=21, settle=True)
            for _ in range(21):
                gate.step()
            read(stream)
            assert gate.arrived().tokens == {10: 8}
            other = engine.stream(B, limit=2)
            gate.open()
            assert read(other) == after(B, 2)
            engine.idle()
            assert [each.names for each in engine.session.passes[-2:]] == [{20}, {20}]
            assert engine.scheduler.load == (0, 0)

    def test_an_error_meanwhile_is_nobodys(self) -> None:
        def fail(each: Pass) -> None:
            if len(engine.session.passes) == 6:
                raise RuntimeError("broken")

        with ScriptedEngine(ScriptedSession(on_pass=fail)) as engine:
            assert engine.ids(A, limit=5, settle=True) == after(A, 5)
            engine.idle()
            assert len(engine.session.passes) == 6
            assert engine.ids(B) == after(B, 10)


class Proposals:
    """Stands in for a Speculator: proposes what a function of the sequence says, right or wrong."""

    def __init__(self, prompt: Sequence[int], propose: Callable[[list[int]], list[int]]) -> None:
        self.sequence = list(prompt)
        self._propose = propose

    def propose(self, limit: int) -> list[int]:
        return self._propose(self.sequence)[: max(0, limit)]

    def advance(self, ids: Sequence[int]) -> None:
        self.sequence.extend(ids)


class Watched(ScriptedEngine):
    """Keeps the caches that come back."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.returned: list[list[int]] = []
        give_back = self.pool.give_back

        def watch(cache: KVCache) -> None:
            check_content(cache)
            self.returned.append(list(cache.ids))
            give_back(cache)

        self.pool.give_back = watch  # type: ignore[method-assign]


class TestSpeculation:
    def test_right_drafts_save_passes(self) -> None:
        def propose(ids: list[int]) -> list[int]:
            return [ids[-1] + 1, ids[-1] + 2, ids[-1] + 3]

        with Watched() as engine:
            request = engine.request(A, limit=9, speculator=Proposals(A, propose))
            stream = Stream(request.channel)
            engine.scheduler.submit(request)
            assert read(stream) == after(A, 9)
            assert [each.tokens[10] for each in engine.session.passes] == [3, 4, 4]
            timings = stream.completion.timings
            assert (timings.drafted_tokens, timings.accepted_tokens) == (6, 6)
            assert engine.returned == [[*A, *after(A, 8)]]

    def test_wrong_drafts_change_nothing(self) -> None:
        with Watched() as engine:
            request = engine.request(A, limit=4, speculator=Proposals(A, lambda ids: [7, 8]))
            stream = Stream(request.channel)
            engine.scheduler.submit(request)
            assert read(stream) == after(A, 4)
            timings = stream.completion.timings
            assert (timings.drafted_tokens, timings.accepted_tokens) == (2 + 1, 0)
            assert engine.returned == [[*A, *after(A, 3)]]

    def test_answers_that_share_a_pass_are_not_drafted(self) -> None:
        with stepped() as (engine, gate):
            requests = [
                engine.request(prompt, limit=6, speculator=Proposals(prompt, lambda ids: [ids[-1] + 1]))
                for prompt in (A, B)
            ]
            streams = [Stream(request.channel) for request in requests]
            engine.scheduler.submit(*requests)
            gate.open()
            assert [read(stream) for stream in streams] == [after(A, 6), after(B, 6)]
            for each in engine.session.passes:
                assert each.rows == len(each.tokens) or len(each.tokens) == 1

    def test_what_a_grammar_forces_is_computed_at_once(self) -> None:
        class Forces:
            must_stop = False

            def mask(self, logits: Any) -> None:
                pass

            def accept(self, token_id: int) -> None:
                self.newest = token_id

            def forced(self) -> list[int]:
                return [(self.newest + 1 + n) % 100 for n in range(60)]

        with Watched() as engine:
            nothing = Proposals(A, lambda ids: [])
            assert engine.ids(A, limit=40, constraint=Forces(), speculator=nothing) == after(A, 40)
            # No more rows of logits in a pass than a draft's.
            assert [each.tokens[10] for each in engine.session.passes] == [3, 16, 16, 7]
            assert engine.returned == [[*A, *after(A, 39)]]
            before = len(engine.session.passes)
            assert engine.ids(A, limit=5, constraint=Forces(), speculator=None) == after(A, 5)
            assert all(each.rows == 1 for each in engine.session.passes[before:])

    @example_settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def test_the_answer_is_the_one_without(self, data: st.DataObject) -> None:
        """Whatever is proposed, and wherever in a draft the answer ends."""
        tokens = st.integers(40, 47)
        script = data.draw(st.lists(tokens | st.just(END_OF_TEXT), min_size=40, max_size=40))
        limit = data.draw(st.integers(1, 30))
        stop = data.draw(st.lists(st.text("IJKLMNOP", min_size=1, max_size=3), max_size=2))
        reproducible, sampled = data.draw(st.booleans()), data.draw(st.booleans())
        prompt = data.draw(st.lists(tokens, min_size=1, max_size=4))
        capacity = len(prompt) + limit + data.draw(st.integers(0, 3))

        def follow(ids: Sequence[int]) -> int:
            return script[(len(ids) + 3 * ids[-1]) % 40]

        drafts = st.tuples(st.integers(0, 5), st.lists(tokens, max_size=3))
        drawn = data.draw(st.lists(drafts, min_size=1, max_size=8))

        def propose(ids: list[int]) -> list[int]:
            count, wrong = drawn[len(ids) % len(drawn)]
            right = list(ids)
            for _ in range(count):
                right.append(follow(right))
            return right[len(ids) :] + wrong

        def answer(speculator: Proposals | None) -> tuple[Any, list[int], list[Pass]]:
            sampling = Sampling(temperature=6.0, seed=3) if sampled else Sampling()
            with Watched(ScriptedSession(follow), capacity=capacity, reproducible=reproducible) as engine:
                request = engine.request(
                    prompt,
                    limit=limit,
                    stop=stop,
                    sampler=Sampler(sampling, VOCABULARY, prompt),
                    speculator=speculator,
                )
                stream = Stream(request.channel)
                engine.scheduler.submit(request)
                completion = stream.finish()
                engine.idle()
                (returned,) = engine.returned
                return completion, returned, engine.session.passes

        plain, held, _ = answer(None)
        fast, held_fast, made = answer(Proposals(prompt, propose))
        assert fast.pieces == plain.pieces
        assert fast.finish_reason == plain.finish_reason
        assert fast.usage == plain.usage
        # The last token is in no cache: it was never given to the model.
        assert held == held_fast == [*prompt, *plain.token_ids[:-1]]
        assert 0 <= fast.timings.accepted_tokens <= fast.timings.drafted_tokens
        if reproducible:
            first, *others = made
            assert first.tokens == {prompt[0]: len(prompt)}
            assert all(count > 1 for each in others for count in each.tokens.values())


class TestReproducible:
    def test_every_pass_has_two_rows_at_least_and_one_answer(self) -> None:
        with ScriptedEngine(reproducible=True) as engine:
            requests: list[Request] = [engine.request(prompt, limit=6) for prompt in (A, B, C)]
            streams = [Stream(request.channel) for request in requests]
            engine.scheduler.submit(*requests)
            assert [read(stream) for stream in streams] == [after(each, 6) for each in (A, B, C)]
            for each in engine.session.passes:
                assert len(each.tokens) == 1
                assert min(each.tokens.values()) > 1

    def test_an_answer_is_settled_as_it_is(self) -> None:
        with ScriptedEngine(reproducible=True) as engine:
            ids = engine.ids(A, limit=6)
            again = engine.stream([*A, *ids, 50], limit=1).finish()
            assert again.usage.cached_tokens == 8


class TestComputeTime:
    """Whose the engine's seconds are. The clock moves with the passes only: a second for each."""

    @pytest.fixture
    def engine(self) -> Iterator[tuple[ScriptedEngine, Clock]]:
        clock = Clock()

        def compute(each: Pass) -> None:
            clock.now_s += 1

        with ScriptedEngine(ScriptedSession(on_pass=compute), chunk=4) as engine:
            engine.scheduler._time = ComputeTime(clock)
            yield engine, clock

    @staticmethod
    def compute_s(*streams: Stream) -> list[float]:
        return [stream.completion.timings.compute_s for stream in streams]

    def test_of_an_answer_that_is_alone_is_all(self, engine: tuple[ScriptedEngine, Clock]) -> None:
        stream = engine[0].stream(range(50, 60), limit=5)
        read(stream)
        assert self.compute_s(stream) == [3 + 4]  # chunks of the prompt, and tokens behind the first
        assert engine[0].scheduler.busy_s == 7

    def test_of_answers_that_share_passes_adds_up(self, engine: tuple[ScriptedEngine, Clock]) -> None:
        requests = [engine[0].request(prompt, limit=4) for prompt in (A, B, C)]
        streams = [Stream(request.channel) for request in requests]
        engine[0].scheduler.submit(*requests)
        for stream in streams:
            read(stream)
        shares = self.compute_s(*streams)
        assert sum(shares) == pytest.approx(engine[0].scheduler.busy_s)
        assert len(engine[0].session.passes) < 12  # some were shared
        assert all(1 < share < 4 for share in shares)

    def test_of_sampling_is_that_requests(self, engine: tuple[ScriptedEngine, Clock]) -> None:
        clock = engine[1]

        class Slow(Sampler):
            def sample(self, logits: Any) -> Sampled:
                clock.now_s += 10
                return super().sample(logits)

        slow = engine[0].request(A, limit=3, sampler=Slow(Sampling(), VOCABULARY, ()))
        other = engine[0].request(B, limit=3)
        streams = [Stream(slow.channel), Stream(other.channel)]
        engine[0].scheduler.submit(slow, other)
        for stream in streams:
            read(stream)
        slow_s, other_s = self.compute_s(*streams)
        assert slow_s + other_s == engine[0].scheduler.busy_s
        assert slow_s > 30
        assert other_s <= 3

    def test_of_settling_and_of_calls_is_nobodys(self, engine: tuple[ScriptedEngine, Clock]) -> None:
        stream = engine[0].stream(A, limit=5, settle=True)
        read(stream)
        engine[0].idle()
        assert self.compute_s(stream) == [5]
        assert engine[0].scheduler.busy_s == 5 + 1

        def work(_: KVPool) -> None:
            engine[1].now_s += 3

        engine[0].scheduler.call(work).result(PATIENCE_S)
        engine[0].idle()
        assert engine[0].scheduler.busy_s == 5 + 1 + 3

    def test_of_a_pass_that_fails_counts(self) -> None:
        clock = Clock()

        def fail(each: Pass) -> None:
            clock.now_s += 2
            raise RuntimeError("broken")

        with ScriptedEngine(ScriptedSession(on_pass=fail)) as engine:
            engine.scheduler._time = ComputeTime(clock)
            stream = engine.stream(A)
            with pytest.raises(RuntimeError, match="broken"):
                read(stream)
            assert self.compute_s(stream) == [2]
            assert engine.scheduler.busy_s == 2
            engine.scheduler.close()
            assert engine.scheduler.busy_s == 2
