"""The async variant: what the sync one says, many at once, and what cancelling a task ends."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import pocketlm
from helpers.tiny import letters, only, random_ids
from pocketlm import aio
from pocketlm.aio import AsyncChat, AsyncModel, AsyncStream
from pocketlm.chat import Chat
from pocketlm.engine import Model
from pocketlm.errors import (
    ContextOverflowError,
    InvalidSettingError,
    ModelNotFoundError,
    PocketlmError,
    PromptError,
)
from pocketlm.generate import Completion
from pocketlm.sources import SourceFiles
from pocketlm.tokenizer import Message

PROMPT = random_ids(20, seed=5)
SETTINGS: dict[str, Any] = {"max_tokens": 8, "logit_bias": only(letters()), "temperature": 1.0, "seed": 4}
LONG: dict[str, Any] = {"logit_bias": only(letters()), "temperature": 1.0, "seed": 4}
"""An answer until the context of 512 tokens is full."""


def said(completion: Completion) -> tuple[str, tuple[int, ...], str]:
    return completion.text, completion.token_ids, completion.finish_reason


@asynccontextmanager
async def loaded(bundle: Path) -> AsyncIterator[AsyncModel]:
    async with await AsyncModel.load(bundle, threads=1) as model:
        yield model


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


async def read_some(stream: AsyncStream, pieces: list[str], enough: asyncio.Event) -> None:
    """Reads the stream to its end; `enough` is set at the third piece."""
    async for piece in stream:
        pieces.append(piece.text)
        if len(pieces) == 3:
            enough.set()


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_importing_pocketlm_does_not_load_it() -> None:
    script = "import pocketlm, sys; sys.exit('pocketlm.aio' in sys.modules or 'asyncio' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


class TestAnswers:
    def test_are_those_of_the_sync_model(self, model: Model, int8_bundle: Path) -> None:
        expected = model.generate(PROMPT, **SETTINGS)

        async def main() -> None:
            async with loaded(int8_bundle) as asynchronous:
                assert said(await asynchronous.generate(PROMPT, **SETTINGS)) == said(expected)
                stream = asynchronous.stream(PROMPT, **SETTINGS)
                pieces = [piece async for piece in stream]
                assert tuple(piece.token_id for piece in pieces) == expected.token_ids
                assert "".join(piece.text for piece in pieces) == expected.text
                assert said(stream.completion) == said(expected)

        asyncio.run(main())

    def test_a_text_with_a_system_message(self, model: Model, int8_bundle: Path) -> None:
        expected = model.generate("ONE", system="Be brief.", **SETTINGS)

        async def main() -> None:
            async with loaded(int8_bundle) as asynchronous:
                assert said(await asynchronous.generate("ONE", system="Be brief.", **SETTINGS)) == said(
                    expected
                )

        asyncio.run(main())

    def test_many_at_once_are_what_each_is_alone(self, model: Model, int8_bundle: Path) -> None:
        prompts = [random_ids(10 + number, seed=number) for number in range(12)]
        expected = [said(model.generate(prompt, **SETTINGS)) for prompt in prompts]

        async def main() -> None:
            async with loaded(int8_bundle) as asynchronous:
                found = await asyncio.gather(*(asynchronous.generate(p, **SETTINGS) for p in prompts))
                assert [said(completion) for completion in found] == expected

        asyncio.run(main())

    def test_an_answer_under_way_holds_no_thread(self, model: Model) -> None:
        async def main() -> None:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
            asynchronous = AsyncModel(model)
            await asynchronous.generate(PROMPT, max_tokens=1)  # starts the engine, and the thread to begin in
            before = set(threading.enumerate())
            streams = [asynchronous.stream(PROMPT, **LONG) for _ in range(4)]
            for stream in streams:
                await anext(stream)
            readers = [asyncio.create_task(stream.finish()) for stream in streams]
            await asyncio.sleep(0)
            assert set(threading.enumerate()) == before
            for completion in await asyncio.gather(*readers):
                assert len(completion.token_ids) == 492

        asyncio.run(main())

    def test_the_loop_goes_on_while_a_prompt_becomes_tokens(self, model: Model) -> None:
        async def main() -> None:
            release = threading.Event()
            begin = model.stream

            def waiting(*arguments: Any, **settings: Any) -> Any:
                assert release.wait(20)  # set by the loop's other task, or never
                return begin(*arguments, **settings)

            model.stream = waiting  # type: ignore[method-assign]
            answer = asyncio.create_task(AsyncModel(model).generate(PROMPT, max_tokens=2, ignore_eos=True))
            await asyncio.sleep(0.01)
            assert not answer.done()
            release.set()
            assert len((await answer).token_ids) == 2

        asyncio.run(main())

    def test_several_answers_to_one_prompt(self, model: Model) -> None:
        expected = [said(model.generate(PROMPT, **{**SETTINGS, "seed": seed})) for seed in (4, 5)]

        async def main() -> None:
            streams = await AsyncModel(model).streams(PROMPT, 2, **SETTINGS)
            found = await asyncio.gather(*(stream.finish() for stream in streams))
            assert [said(completion) for completion in found] == expected

        asyncio.run(main())

    def test_a_loop_that_ends_first_does_not_disturb_the_engine(self, model: Model) -> None:
        expected = said(model.generate(PROMPT, **SETTINGS))

        async def main() -> AsyncStream:
            stream = AsyncModel(model).stream(PROMPT, **LONG)
            await anext(stream)
            return stream

        stream = asyncio.run(main())  # still under way
        assert said(model.generate(PROMPT, **SETTINGS)) == expected
        assert stream.completion.finish_reason == "cancelled"

    def test_a_saved_prefix(self, model: Model, int8_bundle: Path, tmp_path: Path) -> None:
        expected = said(model.generate("ONE", system="Be brief.", **SETTINGS))

        async def main() -> None:
            messages = [Message(role="system", content="Be brief.")]
            saved = await AsyncModel(model).save_prefix(tmp_path / "prefix", messages)
            async with loaded(int8_bundle) as other:
                assert await other.load_prefix(tmp_path / "prefix") == saved
                completion = await other.generate("ONE", system="Be brief.", **SETTINGS)
                assert said(completion) == expected
                assert completion.usage.cached_tokens == saved

        asyncio.run(main())


class TestSignatures:
    @pytest.mark.parametrize(
        ("asynchronous", "sync"),
        [
            (AsyncModel.load, pocketlm.load),
            (AsyncModel.stream, Model.stream),
            (AsyncModel.streams, Model.streams),
            (AsyncModel.generate, Model.generate),
            (AsyncModel.chat, Model.chat),
            (AsyncModel.embed, Model.embed),
            (AsyncModel.save_prefix, Model.save_prefix),
            (AsyncModel.load_prefix, Model.load_prefix),
            (AsyncModel.close, Model.close),
            (AsyncChat.stream, Chat.stream),
            (AsyncChat.send, Chat.send),
            (AsyncChat.reset, Chat.reset),
            (AsyncChat.fork, Chat.fork),
        ],
    )
    def test_take_the_same(self, asynchronous: Callable[..., Any], sync: Callable[..., Any]) -> None:
        ours, theirs = (
            [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
            for function in (asynchronous, sync)
        )
        assert ours == theirs


class TestCancelling:
    def test_a_task_ends_its_answer(self, int8_bundle: Path) -> None:
        async def main() -> None:
            async with loaded(int8_bundle) as model:
                stream, pieces, enough = model.stream(PROMPT, **LONG), list[str](), asyncio.Event()
                task = asyncio.create_task(read_some(stream, pieces, enough))
                await enough.wait()
                await cancel(task)
                completion = stream.completion
                assert completion.finish_reason == "cancelled"
                assert 3 <= len(completion.token_ids) < 492
                await asyncio.sleep(0.05)
                assert said(stream.completion) == said(completion)  # nothing computes any longer
                assert [piece async for piece in stream] == []
                assert len((await model.generate(PROMPT, **SETTINGS)).token_ids) == 8

        asyncio.run(main())

    def test_a_whole_answer(self, int8_bundle: Path) -> None:
        async def main() -> None:
            async with loaded(int8_bundle) as model:
                stream = model.stream(PROMPT, **LONG)
                task = asyncio.create_task(stream.finish())
                await until(lambda: stream._stream is not None)
                await until(lambda: len(stream.completion.token_ids) > 2)
                await cancel(task)
                assert stream.completion.finish_reason == "cancelled"

        asyncio.run(main())

    def test_a_timeout(self, model: Model) -> None:
        async def main() -> None:
            stream = AsyncModel(model).stream(PROMPT, **LONG)
            await anext(stream)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    async for _ in stream:
                        pass
            assert stream.completion.finish_reason == "cancelled"

        asyncio.run(main())

    def test_while_it_begins(self, model: Model) -> None:
        """What the thread still begins after that is closed too."""

        async def main() -> None:
            entered, release = threading.Event(), threading.Event()
            begin = model.stream

            def slow(*arguments: Any, **settings: Any) -> Any:
                entered.set()
                assert release.wait(20)
                return begin(*arguments, **settings)

            model.stream = slow  # type: ignore[method-assign]
            stream = AsyncModel(model).stream(PROMPT, **LONG)
            task = asyncio.create_task(stream.finish())
            await until(entered.is_set)
            task.cancel()
            await asyncio.sleep(0.01)
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert stream.completion.finish_reason == "cancelled"
            assert len(stream.completion.token_ids) < 492

        asyncio.run(main())

    def test_one_of_several(self, int8_bundle: Path) -> None:
        async def main() -> None:
            async with loaded(int8_bundle) as model:
                alone = await model.generate(PROMPT, **SETTINGS)
                stream, enough = model.stream(random_ids(9), **LONG), asyncio.Event()
                task = asyncio.create_task(read_some(stream, [], enough))
                other = asyncio.create_task(model.generate(PROMPT, **SETTINGS))
                await enough.wait()
                await cancel(task)
                assert said(await other) == said(alone)

        asyncio.run(main())


class TestClosing:
    def test_a_block_ends_its_answer(self, model: Model) -> None:
        async def main() -> None:
            async with AsyncModel(model).stream(PROMPT, **LONG) as stream:
                async for _ in stream:
                    break
            assert stream.completion.finish_reason == "cancelled"
            assert [piece async for piece in stream] == []
            await stream.close()  # a second time does nothing

        asyncio.run(main())

    def test_from_another_task(self, model: Model) -> None:
        async def main() -> None:
            stream, pieces, enough = AsyncModel(model).stream(PROMPT, **LONG), list[str](), asyncio.Event()
            task = asyncio.create_task(read_some(stream, pieces, enough))
            await enough.wait()
            await stream.close()
            await task
            assert stream.completion.finish_reason == "cancelled"
            assert stream.completion.text.startswith("".join(pieces))

        asyncio.run(main())

    def test_before_it_began(self, model: Model) -> None:
        async def main() -> None:
            stream = AsyncModel(model).stream(PROMPT)
            with pytest.raises(PocketlmError, match="has not begun"):
                stream.completion  # noqa: B018
            await stream.close()
            assert [piece async for piece in stream] == []
            with pytest.raises(PocketlmError, match="has not begun"):
                await stream.finish()

        asyncio.run(main())

    def test_a_closed_model_says_so(self, int8_bundle: Path) -> None:
        async def main() -> None:
            async with loaded(int8_bundle) as model:
                chat = model.chat()
                await model.generate(PROMPT, max_tokens=1)
            await model.close()
            calls: list[Awaitable[object]] = [model.generate(PROMPT), chat.send("ONE")]
            for call in calls:
                with pytest.raises(PocketlmError, match="tiny has been closed"):
                    await call

        asyncio.run(main())


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "settings", "error", "message"),
        [
            ([5] * 600, {}, ContextOverflowError, "600 tokens"),
            ([], {}, PromptError, "prompt is empty"),
            (PROMPT, {"temperature": -1.0}, InvalidSettingError, "temperature"),
            (PROMPT, {"max_tokens": 0}, InvalidSettingError, "max_tokens is 0"),
        ],
    )
    def test_of_the_sync_api(
        self, model: Model, prompt: list[int], settings: Any, error: type[Exception], message: str
    ) -> None:
        async def main() -> None:
            asynchronous = AsyncModel(model)
            with pytest.raises(error, match=message):
                await asynchronous.generate(prompt, **settings)
            with pytest.raises(error, match=message):
                async for _ in asynchronous.stream(prompt, **settings):
                    pass

        asyncio.run(main())


class TestChat:
    def test_says_what_the_sync_one_says(self, model: Model, int8_bundle: Path) -> None:
        expected = model.chat(system="Be brief.")
        for text in ("ONE", "TWO"):
            expected.send(text, **SETTINGS)

        async def main() -> None:
            async with loaded(int8_bundle) as asynchronous:
                chat = asynchronous.chat(system="Be brief.")
                assert isinstance(chat, AsyncChat)
                await chat.send("ONE", **SETTINGS)
                assert len([piece async for piece in chat.stream("TWO", **SETTINGS)]) == 8
                assert chat.messages == expected.messages
                chat.system = "Be long."
                chat.reset()
                assert [message["content"] for message in chat.messages] == [chat.system] == ["Be long."]
                fork = chat.fork()
                await fork.send("ONE", **SETTINGS)
                assert (len(chat.messages), len(fork.messages)) == (1, 3)

        asyncio.run(main())

    def test_a_cancelled_turn_counts_as_far_as_it_came(self, model: Model) -> None:
        async def main() -> None:
            chat, enough = AsyncModel(model).chat(), asyncio.Event()
            stream = chat.stream("ONE", **LONG)
            task = asyncio.create_task(read_some(stream, [], enough))
            await enough.wait()
            await cancel(task)
            text = stream.completion.text
            assert [message["content"] for message in chat.messages] == ["ONE", text]
            await chat.send("TWO", **SETTINGS)
            assert len(chat.messages) == 4

        asyncio.run(main())


class TestLoading:
    def test_progress_is_reported_on_the_loop(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        reports: list[tuple[str, int, threading.Thread]] = []

        async def main() -> None:
            def progress(task: str, done: int, total: int, unit: str) -> None:
                reports.append((task, done, threading.current_thread()))

            async with await AsyncModel.load(tiny_source.path, precision="fp32", progress=progress) as model:
                assert model.model.manifest.precision.name == "fp32"

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("POCKETLM_HOME", str(tmp_path))
            asyncio.run(main())
        assert reports
        assert {thread for _, _, thread in reports} == {threading.main_thread()}

    def test_cancelling_ends_the_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended = threading.Event()

        def load(*_: object, progress: pocketlm.progress.Progress, **__: object) -> Model:
            try:
                for done in range(100_000):
                    progress("Downloading tiny", done, 100_000, "B")
                    time.sleep(0.001)
            finally:
                ended.set()
            raise AssertionError("it was never told to end")

        monkeypatch.setattr(aio, "load", load)

        async def main() -> None:
            reported = asyncio.Event()
            task = asyncio.create_task(
                AsyncModel.load("tiny", progress=lambda *_: reported.set())  # type: ignore[arg-type]
            )
            await reported.wait()
            await cancel(task)
            await until(ended.is_set)

        asyncio.run(main())

    def test_a_model_that_comes_too_late_is_closed(
        self, int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entered, release, models = threading.Event(), threading.Event(), list[Model]()

        def load(*_: object, **__: object) -> Model:
            entered.set()
            assert release.wait(20)
            models.append(pocketlm.load(int8_bundle, threads=1))
            return models[0]

        monkeypatch.setattr(aio, "load", load)

        def closed() -> bool:
            try:
                models[0].stream(PROMPT).close()
            except PocketlmError as error:
                return "closed" in str(error)
            return False

        async def main() -> None:
            task = asyncio.create_task(AsyncModel.load("tiny"))
            await until(entered.is_set)
            await cancel(task)
            release.set()
            await until(lambda: bool(models))
            await until(closed)

        asyncio.run(main())

    def test_errors(self) -> None:
        with pytest.raises(ModelNotFoundError, match="no model 'nosuch'"):
            asyncio.run(AsyncModel.load("nosuch"))
