"""An answer's way from tokens to its reader, without an engine: the test says which tokens come, and when."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from helpers.scripted_session import TOKENIZER, read, wait_for
from helpers.tiny import END_OF_TEXT, IM_END, VOCABULARY, letters
from pocketlm import generate
from pocketlm.generate import READ_AHEAD, Answer, Channel, Completion, FinishReason, Piece, Stream, Usage
from pocketlm.sampling import Sampled, Sampler, Sampling
from pocketlm.stops import StopMatcher

A, B, C, D = letters()[:4]


def answer_of(
    *, stop: str | Sequence[str] = (), eos: Sequence[int] = (END_OF_TEXT, IM_END), limit: int = 100
) -> Answer:
    return Answer(TOKENIZER.stream(continues=True), StopMatcher(stop), eos, limit)


def complete(tokens: str | Sequence[int], *, last: int | None = None, **options: Any) -> Completion:
    """What a reader gets who reads it all; `last` is the place of a token that nothing can follow."""
    channel = Channel(3)
    stream = Stream(channel)
    answer = answer_of(**options)
    reason: FinishReason | None = None
    for place, token_id in enumerate(TOKENIZER.encode(tokens) if isinstance(tokens, str) else tokens):
        piece, reason = answer.add(Sampled(token_id, None, ()), last=place == last)
        channel.put(piece)
        if reason is not None:
            channel.end(reason)
            break
    assert reason is not None, "it does not end"
    pieces = list(stream)
    completion = stream.completion
    assert "".join(piece.text for piece in pieces) == completion.text
    assert tuple(piece.token_id for piece in pieces) == completion.token_ids
    assert completion.pieces == tuple(pieces)
    return completion


def put(channel: Channel, *texts: str) -> None:
    for number, text in enumerate(texts):
        channel.put(Piece(text, number))


class TestText:
    def test_ends_at_an_end_of_text(self) -> None:
        completion = complete([A, B, END_OF_TEXT, C])
        assert completion.text == "AB"
        assert completion.token_ids == (A, B, END_OF_TEXT)
        assert completion.finish_reason == "stop"
        assert completion.usage == Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=3)
        assert completion.usage.total_tokens == 6

    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_ends_at_the_limit(self, limit: int) -> None:
        completion = complete([A, B, C, D], limit=limit)
        assert (completion.text, completion.finish_reason) == ("ABC"[:limit], "length")

    def test_an_end_of_text_at_the_limit_is_a_stop(self) -> None:
        assert complete([A, B, END_OF_TEXT], limit=3).finish_reason == "stop"

    def test_without_ends_of_text_it_goes_on(self) -> None:
        completion = complete([A, END_OF_TEXT, B, IM_END], eos=(), limit=4)
        assert (completion.text, completion.finish_reason) == ("AB", "length")

    @pytest.mark.parametrize("limit", [2, 100])
    def test_ends_where_nothing_can_follow(self, limit: int) -> None:
        completion = complete([A, B, C], last=1, limit=limit, stop="BX")
        assert (completion.text, completion.finish_reason) == ("AB", "stop")

    @pytest.mark.parametrize("text", ["für 世界 👩‍🚀!", "the theory, therefore"])
    def test_pieces_are_whole_characters(self, text: str) -> None:
        ids = TOKENIZER.encode(text)
        pieces = [piece.text for piece in complete([*ids, END_OF_TEXT]).pieces]
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
        assert len(pieces) == len(ids) + 1

    def test_half_a_character_at_the_end_shows(self) -> None:
        ids = TOKENIZER.encode("A世")
        assert complete(ids[:-1], limit=len(ids) - 1).text == "A\ufffd"
        assert complete([*ids[:-1], END_OF_TEXT]).text == "A\ufffd"
        assert complete(ids[:-1], last=len(ids) - 2).text == "A\ufffd"

    def test_logprobs_are_those_of_the_sampler(self) -> None:
        logits = np.zeros(VOCABULARY, np.float32)
        logits[A] = 9.0
        expected = 9 - np.log(np.exp(9) + VOCABULARY - 1)
        piece, _ = answer_of().add(Sampler(Sampling(), VOCABULARY, (), top_logprobs=1).sample(logits))
        assert piece.logprob == pytest.approx(expected, abs=1e-5)
        assert piece.top_logprobs == ((A, pytest.approx(expected, abs=1e-5)),)
        piece, _ = answer_of().add(Sampler(Sampling(), VOCABULARY, ()).sample(logits))
        assert (piece.logprob, piece.top_logprobs) == (None, ())


class TestStops:
    @pytest.mark.parametrize(
        ("answer", "stop", "text", "tokens"),
        [
            ("ABCDE", "C", "AB", 3),
            ("ABCDE", "BCD", "A", 4),  # across three tokens
            ("ABCDE", ["XX", "DE", "D"], "ABC", 4),
            ("ABABC", "ABC", "AB", 5),
            ("Athe theory", "he", "At", 2),  # inside a token: "the" is one
            ("A世界B", "世界", "A", 7),
        ],
    )
    def test_the_text_ends_before_it(
        self, answer: str, stop: str | Sequence[str], text: str, tokens: int
    ) -> None:
        completion = complete(answer, stop=stop)
        assert (completion.text, completion.finish_reason) == (text, "stop")
        assert completion.usage.completion_tokens == tokens

    def test_only_what_may_be_one_is_held_back(self) -> None:
        completion = complete("ABCXABCD", stop="ABCD")
        assert [piece.text for piece in completion.pieces] == ["", "", "", "ABCX", "", "", "", ""]
        assert completion.text == "ABCX"

    @pytest.mark.parametrize("end", ["limit", "eos"])
    def test_what_is_held_back_comes_at_the_end(self, end: str) -> None:
        ids = [A, B, C]
        completion = (
            complete(ids, stop="BCD", limit=3)
            if end == "limit"
            else complete([*ids, END_OF_TEXT], stop="BCD")
        )
        assert completion.text == "ABC"
        assert completion.finish_reason == {"limit": "length", "eos": "stop"}[end]

    def test_a_stop_string_at_the_limit_is_a_stop(self) -> None:
        completion = complete([A, B], stop="B", limit=2)
        assert (completion.text, completion.finish_reason) == ("A", "stop")

    def test_half_a_character_can_complete_a_stop_string(self) -> None:
        ids = TOKENIZER.encode("A世")[:-1]
        completion = complete(ids, stop="\ufffd", limit=len(ids))
        assert (completion.text, completion.finish_reason) == ("A", "stop")


class TestTimings:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """Its one item is the time."""
        now = [100.0]
        monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
        return now

    def test_are_the_engines_and_not_the_readers(self, clock: list[float]) -> None:
        channel = Channel(prompt_tokens=7)
        stream = Stream(channel)
        clock[0] += 2
        channel.begun_at = clock[0]
        channel.cached_tokens, channel.prefill_s, channel.compute_s = 2, 4.0, 6.0
        clock[0] += 5
        put(channel, "A")
        for _ in range(3):
            clock[0] += 0.5
            put(channel, "B")
        channel.end("stop")
        clock[0] += 50
        for _ in stream:
            clock[0] += 100
        timings = stream.completion.timings
        assert (timings.queue_s, timings.prefill_s, timings.ttft_s) == (2, 4, 7)
        assert (timings.decode_s, timings.total_s) == (1.5, 8.5)
        assert timings.compute_s == 6
        assert timings.prefill_tokens_per_s == 5 / 4
        assert timings.decode_tokens_per_s == 3 / 1.5

    def test_rates_are_none_where_there_is_nothing_to_rate(self, clock: list[float]) -> None:
        channel = Channel(3)
        stream = Stream(channel)
        timings = stream.completion.timings
        assert (timings.prefill_tokens_per_s, timings.decode_tokens_per_s) == (None, None)
        assert (timings.queue_s, timings.ttft_s, timings.total_s) == (0, 0, 0)
        channel.prefill_s = 0.5
        clock[0] += 1
        put(channel, "A")
        next(stream)
        timings = stream.completion.timings
        assert (timings.prefill_tokens_per_s, timings.decode_tokens_per_s) == (6, None)

    def test_what_was_not_read_does_not_count(self, clock: list[float]) -> None:
        channel = Channel(3)
        stream = Stream(channel, dropped_messages=2)
        for text in "ABC":
            clock[0] += 1
            put(channel, text)
        next(stream), next(stream)
        stream.close()
        completion = stream.completion
        assert completion.usage == Usage(3, 0, 2, dropped_messages=2)
        assert (completion.timings.ttft_s, completion.timings.total_s) == (1, 2)


class TestChannel:
    def test_is_full_where_the_reader_is_far_behind_and_wakes_the_engine_later(self) -> None:
        channel = Channel(3)
        woken: list[int] = []
        for number in range(READ_AHEAD):
            assert not channel.pause_if_full()
            channel.put(Piece("", number))
        channel.wake = lambda: woken.append(1)
        assert channel.pause_if_full()
        while not woken:
            assert channel.paused
            channel.get()
        assert not channel.paused
        assert channel.ready
        assert not channel.pause_if_full()

    def test_a_reader_who_makes_room_during_the_look_is_seen(self) -> None:
        channel = Channel(3)
        woken: list[int] = []
        channel.wake = lambda: woken.append(1)
        items = channel._items
        for number in range(READ_AHEAD):
            channel.put(Piece("", number))

        class Meanwhile:
            """A queue whose reader comes right behind the look at it."""

            def qsize(self) -> int:
                size = items.qsize()
                channel._items = items
                while not items.empty():
                    channel.get()
                return size

        channel._items = Meanwhile()  # type: ignore[assignment]
        channel.pause_if_full()
        assert woken
        assert not channel.paused

    def test_tells_of_each_item(self) -> None:
        channel = Channel(3)
        told: list[int] = []
        channel.on_item = lambda: told.append(1)
        put(channel, "A", "B")
        channel.end("stop")
        assert len(told) == 3
        assert channel.ready


class Ends:
    """Counts calls and keeps what the completion was then, not the stream."""

    def __init__(self) -> None:
        self.completions: list[Completion] = []

    def __call__(self, stream: Stream) -> None:
        self.completions.append(stream.completion)


def stream_of(*texts: str, reason: FinishReason | None = "stop") -> tuple[Stream, Channel, Ends]:
    channel, ends = Channel(3), Ends()
    put(channel, *texts)
    if reason is not None:
        channel.end(reason)
    return Stream(channel, ends), channel, ends


class TestEnd:
    def test_of_itself(self) -> None:
        stream, channel, ends = stream_of("A", "B")
        assert next(stream).text == "A"
        assert not ends.completions
        assert stream.completion.finish_reason == "cancelled"
        assert [piece.text for piece in stream] == ["B"]
        stream.close()
        assert [each.finish_reason for each in ends.completions] == ["stop"]
        assert list(stream) == []
        assert not channel.cancelled

    @pytest.mark.parametrize("reason", ["stop", "length", "timeout", "cancelled"])
    def test_the_engine_says_why(self, reason: FinishReason) -> None:
        stream, _, _ = stream_of("A", reason=reason)
        assert stream.finish().finish_reason == reason

    def test_closed_early_it_keeps_the_partial_text(self) -> None:
        stream, channel, ends = stream_of("A", "B", "C")
        woken: list[bool] = []
        channel.wake = lambda: woken.append(channel.cancelled)
        next(stream), next(stream)
        stream.close()
        stream.close()
        assert woken == [True]
        assert [each.text for each in ends.completions] == ["AB"]
        assert stream.completion == ends.completions[0]
        assert stream.completion.finish_reason == "cancelled"
        assert stream.completion.token_ids == (0, 1)
        assert list(stream) == []

    def test_never_read(self) -> None:
        stream, _, ends = stream_of("A")
        stream.close()
        assert [(each.text, each.token_ids) for each in ends.completions] == [("", ())]

    def test_as_a_context(self) -> None:
        stream, channel, ends = stream_of("A", "B")
        with stream:
            next(stream)
            assert not ends.completions
        assert len(ends.completions) == 1
        assert channel.cancelled

    def test_finish_reads_the_rest(self) -> None:
        stream, channel, ends = stream_of("A", "B", "C")
        next(stream)
        assert stream.finish().text == "ABC"
        assert not channel.cancelled
        assert len(ends.completions) == 1

    @pytest.mark.parametrize("started", [False, True])
    def test_dropped_it_ends_at_once(self, started: bool) -> None:
        gc.disable()
        try:
            stream, channel, ends = stream_of("A", "B")
            if started:
                next(stream)
            del stream
            assert channel.cancelled
            assert len(ends.completions) == 1
        finally:
            gc.enable()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("pieces", [0, 2])
    def test_an_error_ends_it_and_is_passed_on(self, error: type[BaseException], pieces: int) -> None:
        stream, channel, ends = stream_of(*"AB"[:pieces], reason=None)
        channel.end("cancelled", error("stop"))
        for _ in range(pieces):
            next(stream)
        with pytest.raises(error, match="stop"):
            next(stream)
        assert [each.text for each in ends.completions] == ["AB"[:pieces]]
        assert stream.completion.finish_reason == "cancelled"
        assert list(stream) == []
        assert len(ends.completions) == 1

    def test_closed_while_another_thread_waits_for_it(self) -> None:
        stream, channel, ends = stream_of("A", reason=None)
        first = threading.Event()
        channel.on_item = first.set
        assert next(stream).text == "A"
        found: list[list[int]] = []
        reader = threading.Thread(target=lambda: found.append(read(stream)), daemon=True)
        reader.start()
        stream.close()
        wait_for(reader)
        assert found == [[]]
        assert len(ends.completions) == 1

    def test_readers_all_come_to_the_end(self) -> None:
        stream, channel, ends = stream_of(reason=None)
        readers = [threading.Thread(target=lambda: list(stream), daemon=True) for _ in range(3)]
        for reader in readers:
            reader.start()
        channel.end("stop")
        for reader in readers:
            wait_for(reader)
        assert [each.finish_reason for each in ends.completions] == ["stop"]

    def test_closed_by_many_threads_it_ends_once(self) -> None:
        for _ in range(20):
            stream, _, ends = stream_of("A", reason=None)
            closers = [threading.Thread(target=stream.close) for _ in range(4)]
            for closer in closers:
                closer.start()
            for closer in closers:
                wait_for(closer)
            assert len(ends.completions) == 1

    def test_what_it_belongs_to_stays_as_long_as_it_does(self) -> None:
        class Owner:
            pass

        owner = Owner()
        alive = weakref.ref(owner)
        stream = Stream(Channel(3), owner=owner)
        del owner
        assert alive() is not None
        stream.close()
        del stream
        assert alive() is None
