"""The layers of generation, on a session that says what it is told to."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from helpers.tiny import END_OF_TEXT, IM_END, VOCABULARY, Array, letters, tokenizer_json
from pocketlm import generate
from pocketlm.generate import Completion, Stream, Usage, generate_tokens, prefill, rewind
from pocketlm.kv_cache import KVCache
from pocketlm.manifest import Dimensions, Tokens
from pocketlm.sampling import Sampler, Sampling
from pocketlm.stops import StopMatcher
from pocketlm.tokenizer import Tokenizer

DIMENSIONS = Dimensions(1, 8, 16, 2, 1, 4, VOCABULARY, 2048)
TOKENIZER = Tokenizer(tokenizer_json(), None, Tokens(None, (END_OF_TEXT,), False))
A, B, C, D = letters()[:4]
PROMPT = [A, B, C]


class Script:
    """Stands in for a Session: behind a prompt of `skip` tokens it wants those of `answer`, one by one."""

    def __init__(self, answer: Sequence[int], *, skip: int = len(PROMPT)) -> None:
        self.answer = list(answer)
        self.skip = skip
        self.passes: list[int] = []  # tokens in each
        self.error: BaseException | None = None
        self.on_pass: Callable[[int], None] = lambda tokens: None

    def forward(self, ids: Sequence[int], cache: KVCache, rows: Sequence[int] | None = None) -> Array:
        self.passes.append(len(ids))
        self.on_pass(len(ids))
        if self.error is not None:
            raise self.error
        cache.append(ids)
        logits = np.zeros((1, VOCABULARY), np.float32)
        logits[0, self.answer[len(cache) - self.skip]] = 9.0
        return logits


def sampler() -> Sampler:
    return Sampler(Sampling(), VOCABULARY, ())


def cache_of(ids: Sequence[int]) -> KVCache:
    cache = KVCache(DIMENSIONS, 2048)
    cache.append(ids)
    cache.settled = len(ids)
    return cache


def stream_of(
    answer: str | Sequence[int],
    *,
    stop: str | Sequence[str] = (),
    eos: Sequence[int] = (END_OF_TEXT, IM_END),
    limit: int = 100,
    cached: Sequence[int] = (),
    settle: bool = False,
    session: Any = None,
    on_end: Callable[[Stream], None] = lambda stream: None,
) -> Stream:
    ids = TOKENIZER.encode(answer) if isinstance(answer, str) else answer
    return Stream(
        session or Script(ids),
        cache_of(cached),
        PROMPT,
        sampler(),
        TOKENIZER.stream(continues=True),
        StopMatcher(stop),
        eos=eos,
        limit=limit,
        settle=settle,
        on_end=on_end,
    )


def complete(answer: str | Sequence[int], **options: Any) -> Completion:
    stream = stream_of(answer, **options)
    pieces = list(stream)
    completion = stream.completion
    assert "".join(piece.text for piece in pieces) == completion.text
    assert tuple(piece.token_id for piece in pieces) == completion.token_ids
    return completion


class TestRewind:
    @pytest.mark.parametrize(
        ("cached", "ids", "kept"),
        [
            ([], [1, 2], 0),
            ([1, 2, 3], [1, 2, 9, 9], 2),
            ([1, 2, 3], [1, 2, 3, 4, 5], 3),
            ([1, 2, 3], [1, 2, 3, 4], 2),  # no token is to be computed alone
            ([1, 2, 3], [1, 2, 3], 1),  # and the last one's logits have to be
            ([1, 2, 3], [1, 2], 0),
            ([1, 2, 3], [1], 0),
            ([9], [1, 2], 0),
        ],
    )
    def test_keeps_what_is_common(self, cached: list[int], ids: list[int], kept: int) -> None:
        cache = cache_of(cached)
        assert rewind(cache, ids) == kept
        assert cache.ids == ids[:kept]


class TestPrefill:
    @pytest.mark.parametrize(
        ("cached", "chunk", "passes"),
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
    def test_computes_only_what_lacks(self, cached: int, chunk: int, passes: list[int]) -> None:
        ids = list(range(10))
        session, cache = Script([A] * 10 + [B], skip=0), cache_of(ids[:cached])
        logits = prefill(session, cache, ids, chunk)  # type: ignore[arg-type]
        assert session.passes == passes
        assert cache.ids == ids
        assert logits.shape == (VOCABULARY,)
        assert logits.argmax() == B


class TestGenerateTokens:
    def tokens(self, session: Script, *, limit: int = 100) -> list[int]:
        first = np.zeros(VOCABULARY, np.float32)
        first[session.answer[0]] = 9.0
        tokens = generate_tokens(
            session,  # type: ignore[arg-type]
            cache_of(PROMPT),
            first,
            sampler(),
            eos={D},
            limit=limit,
        )
        return [token_id for token_id, _ in tokens]

    def test_an_end_of_text_is_the_last(self) -> None:
        session = Script([A, B, D, C])
        assert self.tokens(session) == [A, B, D]
        assert session.passes == [1, 1]  # nothing is computed behind the last token

    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_at_most_limit(self, limit: int) -> None:
        session = Script([A, B, C, D])
        assert self.tokens(session, limit=limit) == [A, B, C][:limit]
        assert session.passes == [1] * (limit - 1)


class TestText:
    def test_ends_at_an_end_of_text(self) -> None:
        completion = complete([A, B, END_OF_TEXT, C])
        assert completion.text == "AB"
        assert completion.token_ids == (A, B, END_OF_TEXT)
        assert completion.finish_reason == "stop"
        assert completion.usage == Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=3)
        assert completion.usage.total_tokens == 6

    def test_ends_at_the_limit(self) -> None:
        completion = complete([A, B, C, D], limit=3)
        assert (completion.text, completion.finish_reason) == ("ABC", "length")

    def test_an_end_of_text_at_the_limit_is_a_stop(self) -> None:
        assert complete([A, B, END_OF_TEXT], limit=3).finish_reason == "stop"

    def test_without_ends_of_text_it_goes_on(self) -> None:
        completion = complete([A, END_OF_TEXT, B, IM_END], eos=(), limit=4)
        assert (completion.text, completion.finish_reason) == ("AB", "length")

    @pytest.mark.parametrize("text", ["für 世界 👩‍🚀!", "the theory, therefore"])
    def test_pieces_are_whole_characters(self, text: str) -> None:
        ids = TOKENIZER.encode(text)
        stream = stream_of([*ids, END_OF_TEXT])
        pieces = [piece.text for piece in stream]
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
        assert len(pieces) == len(ids) + 1

    def test_half_a_character_at_the_end_shows(self) -> None:
        ids = TOKENIZER.encode("A世")
        assert complete(ids[:-1], limit=len(ids) - 1).text == "A\ufffd"
        assert complete([*ids[:-1], END_OF_TEXT]).text == "A\ufffd"

    def test_logprobs_are_the_models_own(self) -> None:
        (piece,) = list(stream_of([A], limit=1))
        assert piece.logprob == pytest.approx(9 - np.log(np.exp(9) + VOCABULARY - 1), abs=1e-5)


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
            ("ABCDE", "A", "", 1),
        ],
    )
    def test_the_text_ends_before_a_stop_string(
        self, answer: str, stop: str | list[str], text: str, tokens: int
    ) -> None:
        completion = complete(answer, stop=stop)
        assert completion.text == text
        assert completion.finish_reason == "stop"
        assert completion.usage.completion_tokens == tokens

    def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(self) -> None:
        stream = stream_of("ABCXABCD", stop="ABCD")
        assert [piece.text for piece in stream] == ["", "", "", "ABCX", "", "", "", ""]
        assert stream.completion.text == "ABCX"

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


class TestCachedTokens:
    @pytest.mark.parametrize(
        ("cached", "count"), [([], 0), (PROMPT[:1], 1), ([*PROMPT, D], 1), ([A, D, D], 1)]
    )
    def test_only_the_rest_is_computed(self, cached: list[int], count: int) -> None:
        session = Script([D, END_OF_TEXT])
        completion = complete([], session=session, cached=cached)
        assert completion.usage.cached_tokens == count
        assert session.passes == [3 - count, 1]


class TestSettling:
    """An answer that something will follow is computed again, as a prompt."""

    answer = (D, A, END_OF_TEXT)

    def test_when_it_is_complete(self) -> None:
        session = Script([*self.answer, A])
        settled: list[int] = []
        stream = stream_of(
            [], session=session, settle=True, on_end=lambda stream: settled.append(stream.cache.settled)
        )
        assert [piece.token_id for piece in stream] == list(self.answer)
        assert session.passes == [3, 1, 1, 3]
        assert stream.cache.ids == [*PROMPT, *self.answer]
        assert settled == [6]

    def test_not_when_it_is_cancelled(self) -> None:
        session = Script([*self.answer, A])
        stream = stream_of([], session=session, settle=True)
        next(stream), next(stream)
        stream.close()
        assert session.passes == [3, 1]
        assert stream.cache.settled == 3

    def test_not_when_nothing_follows(self) -> None:
        session = Script([*self.answer, A])
        stream = stream_of([], session=session)
        assert len(list(stream)) == 3
        assert session.passes == [3, 1, 1]
        assert stream.cache.settled == 3


class TestTimings:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """Its one item is the time."""
        now = [0.0]
        monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
        return now

    def test_clocks_stand_still_while_the_caller_holds_a_piece(self, clock: list[float]) -> None:
        session = Script([A, B, C, END_OF_TEXT, A])

        def work(tokens: int) -> None:
            clock[0] += 2.0 * tokens if tokens > 1 else 0.5

        session.on_pass = work
        stream = stream_of([], session=session, cached=PROMPT[:1], settle=True)
        clock[0] += 50
        for _ in stream:
            clock[0] += 100
        timings = stream.completion.timings
        assert timings.prefill_s == timings.ttft_s == 4.0
        assert timings.decode_s == 1.5
        assert timings.total_s == 5.5
        assert timings.prefill_tokens_per_s == 2 / 4.0
        assert timings.decode_tokens_per_s == 3 / 1.5

    def test_rates_are_none_where_there_is_nothing_to_rate(self) -> None:
        stream = stream_of([A, B])
        assert stream.completion.timings.prefill_tokens_per_s is None
        assert stream.completion.timings.decode_tokens_per_s is None
        next(stream)
        assert stream.completion.timings.prefill_tokens_per_s is not None
        assert stream.completion.timings.decode_tokens_per_s is None
        stream.close()


class Ends:
    """Counts calls and keeps what the completion was then, not the stream."""

    def __init__(self) -> None:
        self.completions: list[Completion] = []

    def __call__(self, stream: Stream) -> None:
        self.completions.append(stream.completion)


class TestEnd:
    def test_of_itself(self) -> None:
        ends = Ends()
        stream = stream_of([A, B, END_OF_TEXT], on_end=ends)
        assert next(stream).text == "A"
        assert not ends.completions
        assert stream.completion.finish_reason == "cancelled"
        list(stream)
        stream.close()
        assert [each.finish_reason for each in ends.completions] == ["stop"]
        assert list(stream) == []

    def test_closed_early_it_keeps_the_partial_text(self) -> None:
        ends = Ends()
        stream = stream_of([A, B, C], on_end=ends)
        next(stream), next(stream)
        stream.close()
        stream.close()
        assert [each.text for each in ends.completions] == ["AB"]
        assert stream.completion == ends.completions[0]
        assert stream.completion.finish_reason == "cancelled"
        assert stream.completion.token_ids == (A, B)
        assert list(stream) == []

    def test_never_started(self) -> None:
        ends = Ends()
        session = Script([A])
        stream_of([], session=session, on_end=ends).close()
        assert session.passes == []
        assert [(each.text, each.token_ids) for each in ends.completions] == [("", ())]

    def test_closed_behind_the_last_piece_it_is_whole(self) -> None:
        stream = stream_of([A, END_OF_TEXT])
        next(stream), next(stream)
        stream.close()
        assert stream.completion.finish_reason == "stop"

    def test_as_a_context(self) -> None:
        ends = Ends()
        with stream_of([A, B, C], on_end=ends) as stream:
            next(stream)
            assert not ends.completions
        assert len(ends.completions) == 1

    @pytest.mark.parametrize("started", [False, True])
    def test_dropped_it_ends_at_once(self, started: bool) -> None:
        ends = Ends()
        gc.disable()
        try:
            stream = stream_of([A, B, C], on_end=ends)
            if started:
                next(stream)
            del stream
            assert len(ends.completions) == 1
        finally:
            gc.enable()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("pieces", [0, 2])
    def test_an_error_ends_it_and_is_passed_on(self, error: type[BaseException], pieces: int) -> None:
        ends = Ends()
        session = Script([A, B, C, D])
        stream = stream_of([], session=session, on_end=ends)
        for _ in range(pieces):
            next(stream)
        session.error = error("stop")
        with pytest.raises(error, match="stop"):
            next(stream)
        assert [each.text for each in ends.completions] == ["AB"[:pieces]]
        assert stream.completion.finish_reason == "cancelled"
        assert list(stream) == []
        assert len(ends.completions) == 1

    def test_used_by_two_at_once_it_refuses_and_goes_on(self) -> None:
        ends = Ends()
        session = Script([A, B, END_OF_TEXT])
        stream = stream_of([], session=session, on_end=ends)
        refused: list[str] = []

        def meddle(tokens: int) -> None:
            session.on_pass = lambda tokens: None
            for call in (stream.close, lambda: next(stream)):
                with pytest.raises(ValueError, match="already executing") as caught:
                    call()
                refused.append(str(caught.value))

        session.on_pass = meddle
        assert [piece.text for piece in stream] == ["A", "B", ""]
        assert len(refused) == 2
        assert len(ends.completions) == 1
