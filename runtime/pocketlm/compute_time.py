"""How long an engine has computed, and for which answers: what an answer's share of the energy follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Protocol, Self


class Account(Protocol):
    """Whom the engine computes for."""

    compute_s: float


class ComputeTime:
    """One thread computes and says for whom; `busy_s` may be read from any thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = Lock()  # so that what is read never falls, not even by the time between two statements
        self._done_s = 0.0
        self._since: float | None = None  # when the work that is under way began
        self._accounts: tuple[Account, ...] = ()

    @property
    def busy_s(self) -> float:
        """Seconds so far, those of the work that is under way included."""
        with self._lock:
            return self._done_s + (0.0 if self._since is None else self._clock() - self._since)

    def spent_on(self, *accounts: Account) -> Self:
        """A context whose time is divided evenly among the accounts; without any it is nobody's.

        Contexts do not nest. Whatever is raised in one, its time counts.
        """
        # No context of its own for each block: there are several to a token.
        self._accounts = accounts
        return self

    def __enter__(self) -> None:
        with self._lock:
            self._since = self._clock()

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            took_s = 0.0 if self._since is None else self._clock() - self._since
            self._done_s += took_s
            self._since = None
        for account in self._accounts:
            account.compute_s += took_s / len(self._accounts)
        self._accounts = ()  # an answer that has ended is not kept
