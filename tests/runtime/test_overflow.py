"""Which messages stay when a conversation has outgrown the context."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pocketlm.errors import ContextOverflowError
from pocketlm.overflow import fit
from pocketlm.tokenizer import Message

OVERHEAD = 3  # tokens of a message besides its text


def count(messages: Sequence[Message]) -> int:
    return sum(OVERHEAD + len(message["content"]) for message in messages)


def conversation(*parts: str) -> list[Message]:
    """`"u:abc"` is a user's message of three tokens."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [Message(role=roles[part[0]], content=part[2:]) for part in parts]


def test_all_stay_while_they_fit() -> None:
    messages = conversation("s:x", "u:x", "a:x")
    stay, dropped = fit(messages, count, 12)
    assert (stay, dropped) == (messages, 0)
    assert stay is not messages


def test_the_oldest_turns_go_whole() -> None:
    messages = conversation("s:x", "u:1", "a:x", "t:x", "a:x", "u:2", "a:x", "u:3")
    assert fit(messages, count, 31) == ([messages[0], *messages[5:]], 4)
    assert fit(messages, count, 16) == ([messages[0], *messages[5:]], 4)
    assert fit(messages, count, 15) == ([messages[0], messages[7]], 6)


def test_the_newest_turn_keeps_what_follows_the_user() -> None:
    messages = conversation("u:1", "a:x", "u:2", "a:x", "t:x")
    assert fit(messages, count, 12) == (messages[2:], 2)


def test_a_greeting_goes_first() -> None:
    messages = conversation("s:x", "a:hello", "u:1", "a:x", "u:2")
    assert fit(messages, count, 20) == ([messages[0], *messages[2:]], 1)


@pytest.mark.parametrize(
    ("messages", "needed"),
    [
        (conversation("s:x", "u:1", "a:x", "u:long"), 11),
        (conversation("u:1", "a:x", "u:2", "a:x", "u:long, long"), 13),
        (conversation("u:long"), 7),
        (conversation("s:long"), 7),
        (conversation("s:x", "a:long"), 11),
    ],
)
def test_the_newest_turn_alone_is_too_long(messages: list[Message], needed: int) -> None:
    with pytest.raises(ContextOverflowError) as caught:
        fit(messages, count, 6)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (needed, 6)


MESSAGES = st.lists(
    st.builds(Message, role=st.sampled_from(["user", "assistant", "tool"]), content=st.text("x", max_size=5)),
    max_size=30,
)
SYSTEM = st.lists(st.builds(Message, role=st.just("system"), content=st.text("x", max_size=5)), max_size=2)


@given(system=SYSTEM, rest=MESSAGES, limit=st.integers(0, 150))
@example(system=[], rest=[], limit=0)
def test_the_laws(system: list[Message], rest: list[Message], limit: int) -> None:
    messages = [*system, *rest]
    calls: list[int] = []

    def counted(some: Sequence[Message]) -> int:
        calls.append(len(some))
        return count(some)

    users = [index for index, message in enumerate(rest) if message["role"] == "user"]
    newest = rest[users[-1] :] if users else rest
    if count([*system, *newest]) > limit:
        with pytest.raises(ContextOverflowError) as caught:
            fit(messages, counted, limit)
        assert caught.value.prompt_tokens == count([*system, *newest])
    else:
        stay, dropped = fit(messages, counted, limit)
        assert count(stay) <= limit
        assert stay == [*system, *rest[dropped:]]  # the system messages, then the end, in order
        assert dropped == 0 or dropped in users  # whole turns
        longer = [start for start in (0, *users) if start < dropped]
        if longer:
            assert count([*system, *rest[longer[-1] :]]) > limit  # no further turn fits
    assert len(calls) <= 2 + (len(users) + 1).bit_length()


@given(sizes=st.lists(st.integers(0, 9), min_size=2, max_size=20), limit=st.integers(0, 9))
def test_it_fits_even_where_fewer_messages_make_more_tokens(sizes: list[int], limit: int) -> None:
    """As with a template that leaves out what older answers thought."""
    messages = [Message(role="user", content="x") for _ in sizes]

    def uneven(some: Sequence[Message]) -> int:
        return sizes[len(some) - 1]

    try:
        stay, dropped = fit(messages, uneven, limit)
    except ContextOverflowError:
        assume(False)
    assert uneven(stay) <= limit
    assert len(stay) == len(messages) - dropped
