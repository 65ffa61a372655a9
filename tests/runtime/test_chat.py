"""Conversations: each turn computes only what is new, and says what a fresh run would say."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pocketlm
from helpers.tiny import IM_END, TEMPLATE, letters, only
from pocketlm.bundle import TEMPLATE_NAME, write_manifest
from pocketlm.engine import Chat, Model
from pocketlm.errors import ContextOverflowError, InvalidSettingError, PromptError
from pocketlm.generate import Completion
from pocketlm.manifest import read_manifest
from pocketlm.scheduler import QueueFullError
from pocketlm.session import Session
from pocketlm.tokenizer import Message

SETTINGS: dict[str, Any] = {"max_tokens": 8, "logit_bias": only(letters()), "temperature": 1.0, "seed": 4}
LONG: dict[str, Any] = {"logit_bias": only(letters())}
SYSTEM = Message(role="system", content="Be brief.")


@pytest.fixture
def fresh(int8_bundle: Path) -> Iterator[Model]:
    """Another copy of the model, which has heard nothing of the conversation."""
    with pocketlm.load(int8_bundle, threads=1) as model:
        yield model


def said(chat: Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.messages]


def same(first: Completion, second: Completion) -> bool:
    return (first.text, first.token_ids, first.finish_reason) == (
        second.text,
        second.token_ids,
        second.finish_reason,
    )


class TestTurns:
    def test_a_second_turn_is_that_of_a_fresh_run(self, model: Model, fresh: Model) -> None:
        chat = model.chat(system="Be brief.")
        first = chat.send("ONE", **SETTINGS)
        assert same(first, fresh.generate("ONE", system="Be brief.", **SETTINGS))
        second = chat.send("TWO", **SETTINGS)
        assert said(chat) == [
            ("system", "Be brief."),
            ("user", "ONE"),
            ("assistant", first.text),
            ("user", "TWO"),
            ("assistant", second.text),
        ]
        whole = fresh.generate(chat.messages[:-1], **SETTINGS)
        assert same(second, whole)
        assert second.usage.prompt_tokens == whole.usage.prompt_tokens
        assert second.text != first.text

    def test_a_turn_computes_only_what_is_new(self, model: Model) -> None:
        chat = model.chat()
        before = chat.send("ONE", **SETTINGS)
        assert before.usage.cached_tokens == 0
        for text in ("TWO", "THREE", "FOUR"):
            turn = chat.send(text, **SETTINGS)
            # A last token is not computed alone.
            assert turn.usage.cached_tokens >= before.usage.total_tokens - 1
            before = turn

    def test_an_answer_that_ends_itself(self, model: Model, fresh: Model) -> None:
        chat = model.chat()
        first = chat.send("ONE", logit_bias={IM_END: 1e4})
        assert (first.text, first.finish_reason) == ("", "stop")
        assert said(chat) == [("user", "ONE"), ("assistant", "")]
        second = chat.send("TWO", **SETTINGS)
        assert second.usage.cached_tokens == first.usage.prompt_tokens
        assert same(second, fresh.generate(chat.messages[:-1], **SETTINGS))

    def test_two_conversations_of_one_model(self, model: Model, fresh: Model) -> None:
        chats = [model.chat(system="Be brief."), model.chat(system="Be long.")]
        for text in ("ONE", "TWO", "THREE"):
            for chat in chats:
                turn = chat.send(text, **SETTINGS)
                assert (turn.usage.cached_tokens > 30) == (text != "ONE")
                assert same(turn, fresh.generate(chat.messages[:-1], **SETTINGS))

    def test_streams(self, model: Model) -> None:
        chat = model.chat()
        stream = chat.stream("ONE", **SETTINGS)
        assert said(chat) == [("user", "ONE")]
        text = "".join(piece.text for piece in stream)
        assert said(chat) == [("user", "ONE"), ("assistant", text)]
        stream.close()
        assert len(chat.messages) == 2


class TestCancelled:
    def test_the_partial_answer_stays(self, model: Model, fresh: Model) -> None:
        chat = model.chat()
        whole = fresh.generate("ONE", **SETTINGS)
        with chat.stream("ONE", **SETTINGS) as stream:
            next(stream), next(stream), next(stream)
        assert said(chat) == [("user", "ONE"), ("assistant", whole.text[:3])]
        second = chat.send("TWO", **SETTINGS)
        # What was computed of it beyond what was read is not said, and not reused.
        usage = stream.completion.usage
        assert usage.prompt_tokens <= second.usage.cached_tokens <= usage.total_tokens
        assert same(second, fresh.generate(chat.messages[:-1], **SETTINGS))

    def test_without_an_answer_the_message_is_taken_back(self, model: Model) -> None:
        chat = model.chat(system="Be brief.")
        chat.stream("ONE", **SETTINGS).close()
        assert chat.messages == [SYSTEM]

    def test_an_error_keeps_what_came(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        chat = model.chat()
        forward, passes = Session.forward, iter(range(100))

        def failing(*arguments: Any) -> Any:
            if next(passes) == 2:
                raise RuntimeError("broken")
            return forward(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "forward", failing)
            stream = chat.stream("ONE", speculate=False, **SETTINGS)
            text = next(stream).text + next(stream).text
            with pytest.raises(RuntimeError, match="broken"):
                next(stream)
        assert said(chat) == [("user", "ONE"), ("assistant", text)]
        assert chat.send("TWO", **SETTINGS).usage.cached_tokens > 0

    def test_a_forgotten_answer_ends_without_a_collection(self, model: Model) -> None:
        gc.disable()
        try:
            chat = model.chat()
            stream = chat.stream("ONE", **LONG)
            text = next(stream).text
            del stream
            assert said(chat) == [("user", "ONE"), ("assistant", text)]
            chat.stream("TWO", **LONG)
            assert len(chat.messages) == 2
            # More than may be under way at once, each with its conversation.
            for _ in range(10):
                next(model.chat().stream("ONE", **LONG))
            assert len(chat.send("TWO", **SETTINGS).text) == 8
        finally:
            gc.enable()

    def test_a_refused_message_is_taken_back(
        self, int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pocketlm.load(int8_bundle, threads=1, concurrency=1, queue_limit=0) as model:
            chat = model.chat(system="Be brief.")
            with model.stream("ONE", **LONG), pytest.raises(QueueFullError):
                chat.send("TWO")
            assert chat.messages == [SYSTEM]

    def test_closing_an_old_answer_changes_nothing(self, model: Model) -> None:
        chat = model.chat()
        first = chat.stream("ONE", **SETTINGS)
        next(first)
        second = chat.stream("TWO", **SETTINGS)
        first.close()
        next(second)
        second.close()
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2

    def test_the_next_message_ends_the_answer_under_way(self, model: Model, fresh: Model) -> None:
        chat = model.chat()
        stream = chat.stream("ONE", **SETTINGS)
        text = next(stream).text
        second = chat.send("TWO", **SETTINGS)
        assert list(stream) == []
        assert stream.completion.finish_reason == "cancelled"
        assert said(chat) == [
            ("user", "ONE"),
            ("assistant", text),
            ("user", "TWO"),
            ("assistant", second.text),
        ]
        assert same(second, fresh.generate(chat.messages[:-1], **SETTINGS))


class TestFork:
    def test_goes_its_own_way_and_computes_nothing_again(self, model: Model, fresh: Model) -> None:
        chat = model.chat(system="Be brief.")
        first = chat.send("ONE", **SETTINGS)
        fork = chat.fork()
        assert said(fork) == said(chat)
        turns = [each.send(text, **SETTINGS) for each, text in ((chat, "TWO"), (fork, "THREE"))]
        for each, turn in zip((chat, fork), turns, strict=True):
            assert turn.usage.cached_tokens >= first.usage.total_tokens - 1
            assert same(turn, fresh.generate(each.messages[:-1], **SETTINGS))
        fork.messages[0]["content"] = "Be long."
        assert chat.system == "Be brief."


class TestReset:
    def test_forgets_all_but_the_system_message(self, model: Model, fresh: Model) -> None:
        chat = model.chat(system="Be brief.")
        chat.send("ONE", **SETTINGS)
        chat.reset()
        assert chat.messages == [SYSTEM]
        turn = chat.send("TWO", **SETTINGS)
        assert same(turn, fresh.generate("TWO", system="Be brief.", **SETTINGS))
        assert turn.usage.cached_tokens >= len(model.tokenizer.encode("<|im_start|>system\nBe brief."))

    def test_without_a_system_message(self, model: Model) -> None:
        chat = model.chat()
        chat.send("ONE", **SETTINGS)
        chat.reset()
        assert chat.messages == []

    def test_ends_an_answer_under_way(self, model: Model) -> None:
        chat = model.chat(system="Be brief.")
        stream = chat.stream("ONE", **SETTINGS)
        next(stream)
        chat.reset()
        assert chat.messages == [SYSTEM]
        assert list(stream) == []
        assert chat.messages == [SYSTEM]


class TestSystem:
    def test_may_be_set_changed_and_taken_away(self, model: Model, fresh: Model) -> None:
        chat = model.chat()
        assert chat.system is None
        for system in ("Be brief.", "Be long.", None):
            chat.system = system
            assert chat.system == system
            turn = chat.send("ONE", **SETTINGS)
            assert same(turn, fresh.generate(chat.messages[:-1], **SETTINGS))
            assert [message["role"] for message in chat.messages].count("system") == (system is not None)
        assert len(chat.messages) == 6

    def test_an_empty_one_is_one(self, model: Model) -> None:
        chat = model.chat(system="")
        assert chat.system == ""
        assert chat.messages == [Message(role="system", content="")]

    def test_setting_it_during_an_answer_holds_from_the_next_on(self, model: Model) -> None:
        chat = model.chat()
        stream = chat.stream("ONE", **SETTINGS)
        next(stream)
        chat.system = "Be brief."
        list(stream)
        assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "settings", "error"),
        [
            ("A" * 600, {}, ContextOverflowError),
            ("ONE", {"max_tokens": 0}, InvalidSettingError),
            ("ONE", {"top_p": 7.0}, InvalidSettingError),
            ("ONE", {"stop": [""]}, InvalidSettingError),
            ("\ud800", {}, PromptError),
        ],
    )
    def test_the_conversation_is_as_it_was(
        self, model: Model, text: str, settings: dict[str, Any], error: type[Exception]
    ) -> None:
        chat = model.chat(system="Be brief.")
        first = chat.send("ONE", **SETTINGS)
        before = list(chat.messages)
        with pytest.raises(error):
            chat.send(text, **settings)
        assert chat.messages == before
        assert chat.send("TWO", **SETTINGS).usage.cached_tokens >= first.usage.total_tokens - 1

    def test_a_full_context_does_not_lose_the_conversation(self, model: Model) -> None:
        chat = model.chat()
        with pytest.raises(ContextOverflowError, match="holds 512"):
            for _ in range(100):
                chat.send("A" * 50, **SETTINGS)
        assert chat.messages[-1]["role"] == "assistant"
        chat.reset()
        assert chat.send("ONE", **SETTINGS).text


def test_a_call_stays_in_the_conversation(int8_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(int8_bundle, tmp_path / "bundle")
    template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call>" + TEMPLATE
    (tmp_path / "bundle" / TEMPLATE_NAME).write_text(template, encoding="utf-8")
    write_manifest(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    paint = {"type": "function", "function": {"name": "paint"}}
    with pocketlm.load(tmp_path / "bundle", threads=1) as model:
        chat = model.chat()
        chat.send("Paint!", tools=[paint], tool_choice=paint)
    call = {"id": "000001000", "type": "function", "function": {"name": "paint", "arguments": "{}"}}
    answer: Any = chat.messages[1]
    assert answer["tool_calls"] == [call]
