"""How long work reports how far it got."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called again and again by work that takes a while, always from the thread that called the work.

    `task` is a short label in the present participle ("Downloading smollm2-135m"). `done` and `total`
    count `unit`: "B" for bytes or a plural noun ("tokens"). `total` is 0 while it is unknown. A task
    ends when `done == total` and `total > 0`, when another task begins, or when the work returns or raises.
    """

    def __call__(self, task: str, done: int, total: int, unit: str) -> None: ...


def silent(task: str, done: int, total: int, unit: str) -> None:
    """The default everywhere: reports nothing."""
