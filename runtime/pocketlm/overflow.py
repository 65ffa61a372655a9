"""Which messages of a conversation stay when it has grown beyond the context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from pocketlm.errors import ContextOverflowError
from pocketlm.tokenizer import Message


def fit(
    messages: Sequence[Message], count: Callable[[Sequence[Message]], int], limit: int
) -> tuple[list[Message], int]:
    """The messages that make a prompt of at most `limit` tokens, and how many were dropped for it.

    The system messages at the beginning always stay, and the newest turn does. Of the other turns the newest
    stay, as many as fit. A turn is a user's message and all that follows it up to the next one; it stays
    whole or goes whole. What stands before the first user's message is the oldest turn.

    `count` says how many tokens the prompt of a conversation has, and more messages never make fewer. It is
    called once if all of them fit, else about as often as the number of turns has binary digits.

    Raises ContextOverflowError if not even the newest turn fits.
    """
    tokens = count(messages)
    if tokens <= limit:
        return list(messages), 0
    system, starts = _turns(messages)

    def from_turn(index: int) -> list[Message]:
        return [*messages[:system], *messages[starts[index] :]]

    shorter = range(1, len(starts))
    first = 1 + bisect_left(shorter, True, key=lambda index: count(from_turn(index)) <= limit)
    if first >= len(starts):
        raise ContextOverflowError(count(from_turn(-1)) if shorter else tokens, limit)
    return from_turn(first), starts[first] - system


def _turns(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """How many system messages there are at the beginning, and where each turn begins."""
    roles = [message["role"] for message in messages]
    system = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    starts = [index for index in range(system, len(roles)) if index == system or roles[index] == "user"]
    return system, starts
