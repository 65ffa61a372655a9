"""Answers of a tiny random model: what comes out, what is refused, who may share a model."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import pocketlm
from helpers.checkpoints import PIECES
from helpers.checkpoints import tokenizer_json as sentencepiece_json
from helpers.scripted_session import read, wait_for
from helpers.tiny import (
    END_OF_TEXT,
    IM_END,
    VOCABULARY,
    letters,
    only,
    random_ids,
    tiny_bundle,
    tiny_checkpoint,
    write_folder,
)
from pocketlm.bundle import open_bundle
from pocketlm.engine import Model
from pocketlm.errors import ContextOverflowError, InvalidSettingError, PocketlmError, PromptError
from pocketlm.generate import Completion, Stream
from pocketlm.kv_pool import KVPool
from pocketlm.manifest import Tokens
from pocketlm.scheduler import QueueFullError
from pocketlm.session import Session
from pocketlm.tokenizer import Message
from pocketlm_exporters.export import export

LETTERS = only(letters())
PROMPT = random_ids(20, seed=5)


def facts(completion: Completion) -> tuple[Any, ...]:
    """All but the timings and what was cached."""
    return completion.text, completion.token_ids, completion.finish_reason, completion.usage.prompt_tokens


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    source = write_folder(folder / "checkpoint", tiny_checkpoint())
    (source.path / "chat_template.jinja").unlink()
    export(source, folder / "bundle", precision="fp32")
    return folder / "bundle"


class TestAnswers:
    def test_greedy_is_the_most_likely_token_each_time(self, model: Model) -> None:
        pieces = list(model.stream(PROMPT, max_tokens=12, ignore_eos=True, logprobs=True))
        ids = list(PROMPT)
        for piece in pieces:
            logits = model.logits(ids)[-1].astype(np.float64)
            assert piece.token_id == logits.argmax()
            assert piece.logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), abs=1e-4)
            ids.append(piece.token_id)
        assert len(pieces) == 12
        assert len({piece.token_id for piece in pieces}) > 3  # no model that always says the same

    def test_the_engines_time_is_its_answers(self, int8_bundle: Path) -> None:
        with Model(open_bundle(int8_bundle)) as model:
            assert model.busy_s == 0
            answers = [stream.finish() for stream in model.streams(PROMPT, 3, max_tokens=5, ignore_eos=True)]
            busy_s = model.busy_s
        times = [answer.timings.compute_s for answer in answers]
        assert min(times) > 0
        assert sum(times) == pytest.approx(busy_s)
        assert model.busy_s == pytest.approx(busy_s)

    def test_generate_is_what_the_stream_comes_to(self, model: Model) -> None:
        stream = model.stream(PROMPT, max_tokens=9, logit_bias=LETTERS)
        pieces = list(stream)
        completion = model.generate(PROMPT, max_tokens=9, logit_bias=LETTERS)
        assert facts(completion) == facts(stream.completion)
        assert completion.text == "".join(piece.text for piece in pieces)
        assert completion.text == model.tokenizer.decode(completion.token_ids)
        assert len(completion.text) == 9
        assert completion.finish_reason == "length"

    @pytest.mark.parametrize("eos", [END_OF_TEXT, IM_END])
    def test_an_end_of_text_ends_it(self, model: Model, eos: int) -> None:
        completion = model.generate(PROMPT, logit_bias={eos: 1e4})
        assert facts(completion) == ("", (eos,), "stop", 20)

    def test_ignoring_the_end_of_text(self, model: Model) -> None:
        completion = model.generate(PROMPT, logit_bias={IM_END: 1e4}, ignore_eos=True, max_tokens=5)
        assert facts(completion) == ("", (IM_END,) * 5, "length", 20)

    def test_a_prompt_is_computed_anew_on_request(self, model: Model) -> None:
        first = model.generate(PROMPT, max_tokens=5)
        again = model.generate(PROMPT, max_tokens=5, cache_prompt=False)
        assert again.usage.cached_tokens == 0
        assert facts(again) == facts(first)
        assert model.generate(PROMPT, max_tokens=5).usage.cached_tokens == len(PROMPT) - 2

    def test_it_ends_where_the_context_is_full(self, int8_bundle: Path) -> None:
        with pocketlm.load(int8_bundle, context_length=32) as model:
            assert model.context_length == 32
            completion = model.generate(PROMPT, logit_bias=LETTERS)
            assert completion.finish_reason == "length"
            assert completion.usage.total_tokens == 32
            assert model.generate(PROMPT, max_tokens=500, logit_bias=LETTERS).usage.total_tokens == 32
            assert model.generate([*PROMPT, *PROMPT[:11]], logit_bias=LETTERS).usage.completion_tokens == 1

    def test_it_ends_where_the_trained_context_is_full(self, model: Model) -> None:
        completion = model.generate(random_ids(505), logit_bias=LETTERS)
        assert completion.usage.total_tokens == 512
        # The last token was computed like any other.
        ids = [*random_ids(505), *completion.token_ids]
        biased = model.logits(ids[:-1])[-1].copy()
        biased[list(LETTERS)] = -np.inf
        assert biased.argmax() == ids[-1]

    def test_stop_strings_across_token_borders(self, model: Model) -> None:
        whole = model.generate(PROMPT, max_tokens=30, logit_bias=LETTERS).text
        stop = whole[10:13]
        begin = whole.index(stop)
        for stops in (stop, [stop], ["no such", stop]):
            completion = model.generate(PROMPT, max_tokens=30, logit_bias=LETTERS, stop=stops)
            assert completion.text == whole[:begin]
            assert completion.finish_reason == "stop"
            assert completion.usage.completion_tokens == begin + 3

    def test_a_seed_gives_the_same_answer_again(self, model: Model, int8_bundle: Path) -> None:
        settings: dict[str, Any] = {
            "temperature": 1.5,
            "top_p": 0.95,
            "max_tokens": 20,
            "logit_bias": LETTERS,
        }
        first = model.generate(PROMPT, seed=1, **settings)
        again = model.generate(PROMPT, seed=1, **settings)
        assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 18)
        assert facts(again) == facts(first)
        with pocketlm.load(int8_bundle, threads=2) as other:
            assert facts(other.generate(PROMPT, seed=1, **settings)) == facts(first)
        assert len({model.generate(PROMPT, seed=seed, **settings).text for seed in range(5)}) == 5

    def test_settings_reach_the_sampler(self, model: Model) -> None:
        once = model.generate(PROMPT, max_tokens=26, logit_bias=LETTERS, presence_penalty=1e3)
        assert sorted(once.token_ids) == sorted(letters())
        assert len(set(model.generate(PROMPT, max_tokens=26, logit_bias=LETTERS).token_ids)) < 26


def test_an_answer_goes_on_from_the_prompt_with_its_first_space(tmp_path: Path) -> None:
    """Tokenizers of sentencepiece's kind take the first space of a text away."""
    spaced = PIECES.index("▁a")
    checkpoint = dataclasses.replace(
        tiny_checkpoint(eos_token_id=2), tokenizer_json=sentencepiece_json(), chat_template=None
    )
    with pocketlm.load(tiny_bundle(tmp_path, "fp32", checkpoint=checkpoint)) as model:
        assert model.generate("ab", max_tokens=2, logit_bias={spaced: 1e4}).text == " a a"


def test_a_model_that_never_ends_an_answer(int8_bundle: Path) -> None:
    bundle = open_bundle(int8_bundle)
    endless = dataclasses.replace(bundle.manifest, tokens=Tokens(None, (), False))
    with Model(dataclasses.replace(bundle, manifest=endless), threads=1) as model:
        assert model.generate(PROMPT, max_tokens=3).finish_reason == "length"
        with pytest.raises(InvalidSettingError, match="a model that can end its answer"):
            model.generate(PROMPT, regex="a")


class TestPrompts:
    def test_a_text_goes_through_the_template(self, model: Model) -> None:
        messages = [Message(role="system", content="Be brief."), Message(role="user", content="Hello")]
        rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert model.encode("Hello") == model.tokenizer.encode(rendered)
        assert model.encode("Hello", system="Be brief.") == model.encode(messages)
        assert model.encode([messages[1]], system="Be brief.") == model.encode(messages)
        assert model.encode("Hello") == model.encode([messages[1]])

    def test_raw_text_is_continued_as_it_is(self, model: Model, plain_bundle: Path) -> None:
        assert model.encode("Hello", raw=True) == model.tokenizer.encode("Hello")
        with pocketlm.load(plain_bundle) as plain:
            assert plain.encode("Hello") == plain.tokenizer.encode("Hello")
            with pytest.raises(PromptError, match="system message needs the chat template"):
                plain.encode("Hello", system="Be brief.")
            with pytest.raises(PromptError, match="no chat template"):
                plain.encode([Message(role="user", content="Hello")])

    @pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6]), [np.int64(5), 6]], ids=str)
    def test_token_ids_are_taken_as_they_are(self, model: Model, ids: Any) -> None:
        assert model.encode(ids) == [5, 6]
        assert all(type(each) is int for each in model.encode(ids))
        assert model.logits(ids).shape == (2, VOCABULARY)

    @pytest.mark.parametrize(("prompt", "raw"), [("Hello", True), ([5, 6], False)])
    def test_no_system_message_is_dropped_silently(self, model: Model, prompt: Any, raw: bool) -> None:
        with pytest.raises(PromptError, match="A system message needs the chat template"):
            model.generate(prompt, system="Be brief.", raw=raw)

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "prompt is empty"),
            ([5, VOCABULARY], f"token id {VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
            ([-1], "token id -1 is outside"),
            ([{"role": "user"}], "message 0"),
            ([5, {"role": "user", "content": "x"}], "message 0 is 5"),
            ("a lone \ud800", "surrogate"),
        ],
    )
    def test_what_is_no_prompt(self, model: Model, prompt: Any, message: str) -> None:
        with pytest.raises(PromptError, match=message):
            model.generate(prompt)

    def test_an_empty_raw_text(self, model: Model) -> None:
        with pytest.raises(PromptError, match="prompt is empty"):
            model.generate("", raw=True)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_tokens": 0}, "max_tokens is 0; a whole number from 1 on"),
            ({"max_tokens": -5}, "max_tokens is -5"),
            ({"max_tokens": 2.5}, "max_tokens is 2.5"),
            ({"temperature": math.nan}, "temperature is nan"),
            ({"top_p": 2}, "top_p is 2"),
            ({"logit_bias": {VOCABULARY: 1.0}}, f"names token {VOCABULARY}"),
            ({"seed": -1}, "seed is -1"),
            ({"stop": ""}, "stop has '' in it"),
            ({"stop": ["a", ""]}, "stop has '' in it"),
        ],
    )
    def test_out_of_range(self, model: Model, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidSettingError, match=message):
            model.stream(PROMPT, **settings)

    def test_unknown(self, model: Model) -> None:
        with pytest.raises(InvalidSettingError, match=r"no setting 'temprature'.*temperature"):
            model.stream(PROMPT, temprature=1)  # type: ignore[call-arg]

    @pytest.mark.parametrize("length", [1, 0, -1, 513])
    def test_a_context_length_that_cannot_be(self, int8_bundle: Path, length: int) -> None:
        with pytest.raises(
            InvalidSettingError, match=rf"context_length is {length}; tiny was trained for 512"
        ):
            pocketlm.load(int8_bundle, context_length=length)

    def test_a_number_of_threads_that_cannot_be(self, int8_bundle: Path) -> None:
        with pytest.raises(InvalidSettingError, match="number of threads is 0"):
            pocketlm.load(int8_bundle, threads=0)

    def test_a_long_context_is_only_used_if_it_is_asked_for(self, tmp_path: Path) -> None:
        checkpoint = tiny_checkpoint(num_hidden_layers=1, max_position_embeddings=10_000)
        bundle = tiny_bundle(tmp_path, "fp32", checkpoint=checkpoint)
        with pocketlm.load(bundle) as model:
            assert model.context_length == 8192
        with pocketlm.load(str(bundle), context_length=10_000) as model:
            assert model.context_length == 10_000
            assert model.load_s > 0
            assert (model.name, model.manifest.name) == ("tiny", "tiny")


class TestOverflow:
    @pytest.mark.parametrize("count", [512, 513, 600])
    def test_says_both_numbers(self, model: Model, count: int) -> None:
        with pytest.raises(ContextOverflowError, match=rf"{count} tokens.* holds 512") as caught:
            model.stream([5] * count)
        assert (caught.value.prompt_tokens, caught.value.context_length) == (count, 512)

    def test_of_logits(self, model: Model) -> None:
        assert model.logits([5] * 512).shape == (512, VOCABULARY)
        with pytest.raises(ContextOverflowError, match=r"513 tokens.* holds 512"):
            model.logits([5] * 513)


class TestLogits:
    def test_are_behind_each_token(self, model: Model) -> None:
        ids = random_ids(300)
        logits = model.logits(ids)
        assert (logits.shape, logits.dtype) == ((300, VOCABULARY), np.float32)
        for count in (1, 2, 128, 129, 130, 257, 300):
            assert (model.logits(ids[:count])[-1] == logits[count - 1]).all()

    @pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([VOCABULARY], "outside the vocabulary")])
    def test_refuse_bad_ids(self, model: Model, ids: list[int], message: str) -> None:
        with pytest.raises(PromptError, match=message):
            model.logits(ids)

    def test_leave_the_caches_alone(self, model: Model) -> None:
        model.logits(PROMPT)
        assert model.generate(PROMPT, max_tokens=1).usage.cached_tokens == 0


class TestCaches:
    """Whatever becomes of a stream, what it computed serves the next one."""

    def cached(self, model: Model, ids: list[int]) -> int:
        return model.generate(ids, max_tokens=1).usage.cached_tokens

    def test_of_a_finished_answer(self, model: Model) -> None:
        completion = model.generate(PROMPT, max_tokens=8)
        # What was generated was computed one by one, and not as in a prompt.
        assert self.cached(model, [*PROMPT, *completion.token_ids]) == 20

    def test_of_a_closed_answer(self, model: Model) -> None:
        with model.stream(PROMPT, logit_bias=LETTERS) as stream:
            text = next(stream).text + next(stream).text
        assert stream.completion.finish_reason == "cancelled"
        assert stream.completion.text == text
        assert self.cached(model, PROMPT) == 18

    def test_of_a_forgotten_answer(self, model: Model) -> None:
        gc.disable()
        try:
            next(model.stream(PROMPT))
            assert self.cached(model, PROMPT) == 18
        finally:
            gc.enable()

    def test_of_an_answer_that_failed(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        forward, passes = Session.forward, iter(range(100))

        def failing(*arguments: Any) -> Any:
            if next(passes) == 2:
                raise RuntimeError("broken")
            return forward(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "forward", failing)
            stream = model.stream(PROMPT, logit_bias=LETTERS, speculate=False)
            text = next(stream).text + next(stream).text
            with pytest.raises(RuntimeError, match="broken"):
                next(stream)
        assert stream.completion.text == text
        assert self.cached(model, PROMPT) == 18

    def test_of_an_answer_never_begun(self, model: Model) -> None:
        self.cached(model, PROMPT)
        model.stream(PROMPT).close()
        assert self.cached(model, PROMPT) == 18

    def test_a_shared_beginning_is_computed_once(self, model: Model) -> None:
        fresh = model.generate([*PROMPT, 7], max_tokens=10)
        again = model.generate([*PROMPT, 8], max_tokens=10)
        assert again.usage.cached_tokens == 19
        expected = model.logits([*PROMPT, 8])[-1].argmax()
        assert again.token_ids[0] == expected
        assert facts(model.generate([*PROMPT, 7], max_tokens=10)) == facts(fresh)

    def test_many_requests_leave_nothing_behind(self, int8_bundle: Path) -> None:
        with pocketlm.load(int8_bundle, threads=1, cache_bytes=1 << 20, concurrency=3) as model:
            session, scheduler = model._session, model._scheduler
            assert session is not None

            def held() -> tuple[int, int, bool]:
                def count(pool: KVPool) -> tuple[int, int, bool]:
                    _, bindings = session._bindings[pool.slots]
                    return len(pool.slots), len(session._bindings), len(bindings) <= 10

                return scheduler.call(count).result()

            for seed in range(300):
                ids = random_ids(5 + seed % 7, seed=seed)
                for stream in model.streams(ids, 1 + seed % 3, max_tokens=1 + seed % 4):
                    if seed % 5:
                        stream.finish()
                    else:
                        stream.close()
                if seed == 30:
                    before = held()
            assert held() == before
            assert before[0] <= 4
            assert before[2]
            assert scheduler.load == (0, 0)
            assert scheduler.call(lambda pool: pool.store.bytes).result() <= 1 << 20


class TestTogether:
    prompts = (random_ids(40, seed=1), random_ids(33, seed=2))

    def alone(self, model: Model, ids: list[int]) -> Completion:
        return model.generate(ids, max_tokens=25, temperature=1.0, seed=3)

    def test_interleaved_streams_give_what_each_gives_alone(self, model: Model) -> None:
        expected = [self.alone(model, ids) for ids in self.prompts]
        for ids in (self.prompts, (self.prompts[0], self.prompts[0])):
            streams = [model.stream(each, max_tokens=25, temperature=1.0, seed=3) for each in ids]
            for _ in range(25):
                for stream in streams:
                    next(stream, None)
            for stream, each in zip(streams, ids, strict=True):
                assert list(stream) == []
                assert facts(stream.completion) == facts(expected[self.prompts.index(each)])

    def test_threads_give_what_each_gives_alone(self, model: Model) -> None:
        expected = [self.alone(model, ids) for ids in self.prompts]
        found: list[tuple[int, Completion]] = []

        def work(number: int) -> None:
            found.extend((number, self.alone(model, self.prompts[number])) for _ in range(5))

        workers = [threading.Thread(target=work, args=[number]) for number in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 10
        assert all(facts(completion) == facts(expected[number]) for number, completion in found)


class TestClosed:
    def test_a_closed_model_says_so(self, int8_bundle: Path) -> None:
        with pocketlm.load(int8_bundle) as model:
            chat = model.chat(system="Be brief.")
            model.generate(PROMPT, max_tokens=1)
        model.close()
        for call in (
            lambda: model.generate("Hello"),
            lambda: model.stream(PROMPT),
            lambda: model.logits(PROMPT),
            lambda: chat.send("Hello"),
        ):
            with pytest.raises(PocketlmError, match=r"model tiny has been closed\. Load it again"):
                call()
        assert [message["role"] for message in chat.messages] == ["system"]

    def test_a_stream_that_has_ended_is_still_there(self, int8_bundle: Path) -> None:
        with pocketlm.load(int8_bundle) as model:
            stream = model.stream(PROMPT, max_tokens=2)
            list(stream)
        assert stream.completion.usage.completion_tokens == 2

    def test_the_memory_comes_back(self, int8_bundle: Path) -> None:
        model = pocketlm.load(int8_bundle, threads=1)
        streams = [model.stream(random_ids(9, seed=seed), logit_bias=LETTERS) for seed in range(3)]
        for stream in streams:
            next(stream)
        pool = model._scheduler._pool
        alive = [weakref.ref(model._session), weakref.ref(pool.slots.buffer)]
        model.close()
        # The model and its streams are still there.
        assert [each() for each in alive] == [None, None]
        for stream in streams:
            assert len(list(stream)) < 512
            assert stream.completion.finish_reason == "cancelled"

    def test_a_model_that_is_dropped_is_closed_without_a_collection(self, int8_bundle: Path) -> None:
        gc.disable()
        try:
            model = pocketlm.load(int8_bundle, threads=1)
            model.generate(PROMPT, max_tokens=1)
            buffer, thread = weakref.ref(model._scheduler._pool.slots.buffer), model._scheduler._thread
            assert thread is not None
            del model
            wait_for(thread)
            assert buffer() is None
        finally:
            gc.enable()

    def test_a_stream_keeps_its_model(self, int8_bundle: Path) -> None:
        assert (
            len(list(pocketlm.load(int8_bundle, threads=1).stream(PROMPT, max_tokens=5, ignore_eos=True)))
            == 5
        )

    def test_closed_by_one_thread_while_another_reads(self, int8_bundle: Path) -> None:
        model = pocketlm.load(int8_bundle, threads=1)
        stream = model.stream(PROMPT, logit_bias=LETTERS)
        next(stream)
        closer = threading.Thread(target=model.close)
        closer.start()
        read(stream)
        wait_for(closer)
        assert stream.completion.finish_reason == "cancelled"

    def test_two_models_at_once(self, int8_bundle: Path, fp32_bundle: Path) -> None:
        with pocketlm.load(int8_bundle, threads=1) as one, pocketlm.load(fp32_bundle, threads=1) as other:
            expected = [facts(model.generate(PROMPT, max_tokens=20)) for model in (one, other)]
            streams = [model.stream(PROMPT, max_tokens=20) for model in (one, other)]
            assert [facts(stream.finish()) for stream in streams] == expected
            one.close()
            assert facts(other.generate(PROMPT, max_tokens=20)) == expected[1]


class TestSeveral:
    def test_share_the_prompt_and_have_seeds_of_their_own(self, model: Model) -> None:
        settings: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, "logit_bias": LETTERS}
        streams = model.streams(PROMPT, 3, seed=5, **settings)
        found = [stream.finish() for stream in streams]
        assert [completion.usage.cached_tokens for completion in found] == [0, 18, 18]
        for seed, completion in enumerate(found, 5):
            assert facts(completion) == facts(model.generate(PROMPT, seed=seed, speculate=False, **settings))
        assert len({completion.text for completion in found}) == 3

    @pytest.mark.parametrize("n", [0, -1])
    def test_a_number_that_cannot_be(self, model: Model, n: int) -> None:
        with pytest.raises(InvalidSettingError, match=rf"n is {n}; a whole number from 1 on"):
            model.streams(PROMPT, n)


class TestLimits:
    def test_of_the_queue(self, int8_bundle: Path) -> None:
        with pocketlm.load(int8_bundle, threads=1, concurrency=1, queue_limit=0) as model:
            with model.stream(PROMPT, logit_bias=LETTERS) as stream:
                next(stream)
                with pytest.raises(QueueFullError, match="larger queue_limit"):
                    model.stream(PROMPT)
            with pytest.raises(QueueFullError, match=r"0 requests wait .* with 2 more"):
                model.streams(PROMPT, 2)
            assert len(model.generate(PROMPT, max_tokens=3, ignore_eos=True).token_ids) == 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"concurrency": 0}, "concurrency is 0; a whole number from 1 on"),
            ({"queue_limit": -1}, "queue_limit is -1; a whole number from 0 on"),
            ({"cache_bytes": -1}, "budget is -1 bytes"),
        ],
    )
    def test_that_cannot_be(self, int8_bundle: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidSettingError, match=message):
            pocketlm.load(int8_bundle, **options)

    def test_of_time(self, int8_bundle: Path) -> None:
        with pocketlm.load(int8_bundle, threads=1, concurrency=1) as model:
            with model.stream(PROMPT, logit_bias=LETTERS):
                completion = model.generate(PROMPT, timeout_s=0.01)
            assert completion.finish_reason == "timeout"
            assert completion.token_ids == ()

    def test_slide_leaves_the_oldest_out(self, model: Model) -> None:
        chat = model.chat(system="Be brief.")
        dropped = 0
        for _ in range(14):
            completion = chat.send("A" * 40, max_tokens=8, logit_bias=LETTERS, overflow="slide")
            assert completion.usage.prompt_tokens + 8 <= 512
            assert completion.usage.dropped_messages >= dropped
            dropped = completion.usage.dropped_messages
        assert dropped > 0
        assert len(chat.messages) == 29

    def test_slide_cannot_cut_a_message(self, model: Model) -> None:
        messages = [Message(role="user", content="A" * 600)]
        for overflow in ("slide", "error"):
            with pytest.raises(ContextOverflowError) as refusal:
                model.generate(messages, overflow=overflow)
            assert refusal.value.context_length == model.context_length
            assert refusal.value.prompt_tokens > 600

    def test_slide_leaves_the_answer_to_a_long_message_its_room(self, model: Model) -> None:
        texts = {"user": "A" * 40, "assistant": "B" * 5}
        messages = [Message(role=role, content=text) for role, text in texts.items()]
        messages.append(Message(role="user", content="C" * 420))
        completion = model.generate(messages, max_tokens=100, logit_bias=LETTERS, overflow="slide")
        assert completion.usage.prompt_tokens > 512 - 100
        assert completion.usage.dropped_messages == 2
        assert completion.usage.total_tokens == 512


class TestDeterminism:
    """The same settings give the same tokens, whatever else there is."""

    prompts = tuple(random_ids(count, seed=count) for count in (33, 150, 8, 64))
    settings: ClassVar[dict[str, Any]] = {"max_tokens": 24, "temperature": 0.8, "seed": 3, "ignore_eos": True}

    def ids(self, streams: list[Stream]) -> list[tuple[int, ...]]:
        return [stream.finish().token_ids for stream in streams]

    def expected(self, bundle: Path, **options: Any) -> list[tuple[int, ...]]:
        """One by one, nothing cached and nothing drafted."""
        with pocketlm.load(bundle, threads=1, **options) as model:
            return [
                model.generate(ids, speculate=False, cache_prompt=False, **self.settings).token_ids
                for ids in self.prompts
            ]

    @pytest.mark.parametrize("reproducible", [False, True])
    @pytest.mark.parametrize("concurrency", [1, 3, 8])
    def test_together_and_cached(self, int8_bundle: Path, concurrency: int, reproducible: bool) -> None:
        expected = self.expected(int8_bundle, reproducible=reproducible)
        with pocketlm.load(
            int8_bundle, threads=2, concurrency=concurrency, reproducible=reproducible
        ) as model:
            for _ in range(2):  # the second time, the prompts are cached
                streams = [model.stream(ids, speculate=False, **self.settings) for ids in self.prompts]
                assert self.ids(streams) == expected

    def test_reproducible_with_speculation(self, int8_bundle: Path) -> None:
        # Text that repeats itself, so that there are drafts.
        prompts = [[*ids[:12], *ids[:12], *ids[:12]] for ids in self.prompts]
        settings = {**self.settings, "temperature": 0.0, "max_tokens": 60}
        with pocketlm.load(int8_bundle, threads=1, reproducible=True) as model:
            plain = [
                model.generate(ids, speculate=False, cache_prompt=False, **settings).token_ids
                for ids in prompts
            ]
            completions = [stream.finish() for stream in [model.stream(ids, **settings) for ids in prompts]]
            assert [completion.token_ids for completion in completions] == plain
            again = [model.generate(ids, **settings) for ids in prompts]
            assert [completion.token_ids for completion in again] == plain
            assert sum(completion.timings.drafted_tokens for completion in again) > 0

    @pytest.mark.parametrize("chunk", [2, 3, 17, 128])
    def test_any_chunk_size(self, int8_bundle: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = self.expected(int8_bundle)
        with pocketlm.load(int8_bundle, threads=1) as model:
            monkeypatch.setattr(model._scheduler, "_chunk", chunk)
            streams = [model.stream(ids, speculate=False, **self.settings) for ids in self.prompts]
            assert self.ids(streams) == expected

    def test_a_saved_prefix(self, int8_bundle: Path, tmp_path: Path) -> None:
        ids = self.prompts[1]
        with pocketlm.load(int8_bundle, threads=1) as model:
            expected = model.generate(ids, speculate=False, **self.settings).token_ids
            assert model.save_prefix(tmp_path / "prefix", ids[:100]) == 100
        with pocketlm.load(int8_bundle, threads=1) as model:
            assert model.load_prefix(tmp_path / "prefix") == 100
            found = model.generate(ids, speculate=False, **self.settings)
            assert found.usage.cached_tokens == 100
            assert found.token_ids == expected
        with (
            pocketlm.load(int8_bundle, threads=1, cache_bytes=1000) as model,
            pytest.raises(InvalidSettingError, match="larger cache_bytes"),
        ):
            model.load_prefix(tmp_path / "prefix")
